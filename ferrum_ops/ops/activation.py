"""Gated activations: SiLU(gate) * up, of one tensor holding both halves or of two, and GELU(gate) * up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ferrum_ops._checks import check_activation, check_rows, check_rows_apart, check_shape, compute_dtype, expect
from ferrum_ops._library import differentiable, needs_grad, refuse_grad, register


def silu_mul(gate_up: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """`silu(gate) * up` with `silu(g) = g / (1 + exp(-g))`: the gated unit of SwiGLU (arXiv:2002.05202).

    Evaluated in float32 and rounded once to the input's dtype. Both inputs have gradients.

    Args:
        gate_up: `[..., 2I]` with the gate in the first half of every row, or `[..., I]`, the gate alone, when `up` is
            given. float32, float16 or bfloat16; rows contiguous with one row stride.
        up: `[..., I]` of the gate's shape and dtype.

    Returns:
        Contiguous `[..., I]` of the input's dtype.

    Raises:
        RuntimeError: other dtypes, shapes or strides.
    """
    if needs_grad(gate_up, up):
        return _differentiable_silu_mul(gate_up) if up is None else _differentiable_silu_mul_gate_up(gate_up, up)
    return torch.ops.ferrum.silu_mul(gate_up) if up is None else torch.ops.ferrum.silu_mul.gate_up(gate_up, up)


def _halves_size(op: str, gate_up: torch.Tensor) -> int:
    check_activation(op, "gate_up", gate_up)
    check_rows(op, "gate_up", gate_up)
    expect(gate_up.shape[-1] % 2 == 0, op, "gate_up", "an even last dimension", gate_up.shape[-1])
    return gate_up.shape[-1] // 2


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    compute = compute_dtype(gate.dtype)
    gated = torch.nn.functional.silu(gate.to(compute)) * up.to(compute)
    return gated.to(gate.dtype).contiguous()


def silu_mul_ref(gate_up: torch.Tensor) -> torch.Tensor:
    size = _halves_size("silu_mul", gate_up)
    return _gated(gate_up[..., :size], gate_up[..., size:])


def _silu_mul_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    compute = compute_dtype(gate.dtype)
    grad, gate, up = grad.to(compute), gate.to(compute), up.to(compute)
    sigmoid = torch.sigmoid(gate)
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid


def silu_mul_backward(
    needs: Sequence[bool], grads: Sequence[torch.Tensor], gate_up: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    return (torch.cat(_silu_mul_backward(grads[0], *gate_up.chunk(2, -1)), -1).to(gate_up.dtype),)


def silu_mul_gate_up_backward(
    needs: Sequence[bool], grads: Sequence[torch.Tensor], gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    grad_gate, grad_up = _silu_mul_backward(grads[0], gate, up)
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype)


_differentiable_silu_mul = differentiable(torch.ops.ferrum.silu_mul.default, silu_mul_backward)
_differentiable_silu_mul_gate_up = differentiable(torch.ops.ferrum.silu_mul.gate_up, silu_mul_gate_up_backward)


def silu_mul_fake(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], _halves_size("silu_mul", gate_up)))


def silu_mul_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape in ((0, 8), (1, 1536), (3, 126), (2, 3, 200), (5, 254), (2,), (4, 2)):
        yield (torch.randn(*shape, device=device).to(dtype),)
    yield ((40 * torch.randn(4, 200, device=device)).to(dtype),)  # both saturated ends
    yield (torch.randn(6, 300, device=device).to(dtype)[:, 20:274],)


def _check_gate_up(gate: torch.Tensor, up: torch.Tensor) -> None:
    op = "silu_mul"
    check_activation(op, "gate", gate)
    check_rows(op, "gate", gate)
    expect(up.dtype == gate.dtype, op, "up", str(gate.dtype), up.dtype)
    check_shape(op, "up", up, tuple(gate.shape))
    check_rows(op, "up", up)


def silu_mul_gate_up_ref(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    _check_gate_up(gate, up)
    return _gated(gate, up)


def silu_mul_gate_up_fake(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    _check_gate_up(gate, up)
    return gate.new_empty(gate.shape)


def silu_mul_gate_up_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape in ((0, 8), (1, 768), (3, 63), (2, 3, 100), (5, 127), (1,)):
        yield torch.randn(*shape, device=device).to(dtype), torch.randn(*shape, device=device).to(dtype)
    gate_up = torch.randn(6, 300, device=device).to(dtype)
    yield gate_up[:, :150], gate_up[:, 150:]


def silu_mul_out(gate_up: torch.Tensor, in_row: int, out: torch.Tensor, out_row: int, rows: int) -> None:
    """`silu_mul` of rows `[in_row, in_row + rows)` of `gate_up` into rows `[out_row, out_row + rows)` of `out`.

    Args:
        gate_up: `[R, 2I]`, gate first; float32, float16 or bfloat16; rows contiguous, any row stride.
        out: `[S, I]` of the same dtype; rows contiguous and apart from each other. Its other rows are left alone.
        in_row, out_row, rows: row numbers and a count; all inside the tensors.

    Raises:
        RuntimeError: other dtypes, shapes or strides, rows outside a tensor, or an input that requires grad while
            autograd is on.
    """
    refuse_grad("silu_mul_out", gate_up, out)
    torch.ops.ferrum.silu_mul_out(gate_up, in_row, out, out_row, rows)


def _check_out(gate_up: torch.Tensor, in_row: int, out: torch.Tensor, out_row: int, rows: int) -> int:
    op = "silu_mul_out"
    expect(gate_up.dim() == 2, op, "gate_up", "2 dimensions", gate_up.dim())
    size = _halves_size(op, gate_up)
    expect(out.dtype == gate_up.dtype, op, "out", str(gate_up.dtype), out.dtype)
    expect(out.dim() == 2 and out.shape[1] == size, op, "out", f"shape (*, {size})", tuple(out.shape))
    check_rows(op, "out", out)
    check_rows_apart(op, "out", out)
    expect(rows >= 0, op, "rows", "at least 0", rows)
    for name, first, count in (("in_row", in_row, gate_up.shape[0]), ("out_row", out_row, out.shape[0])):
        expect(first >= 0 and first + rows <= count, op, name, f"0 <= {name} and {name} + {rows} <= {count}", first)
    return size


def silu_mul_out_ref(gate_up: torch.Tensor, in_row: int, out: torch.Tensor, out_row: int, rows: int) -> None:
    size = _check_out(gate_up, in_row, out, out_row, rows)
    source = gate_up[in_row : in_row + rows]
    out[out_row : out_row + rows].copy_(_gated(source[:, :size], source[:, size:]))


def silu_mul_out_fake(gate_up: torch.Tensor, in_row: int, out: torch.Tensor, out_row: int, rows: int) -> None:
    _check_out(gate_up, in_row, out, out_row, rows)


def silu_mul_out_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    yield randn(0, 8), 0, randn(3, 4), 1, 0
    yield randn(1, 1536), 0, randn(1, 768), 0, 1
    yield randn(10, 126), 2, randn(12, 63), 7, 5
    yield randn(5, 300)[:, 7:261], 1, randn(4, 200)[:, 10:137], 0, 4


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) * up` with `gelu(g) = g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))) / 2` (arXiv:2002.05202).

    The tanh form of GELU (arXiv:1606.08415, section 2), evaluated in float32 and rounded once to the input's dtype. The
    input has a gradient.

    Args:
        gate_up: `[..., 2I]` with the gate in the first half of every row; float32, float16 or bfloat16; rows contiguous
            with one row stride.

    Returns:
        Contiguous `[..., I]` of the input's dtype.

    Raises:
        RuntimeError: other dtypes, shapes or strides.
    """
    if needs_grad(gate_up):
        return _differentiable_gelu_tanh_mul(gate_up)
    return torch.ops.ferrum.gelu_tanh_mul(gate_up)


