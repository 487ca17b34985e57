"""RMS normalisation of rows, alone and fused with the residual addition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ferrum_ops._checks import (
    check_activation,
    check_rows,
    check_rows_apart,
    check_shape,
    check_weight,
    compute_dtype,
    expect,
)
from ferrum_ops._library import differentiable, needs_grad, refuse_grad, register


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last dimension, in x's own dtype (float32 or float64)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

    Evaluated in float32 and rounded once to x's dtype. x and weight have gradients.

    Args:
        x: `[..., D]`, float32, float16 or bfloat16. Rows are contiguous with one row stride, as in any contiguous
            tensor and its column slices.
        weight: `[D]`, contiguous, x's dtype or float32.
        eps: added to the mean of squares.

    Returns:
        Contiguous tensor of x's shape and dtype.

    Raises:
        RuntimeError: other dtypes, shapes or strides.
    """
    if needs_grad(x, weight):
        return _differentiable_rms_norm(x, weight, eps)
    return torch.ops.ferrum.rms_norm(x, weight, eps)


def _check_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> None:
    check_activation("rms_norm", "x", x)
    check_rows("rms_norm", "x", x)
    check_weight("rms_norm", "weight", weight, x, x.shape[-1])


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    _check_rms_norm(x, weight)
    return normalize(x.to(compute_dtype(x.dtype)), weight, eps).to(x.dtype).contiguous()


def normalize_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `normalize` with respect to x and weight, in x's own dtype (float32 or float64)."""
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * inverse
    grad_normed = grad * weight.to(x.dtype)
    grad_x = inverse * (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True))
    return grad_x, (grad * normed).flatten(0, -2).sum(0) if x.dim() > 1 else grad * normed


def rms_norm_backward(
    needs: Sequence[bool], grads: Sequence[torch.Tensor], x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor | None, ...]:
    compute = compute_dtype(x.dtype)
    grad_x, grad_weight = normalize_backward(grads[0].to(compute), x.to(compute), weight, eps)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype) if needs[1] else None, None


_differentiable_rms_norm = differentiable(torch.ops.ferrum.rms_norm, rms_norm_backward)


def rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    _check_rms_norm(x, weight)
    return x.new_empty(x.shape)


def rms_norm_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for shape in ((0, 64), (1, 2048), (3, 63), (2, 3, 100), (5, 127), (1,), (4, 1)):
        yield randn(*shape), randn(shape[-1]), 1e-6
    yield randn(7, 128), randn(128, dtype=torch.float32), 1e-5
    yield randn(9, 200)[:, 50:177], randn(127), 1e-6
    yield randn(2, 5, 200)[..., 3:131], randn(128), 1e-6
    yield randn(1, 100).expand(4, 100), randn(100), 1e-6
    yield torch.zeros(2, 64, device=device, dtype=dtype), randn(64), 1e-6


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """`s = x + residual`, then `s * rsqrt(mean(s^2) + eps) * weight`: the next block's input and its residual.

    The sum is normalised as it stands in float32, before it is rounded for the residual stream. All three tensors have
    gradients.

    Args:
        x, residual: `[..., D]` of one shape and dtype (float32, float16 or bfloat16); rows as in `rms_norm`.
        weight: `[D]`, contiguous, x's dtype or float32.
        eps: added to the mean of squares.

    Returns:
        The normalised rows, and the sum rounded to x's dtype; both contiguous, of x's shape and dtype.

    Raises:
        RuntimeError: other dtypes, shapes or strides.
    """
    if needs_grad(x, residual, weight):
        return _differentiable_fused_add(x, residual, weight, eps)
    return torch.ops.ferrum.fused_add_rms_norm(x, residual, weight, eps)


def _check_fused_add(op: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    check_activation(op, "x", x)
    check_rows(op, "x", x)
    expect(residual.dtype == x.dtype, op, "residual", str(x.dtype), residual.dtype)
    check_shape(op, "residual", residual, tuple(x.shape))
    check_rows(op, "residual", residual)
    check_weight(op, "weight", weight, x, x.shape[-1])


def fused_add_rms_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_fused_add("fused_add_rms_norm", x, residual, weight)
    total = x.to(compute_dtype(x.dtype)) + residual.to(compute_dtype(x.dtype))
    normed = normalize(total, weight, eps).to(x.dtype).contiguous()
    return normed, total.to(x.dtype).contiguous()


def fused_add_rms_norm_backward(
    needs: Sequence[bool],
    grads: Sequence[torch.Tensor],
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor | None, ...]:
    compute = compute_dtype(x.dtype)
    total = x.to(compute) + residual.to(compute)
    grad_total, grad_weight = normalize_backward(grads[0].to(compute), total, weight, eps)
    grad_total = (grad_total + grads[1].to(compute)).to(x.dtype)
    return grad_total, grad_total, grad_weight.to(weight.dtype) if needs[2] else None, None


_differentiable_fused_add = differentiable(torch.ops.ferrum.fused_add_rms_norm, fused_add_rms_norm_backward)


def fused_add_rms_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_fused_add("fused_add_rms_norm", x, residual, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def fused_add_rms_norm_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, weight, eps in rms_norm_inputs(device, dtype):
        yield x, torch.randn(x.shape, device=device).to(dtype), weight, eps
    wide = torch.randn(6, 300, device=device).to(dtype)
    yield wide[:, :100], wide[:, 170:270], torch.ones(100, device=device, dtype=dtype), 1e-6


def fused_add_rms_norm_(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> None:
    """`fused_add_rms_norm` in place: `x` becomes the normalised rows, `residual` the rounded sum.

    Args and errors as there; also raised when rows of a mutated tensor overlap or when both are the same memory, and
    when an input requires grad while autograd is on.
    """
    refuse_grad("fused_add_rms_norm_", x, residual, weight)
    torch.ops.ferrum.fused_add_rms_norm_(x, residual, weight, eps)


def _check_fused_add_(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    op = "fused_add_rms_norm_"
    _check_fused_add(op, x, residual, weight)
    check_rows_apart(op, "x", x)
    check_rows_apart(op, "residual", residual)


def fused_add_rms_norm__ref(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    _check_fused_add_(x, residual, weight)
    normed, total = fused_add_rms_norm_ref(x, residual, weight, eps)
    x.copy_(normed)
    residual.copy_(total)


def fused_add_rms_norm__fake(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    _check_fused_add_(x, residual, weight)


def fused_add_rms_norm__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, residual, weight, eps in fused_add_rms_norm_inputs(device, dtype):
        if x.dim() < 2 or x.stride(0) > 0:  # expanded rows cannot be written
            yield x, residual.clone(), weight, eps


register("rms_norm", ref=rms_norm_ref, fake=rms_norm_fake, inputs=rms_norm_inputs)
register(
    "fused_add_rms_norm",
    ref=fused_add_rms_norm_ref,
    fake=fused_add_rms_norm_fake,
    inputs=fused_add_rms_norm_inputs,
)
register(
    "fused_add_rms_norm_",
    ref=fused_add_rms_norm__ref,
    fake=fused_add_rms_norm__fake,
    inputs=fused_add_rms_norm__inputs,
)
