"""RMS normalisation of rows, alone and fused with the residual addition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ferrum_ops._library import differentiable, needs_grad, refuse_grad, register

#: What the kernels take; the references also take float64, in which they are the oracle of the tests.
ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expect(condition: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raise RuntimeError "[op] argument: expected ..., got ..." as the compiled kernels do."""
    if not condition:
        raise RuntimeError(f"[{op}] {argument}: expected {expected}, got {got}")


def check_activation(op: str, argument: str, t: torch.Tensor) -> None:
    """`t` holds activations: float32, float16 or bfloat16 (float64 for the oracle)."""
    known = t.dtype in ACTIVATION_DTYPES or t.dtype == torch.float64
    expect(known, op, argument, "float32, float16 or bfloat16", t.dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where the formula is evaluated: float32, or float64 for the oracle."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float32(op: str, argument: str, t: torch.Tensor, x: torch.Tensor) -> None:
    """`t` is float32 whatever the activations `x` are (or float64 beside a float64 oracle input)."""
    expect(t.dtype in (torch.float32, compute_dtype(x.dtype)), op, argument, "float32", t.dtype)


def check_rows(op: str, argument: str, t: torch.Tensor) -> None:
    """Rows of `t` are contiguous and all leading dimensions collapse into one with a single row stride.

    True of contiguous tensors and of column slices of them, and of every 2-D view whose last stride is 1.
    """
    expect(t.dim() >= 1, op, argument, "at least 1 dimension", t.dim())
    if t.numel() == 0:
        return
    regular = t.shape[-1] == 1 or t.stride(-1) == 1
    outer = None  # the stride that the next outer dimension must have
    for size, stride in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1])):
        if size != 1:
            regular = regular and (outer is None or stride == outer)
            outer = size * stride
    expect(regular, op, argument, "contiguous rows with one row stride", f"strides {tuple(t.stride())}")


def check_shape(op: str, argument: str, t: torch.Tensor, shape: tuple[int, ...]) -> None:
    """`t` has exactly this shape."""
    expect(tuple(t.shape) == tuple(shape), op, argument, f"shape {tuple(shape)}", tuple(t.shape))


def check_weight(op: str, argument: str, weight: torch.Tensor, x: torch.Tensor, size: int) -> None:
    """`weight` is a contiguous vector `[size]` of x's dtype or float32."""
    expect(weight.dtype in (x.dtype, torch.float32), op, argument, f"{x.dtype} or torch.float32", weight.dtype)
    check_shape(op, argument, weight, (size,))
    expect(weight.is_contiguous(), op, argument, "a contiguous tensor", f"strides {tuple(weight.stride())}")


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


def check_rows_apart(op: str, argument: str, t: torch.Tensor) -> None:
    """No element of the rows `t` (see `check_rows`) is written twice."""
    strides = [stride for size, stride in zip(t.shape[:-1], t.stride()[:-1]) if size > 1]
    apart = t.numel() == 0 or all(stride >= t.shape[-1] for stride in strides)
    expect(apart, op, argument, "rows that do not overlap", f"strides {tuple(t.stride())}")


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
