"""Gated activations at the ends of the number range, and what the registry's samples are too small for."""

import pytest
import torch

import ferrum_ops
from ferrum_ops.testing.compare import assert_close, tolerance
from tests.ops.test_activation import BAD, DTYPES

OPS = torch.ops.ferrum
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def every_half(dtype):
    """All 65536 of them."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_gate_of_half_precision(emulated, dtype, name):
    gate = every_half(dtype)
    gate_up = torch.stack((gate, torch.ones_like(gate)), -1)
    got = emulated.op(name)(gate_up)[:, 0]
    expected = ferrum_ops.OPS[name].ref(gate_up.double())[:, 0]
    assert torch.equal(got.isnan(), expected.to(dtype).isnan())
    # Half a unit in the last place, and what is lost before the rounding; 2^-24 or less where the result underflows.
    error, unit = (got.double() - expected).abs(), expected.abs() * torch.finfo(dtype).eps
    finite = expected.abs() <= torch.finfo(dtype).max
    assert (error <= 0.51 * unit + 6e-8)[finite].all()
    assert torch.equal(
        got[~finite & ~expected.isnan()].double(), expected.to(dtype)[~finite & ~expected.isnan()].double()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_its_element_and_no_other(kernel, dtype):
    gate_up = torch.randn(2, 256).to(dtype)
    gate_up[0, 5] = gate_up[0, 128 + 9] = gate_up[1, 127] = torch.nan
    gate_up[1, 3] = -torch.inf
    expected = torch.zeros(2, 128, dtype=torch.bool)
    expected[0, 5] = expected[0, 9] = expected[1, 127] = expected[1, 3] = True
    for name in ("silu_mul", "gelu_tanh_mul"):
        assert torch.equal(kernel(name, gate_up)[0].isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size", [(1, 5000), (3, 4100), (700, 96), (130, 300), (2100, 16), (5, 1)])
def test_rows_of_many_blocks(emulated, rows, size, dtype):
    gate_up = torch.randn(rows, 2 * size).to(dtype)
    got, expected = emulated.op("silu_mul")(gate_up), ferrum_ops.OPS["silu_mul"].ref(gate_up.double())
    assert_close("silu_mul", got, expected, tolerance("silu_mul", dtype))
    assert torch.equal(got, emulated.op("silu_mul.gate_up")(gate_up[:, :size], gate_up[:, size:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_at, up_at, out_at", [(0, 1, 0), (1, 0, 0), (0, 0, 1), (8, 8, 8)])
def test_any_alignment(kernel, gate_at, up_at, out_at, dtype):
    gate, up = (torch.randn(3, 80).to(dtype)[:, at : at + 64] for at in (gate_at, up_at))
    both = torch.cat((gate, up), -1)
    assert torch.equal(kernel("silu_mul.gate_up", gate, up)[0], kernel("silu_mul", both)[0])
    out = torch.zeros(5, 80, dtype=dtype)
    (written,) = kernel("silu_mul_out", both, 1, out[:, out_at : out_at + 64], 2, 2)
    assert torch.equal(written[2:4], kernel("silu_mul", both)[0][1:]) and not written[:2].any() and not written[4].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_have_strides_of_their_own(kernel, dtype):
    gate, up = torch.randn(3, 80).to(dtype)[:, :64], torch.randn(3, 96).to(dtype)[:, 16:80]
    assert torch.equal(kernel("silu_mul.gate_up", gate, up)[0], kernel("silu_mul", torch.cat((gate, up), -1))[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_be_the_gate(emulated, dtype):
    gate_up = torch.randn(9, 256).to(dtype)
    expected, up = emulated.op("silu_mul")(gate_up), gate_up[:, 128:].clone()
    emulated.op("silu_mul_out")(gate_up, 0, gate_up[:, :128], 0, 9)
    assert torch.equal(gate_up[:, :128], expected) and torch.equal(gate_up[:, 128:], up)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(emulated, case):
    op, args, message = BAD[case]
    with pytest.raises(RuntimeError, match=message):
        emulated.op(op)(*args)
