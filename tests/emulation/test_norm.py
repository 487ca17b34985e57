"""Norms of rows longer than a block's registers hold, in place, and with what is not a number."""

import pytest
import torch

import ferrum_ops
from ferrum_ops.testing.compare import assert_close, tolerance
from tests.ops.test_norm import BAD, DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size", [(2, 1), (3, 1031), (2, 8192 + 24), (2, 20000), (5, 33), (300, 16)])
def test_rows_of_any_size(kernel, rows, size, dtype):
    x, residual, weight = torch.randn(rows, size).to(dtype), torch.randn(rows, size).to(dtype), torch.randn(size)
    for name, args in (("rms_norm", (x, weight)), ("fused_add_rms_norm", (x, residual, weight))):
        expected = ferrum_ops.OPS[name].ref(*(a.double() for a in args), 1e-6)
        got = kernel(name, *args, 1e-6)
        for g, e in zip(got, expected if isinstance(expected, tuple) else (expected,)):
            assert_close(name, g, e, tolerance(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 63, 8192 + 24])
def test_in_place_equals_functional(kernel, size, dtype):
    x, residual = torch.randn(3, size + 40).to(dtype)[:, 16 : size + 16], torch.randn(3, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    written = kernel("fused_add_rms_norm_", x, residual, weight, 1e-6)
    functional = kernel("fused_add_rms_norm", x, residual, weight, 1e-6)
    assert torch.equal(written[0], functional[0]) and torch.equal(written[1], functional[1])
    assert torch.equal(written[1], (x.float() + residual.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [0, 100, 127])
def test_nan_makes_its_row_nan_and_no_other(kernel, column, dtype):
    x = torch.randn(9, 128).to(dtype)
    x[4, column] = torch.nan
    nan = kernel("rms_norm", x, torch.ones(128).to(dtype), 1e-6)[0].isnan()
    assert nan[4].all() and nan.sum() == 128


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(emulated, dtype):
    x, weight = torch.randn(50, 256).to(dtype), torch.randn(256).to(dtype)
    together = emulated.op("rms_norm")(x, weight, 1e-6)
    assert all(
        torch.equal(emulated.op("rms_norm")(x[t : t + 1], weight, 1e-6), together[t : t + 1]) for t in (0, 17, 49)
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(emulated, case):
    op, args, message = BAD[case]
    with pytest.raises(RuntimeError, match=message):
        emulated.op(op)(*args)
