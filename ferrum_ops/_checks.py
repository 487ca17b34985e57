"""Argument checks of the references and fakes, with the messages of the compiled kernels."""

from __future__ import annotations

import torch

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


def check_rows_apart(op: str, argument: str, t: torch.Tensor) -> None:
    """No element of the rows `t` (see `check_rows`) is written twice."""
    strides = [stride for size, stride in zip(t.shape[:-1], t.stride()[:-1]) if size > 1]
    apart = t.numel() == 0 or all(stride >= t.shape[-1] for stride in strides)
    expect(apart, op, argument, "rows that do not overlap", f"strides {tuple(t.stride())}")
