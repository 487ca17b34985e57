"""Expert outputs weighted and added up per token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ferrum_ops._checks import (
    check_activation,
    check_float32,
    check_rows_apart,
    check_shape,
    check_weight,
    compute_dtype,
    expect,
)
from ferrum_ops._library import refuse_grad, register
from ferrum_ops.ops.norm import normalize


def moe_combine(packed: torch.Tensor, pairs_by_token: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """`out[t] = sum_j topk_weights[t, j] * packed[pairs_by_token[t*K + j]]`.

    Summed in float32 over ascending j and rounded once. A pair outside `[0, R)`, -1 above all, is skipped; a token
    with none left is zero.

    Args:
        packed: `[R, H]`, rows in the order of `moe_build_pairs_by_token`; float32, float16 or bfloat16; rows
            contiguous, any row stride.
        pairs_by_token: int32 `[T*K]`, contiguous.
        topk_weights: float32 `[T, K]`, contiguous.

    Returns:
        Contiguous `[T, H]` of packed's dtype.

    Raises:
        RuntimeError: other dtypes, shapes or strides, or an input that requires grad while autograd is on.
    """
    refuse_grad("moe_combine", packed, topk_weights)
    return torch.ops.ferrum.moe_combine(packed, pairs_by_token, topk_weights)


def _check_weights(op: str, argument: str, weights: torch.Tensor, x: torch.Tensor) -> None:
    check_float32(op, argument, weights, x)
    expect(weights.dim() == 2, op, argument, "shape (tokens, top_k)", tuple(weights.shape))
    expect(weights.is_contiguous(), op, argument, "a contiguous tensor", f"strides {tuple(weights.stride())}")


def _check_moe_combine(packed: torch.Tensor, pairs_by_token: torch.Tensor, topk_weights: torch.Tensor) -> None:
    op = "moe_combine"
    check_activation(op, "packed", packed)
    expect(packed.dim() == 2, op, "packed", "shape (rows, hidden)", tuple(packed.shape))
    rows = packed.numel() == 0 or packed.shape[1] == 1 or packed.stride(1) == 1
    expect(rows, op, "packed", "a contiguous last dimension", f"strides {tuple(packed.stride())}")
    _check_weights(op, "topk_weights", topk_weights, packed)
    expect(pairs_by_token.dtype == torch.int32, op, "pairs_by_token", "int32", pairs_by_token.dtype)
    check_shape(op, "pairs_by_token", pairs_by_token, (topk_weights.shape[0] * topk_weights.shape[1],))
    contiguous = pairs_by_token.is_contiguous()
    expect(contiguous, op, "pairs_by_token", "a contiguous tensor", f"strides {pairs_by_token.stride()}")


def moe_combine_ref(packed: torch.Tensor, pairs_by_token: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    _check_moe_combine(packed, pairs_by_token, topk_weights)
    compute = compute_dtype(packed.dtype)
    pairs = pairs_by_token.view(topk_weights.shape)
    kept = (pairs >= 0) & (pairs < packed.shape[0])
    rows = torch.where(kept, pairs, 0).long()
    total = packed.new_zeros((topk_weights.shape[0], packed.shape[1]), dtype=compute)
    for j in range(topk_weights.shape[1] if packed.shape[0] > 0 else 0):
        term = topk_weights[:, j, None].to(compute) * packed[rows[:, j]].to(compute)
        total = total + torch.where(kept[:, j, None], term, 0)
    return total.to(packed.dtype)


def moe_combine_fake(packed: torch.Tensor, pairs_by_token: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    _check_moe_combine(packed, pairs_by_token, topk_weights)
    return packed.new_empty((topk_weights.shape[0], packed.shape[1]))


def moe_combine_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def arguments(tokens: int, top_k: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pairs = torch.randperm(tokens * top_k, device=device).int()
        packed = torch.randn(tokens * top_k, hidden, device=device).to(dtype)
        return packed, pairs, torch.rand(tokens, top_k, device=device)

    for shape in ((0, 8, 64), (1, 8, 2048), (5, 3, 63), (9, 1, 100), (3, 0, 16), (4, 2, 1)):
        yield arguments(*shape)
    packed, pairs, weights = arguments(7, 4, 127)
    pairs[::3] = -1
    pairs[4:8] = -1  # a token without any expert
    pairs[9] = 28  # one past the last row
    yield packed, pairs, weights
    packed, pairs, weights = arguments(6, 2, 200)
    yield packed[:, 40:168], pairs, weights
    yield packed[:0], torch.full_like(pairs, -1), weights


def weighted_sum(slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`out[t] = sum_j weights[t, j] * slots[t, j]`, summed in float32 over ascending j and rounded once.

    Args:
        slots: `[T, K, H]`, float32, float16 or bfloat16; last dimension contiguous, other strides free.
        weights: float32 `[T, K]`, contiguous.

    Returns:
        Contiguous `[T, H]` of slots' dtype.

    Raises:
        RuntimeError: other dtypes, shapes or strides, or an input that requires grad while autograd is on.
    """
    refuse_grad("weighted_sum", slots, weights)
    return torch.ops.ferrum.weighted_sum(slots, weights)