def gelu_tanh_mul_ref(gate_up: torch.Tensor) -> torch.Tensor:
    size = _halves_size("gelu_tanh_mul", gate_up)
    compute = compute_dtype(gate_up.dtype)
    gate, up = gate_up[..., :size].to(compute), gate_up[..., size:].to(compute)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(gate_up.dtype).contiguous()


def gelu_tanh_mul_backward(
    needs: Sequence[bool], grads: Sequence[torch.Tensor], gate_up: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    compute = compute_dtype(gate_up.dtype)
    grad, (gate, up) = grads[0].to(compute), gate_up.to(compute).chunk(2, -1)
    grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
    grad_up = grad * torch.nn.functional.gelu(gate, approximate="tanh")
    return (torch.cat((grad_gate, grad_up), -1).to(gate_up.dtype),)


_differentiable_gelu_tanh_mul = differentiable(torch.ops.ferrum.gelu_tanh_mul, gelu_tanh_mul_backward)


def gelu_tanh_mul_fake(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], _halves_size("gelu_tanh_mul", gate_up)))


register("silu_mul", ref=silu_mul_ref, fake=silu_mul_fake, inputs=silu_mul_inputs)
register("silu_mul.gate_up", ref=silu_mul_gate_up_ref, fake=silu_mul_gate_up_fake, inputs=silu_mul_gate_up_inputs)
register("silu_mul_out", ref=silu_mul_out_ref, fake=silu_mul_out_fake, inputs=silu_mul_out_inputs)
register("gelu_tanh_mul", ref=gelu_tanh_mul_ref, fake=gelu_tanh_mul_fake, inputs=silu_mul_inputs)