def _check_weighted_sum(op: str, slots: torch.Tensor, weights: torch.Tensor) -> None:
    check_activation(op, "slots", slots)
    expect(slots.dim() == 3, op, "slots", "shape (tokens, top_k, hidden)", tuple(slots.shape))
    rows = slots.numel() == 0 or slots.shape[2] == 1 or slots.stride(2) == 1
    expect(rows, op, "slots", "a contiguous last dimension", f"strides {tuple(slots.stride())}")
    _check_weights(op, "weights", weights, slots)
    check_shape(op, "weights", weights, tuple(slots.shape[:2]))


def weighted_sum_ref(slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    _check_weighted_sum("weighted_sum", slots, weights)
    return _sum_slots(slots, weights).to(slots.dtype)


def _sum_slots(slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sums in the dtype of the computation."""
    compute = compute_dtype(slots.dtype)
    total = slots.new_zeros((slots.shape[0], slots.shape[2]), dtype=compute)
    for j in range(slots.shape[1]):
        total = total + weights[:, j, None].to(compute) * slots[:, j].to(compute)
    return total


def weighted_sum_fake(slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    _check_weighted_sum("weighted_sum", slots, weights)
    return slots.new_empty((slots.shape[0], slots.shape[2]))


def weighted_sum_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for tokens, top_k, hidden in ((0, 8, 64), (1, 8, 2048), (5, 3, 63), (9, 1, 100), (3, 0, 16), (4, 2, 127)):
        slots = torch.randn(tokens, top_k, hidden, device=device).to(dtype)
        yield slots, torch.rand(tokens, top_k, device=device)
    slots = torch.randn(4, 6, 200, device=device).to(dtype)
    yield slots.transpose(0, 1)[..., 40:168], torch.rand(6, 4, device=device)


def weighted_sum_residual_(residual: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> None:
    """`residual[t] += sum_j weights[t, j] * slots[t, j]`, added in float32 over ascending j and rounded once.

    Args:
        residual: `[T, H]` of slots' dtype; last dimension contiguous, rows apart, in other memory than slots.
        slots: `[T, K, H]`, float32, float16 or bfloat16; last dimension contiguous, other strides free.
        weights: float32 `[T, K]`, contiguous.

    Raises:
        RuntimeError: other dtypes, shapes or strides, or an input that requires grad while autograd is on.
    """
    refuse_grad("weighted_sum_residual_", residual, slots, weights)
    torch.ops.ferrum.weighted_sum_residual_(residual, slots, weights)


def _check_residual(op: str, residual: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> None:
    _check_weighted_sum(op, slots, weights)
    expect(residual.dtype == slots.dtype, op, "residual", str(slots.dtype), residual.dtype)
    check_shape(op, "residual", residual, (slots.shape[0], slots.shape[2]))
    rows = residual.numel() == 0 or residual.shape[1] == 1 or residual.stride(1) == 1
    expect(rows, op, "residual", "a contiguous last dimension", f"strides {tuple(residual.stride())}")
    check_rows_apart(op, "residual", residual)


def weighted_sum_residual__ref(residual: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> None:
    _check_residual("weighted_sum_residual_", residual, slots, weights)
    total = _sum_slots(slots, weights)
    residual.copy_(residual.to(total.dtype) + total)


def weighted_sum_residual__fake(residual: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> None:
    _check_residual("weighted_sum_residual_", residual, slots, weights)


def weighted_sum_residual__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for slots, weights in weighted_sum_inputs(device, dtype):
        wide = torch.randn(slots.shape[0], slots.shape[2] + 3, device=device).to(dtype)
        yield wide[:, 2:-1], slots, weights


def weighted_sum_residual_norm_(
    residual: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, norm_weight: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """`weighted_sum_residual_`, and in the same pass the RMS norm that the next layer begins with.

    `s = residual + sum_j weights[:, j] * slots[:, j]` in float32; the residual becomes s rounded; what is returned is
    `s * rsqrt(mean(s^2) + eps) * norm_weight`, of the sum before it is rounded (as in `fused_add_rms_norm`).

    Args:
        residual, slots, weights: as in `weighted_sum_residual_`.
        norm_weight: `[H]`, contiguous, slots' dtype or float32.
        eps: added to the mean of squares.

    Returns:
        The normalised rows, a new contiguous `[T, H]` of slots' dtype. (The op itself writes to an argument `out`.)

    Raises:
        RuntimeError: other dtypes, shapes or strides, or an input that requires grad while autograd is on.
    """
    refuse_grad("weighted_sum_residual_norm_", residual, slots, weights, norm_weight)
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    torch.ops.ferrum.weighted_sum_residual_norm_(residual, slots, weights, norm_weight, out, eps)
    return out


def _check_residual_norm(
    residual: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, norm_weight: torch.Tensor, out: torch.Tensor
) -> None:
    op = "weighted_sum_residual_norm_"
    _check_residual(op, residual, slots, weights)
    check_weight(op, "norm_weight", norm_weight, slots, slots.shape[2])
    expect(out.dtype == slots.dtype, op, "out", str(slots.dtype), out.dtype)
    check_shape(op, "out", out, tuple(residual.shape))
    expect(out.is_contiguous(), op, "out", "a contiguous tensor", f"strides {tuple(out.stride())}")


def weighted_sum_residual_norm__ref(
    residual: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    norm_weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
) -> None:
    _check_residual_norm(residual, slots, weights, norm_weight, out)
    total = _sum_slots(slots, weights)
    total = residual.to(total.dtype) + total
    residual.copy_(total)
    out.copy_(normalize(total, norm_weight, eps))


def weighted_sum_residual_norm__fake(
    residual: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    norm_weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
) -> None:
    _check_residual_norm(residual, slots, weights, norm_weight, out)


def weighted_sum_residual_norm__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for i, (residual, slots, weights) in enumerate(weighted_sum_residual__inputs(device, dtype)):
        norm_weight = torch.randn(slots.shape[2], device=device).to(dtype if i % 2 else torch.float32)
        out = torch.empty(residual.shape, device=device, dtype=dtype)
        yield residual, slots, weights, norm_weight, out, 1e-6


register("moe_combine", ref=moe_combine_ref, fake=moe_combine_fake, inputs=moe_combine_inputs)
register("weighted_sum", ref=weighted_sum_ref, fake=weighted_sum_fake, inputs=weighted_sum_inputs)
register(
    "weighted_sum_residual_",
    ref=weighted_sum_residual__ref,
    fake=weighted_sum_residual__fake,
    inputs=weighted_sum_residual__inputs,
)
register(
    "weighted_sum_residual_norm_",
    ref=weighted_sum_residual_norm__ref,
    fake=weighted_sum_residual_norm__fake,
    inputs=weighted_sum_residual_norm__inputs,
)
