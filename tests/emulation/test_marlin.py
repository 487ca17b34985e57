"""The kernel of marlin_gemm in every instance that its configuration can pick, and at the edges of what it is given."""

import pytest
import torch

import ferrum_ops
from ferrum_ops.formats import marlin
from ferrum_ops.ops.marlin import random_marlin
from ferrum_ops.testing.compare import assert_close, relative_error, tolerance
from tests.ops.test_marlin import REFUSED_PRODUCTS, good_product, projection

DTYPES = (torch.float16, torch.bfloat16)
COUNTERS = 64


def product(kernel, x, tensors, group_size, bits=4, bias=None, out_features=None, *, counters=0, options=("fp32", 0)):
    """The product of the kernel and of its reference in float64; the workspace must be left zero."""
    columns = tensors[0].shape[-1] * 2 // bits if out_features is None else out_features
    workspace = torch.zeros(counters, dtype=torch.int32)
    args = (*tensors, bias, workspace, columns, group_size, bits, *options)
    out, left = kernel("marlin_gemm", x, *args)
    assert (left == 0).all()
    return out, ferrum_ops.OPS["marlin_gemm"].ref(x.double(), *args)


def check(kernel, x, *args, **kwargs):
    out, expected = product(kernel, x, *args, **kwargs)
    assert out.is_contiguous() and out.dtype == x.dtype
    assert_close("marlin_gemm", out, expected, tolerance("marlin_gemm", x.dtype))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 65])
def test_every_tile(kernel, tokens, bits, dtype):
    """Tiles of 8, 16, 32 and 64 tokens; 5 units of columns fill no tile of 2 or 4; K ends within a stage."""
    tensors = random_marlin(208, 320, 32, bits, "cpu", asymmetric=True)
    check(kernel, torch.randn(tokens, 208).to(dtype), tensors, 32, bits, torch.randn(320))


@pytest.mark.parametrize("tokens, dtype", [(3, torch.float16), (40, torch.bfloat16)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 48, 64, 128])
def test_groups(kernel, group_size, asymmetric, bits, tokens, dtype):
    tensors = random_marlin(272, 64, group_size, bits, "cpu", asymmetric=asymmetric)
    check(kernel, torch.randn(tokens, 272).to(dtype), tensors, group_size, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 48])
def test_act_order_with_uneven_groups(kernel, group_size, bits):
    weight, tensors, size = projection(144, 128, group_size, bits, True, True)
    x = torch.randn(9, 144).half()
    out = check(kernel, x, tensors, size, bits)
    assert_close("marlin_gemm", out, x.double() @ weight, tolerance("marlin_gemm", torch.float16))


def test_perm_entries_that_are_no_column_are_padding(kernel):
    """They are refused where the host can see them, and read nothing where it cannot."""
    packed, scales, zeros, _ = random_marlin(48, 64, 16, 4, "cpu")
    perm = torch.randperm(48).int()
    bad = perm.clone()
    bad[::5] = torch.tensor([-1, -(2**31), 48, 2**31 - 1] * 3)[:10].int()
    x = torch.randn(4, 48).half()
    args = (None, torch.zeros(0, dtype=torch.int32), 64, 16, 4, "fp32", 0)
    out = kernel("marlin_gemm", x, packed, scales, zeros, bad, *args)[0]
    padded = torch.where((bad >= 0) & (bad < 48), bad, -1)
    expected = ferrum_ops.OPS["marlin_gemm"].ref(x.double(), packed, scales, zeros, padded, *args)
    assert_close("marlin_gemm", out, expected, tolerance("marlin_gemm", torch.float16))


@pytest.mark.parametrize("tokens", [2, 12, 30, 50])
@pytest.mark.parametrize("reduction", ["fp32", "rounded", "atomic"])
def test_split_k(kernel, reduction, tokens):
    """Several blocks share a tile; the four multiprocessors of the emulator ask for 2 to 12."""
    tensors = random_marlin(1040, 64, 128, 4, "cpu", asymmetric=True)
    bound = 2e-3 if reduction == "rounded" else tolerance("marlin_gemm", torch.float16)
    x = torch.randn(tokens, 1040).half()
    out, expected = product(kernel, x, tensors, 128, counters=COUNTERS, options=(reduction, 0))
    assert_close("marlin_gemm", out, expected, bound)


def test_splits_are_of_one_group_too(kernel):
    tensors = random_marlin(768, 128, -1, 8, "cpu", asymmetric=True)
    check(kernel, torch.randn(5, 768).bfloat16(), tensors, -1, 8, torch.randn(128), counters=COUNTERS)


def test_reductions_differ(emulated):
    """In what they say: the order of blocks shows in "atomic" and in no other, and "rounded" rounds on the way."""
    tensors, x = random_marlin(1024, 64, 64, 4, "cpu"), torch.randn(7, 1024).half()
    results = {}
    for reduction in ("fp32", "rounded", "atomic"):
        workspace = torch.zeros(COUNTERS, dtype=torch.int32)
        args = (x, *tensors, None, workspace, 64, 64, 4, reduction, 0)
        expected = ferrum_ops.OPS["marlin_gemm"].ref(x.double(), *args[1:])
        outs = []
        for schedule in ("forward", "reverse", "random"):
            with emulated.schedule(schedule, seed=5):
                outs.append(emulated.op("marlin_gemm")(*args))
        results[reduction] = relative_error(outs[0], expected)
        assert reduction == "atomic" or all(torch.equal(outs[0], o) for o in outs[1:])
    assert results["rounded"] > 1.2 * results["fp32"] and results["atomic"] < 1.1 * results["fp32"]


def test_one_block_walks_over_all_tiles(kernel):
    """Rows, stages and sums of a tile take the place of the last one's."""
    tensors = random_marlin(192, 448, 64, 4, "cpu")
    for tokens in (5, 50):
        check(kernel, torch.randn(tokens, 192).half(), tensors, 64, options=("fp32", 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_scales_and_bias_of_any_dtype(kernel, group_size, dtype):
    packed, scales, zeros, perm = random_marlin(96, 128, group_size, 4, "cpu", asymmetric=True)
    tensors = (packed, scales.to(dtype), zeros, perm)
    check(kernel, torch.randn(6, 96).half(), tensors, group_size, 4, torch.randn(128).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_beyond_the_range_of_activations(kernel, dtype):
    """(code - zero) * scale overflows float16 here and underflows it there; the products do neither."""
    packed, _, zeros, perm = random_marlin(64, 64, 32, 4, "cpu", asymmetric=True)
    for scale, size in ((60000.0, 1e-4), (1e-9, 1e4)):
        scales = torch.full((2, 64), scale)
        check(kernel, (torch.randn(3, 64) * size).to(dtype), (packed, scales, zeros, perm), 32)


def test_weights_are_not_rounded(kernel):
    """One non-zero activation a row picks single weights: the result is code - zero times the scale, rounded once."""
    tensors = random_marlin(64, 64, 32, 8, "cpu", asymmetric=True)
    weight = marlin.dequantize(*tensors[:3], 32, 8)
    out = product(kernel, torch.eye(64).bfloat16(), tensors, 32, 8)[0]
    assert torch.equal(out, weight.bfloat16())


@pytest.mark.parametrize("out_features", [1, 31, 50, 64, 65, 127])
def test_padding_at_load(kernel, out_features):
    """K and N of any size: what lies behind them is neither read nor written."""
    tensors = random_marlin(112, 128, 32, 4, "cpu")
    for columns in (100, 97, 104):
        x = torch.randn(3, columns).half()
        check(kernel, x, tensors, 32, 4, torch.randn(out_features), out_features)


def test_an_x_without_columns(kernel):
    """All packed rows are padding then, as the perm says."""
    packed, scales, zeros, _ = random_marlin(48, 64, 16, 4, "cpu")
    tensors = (packed, scales, zeros, torch.full((48,), -1, dtype=torch.int32))
    check(kernel, torch.randn(3, 0).half(), tensors, 16, 4, torch.randn(64))


def test_rows_that_are_not_aligned(kernel):
    tensors = random_marlin(48, 64, 16, 4, "cpu")
    wide = torch.randn(4, 55).half()
    wide[:, 51:] = float("nan")
    for x in (wide[:, 3:51], torch.randn(4, 2, 56).half()[:, 0, :48], torch.randn(2, 3, 48).half(), wide[0, :48]):
        check(kernel, x, tensors, 16)


def test_nothing_behind_k_is_read(kernel):
    x = torch.randn(20, 64).half()
    x[:, 40:] = float("nan")
    check(kernel, x[:, :40], random_marlin(48, 64, 16, 4, "cpu"), 16)


def test_columns_of_a_wider_matrix_and_an_expert_of_a_stack(kernel):
    packed, scales, zeros, perm = random_marlin(96, 320, 32, 8, "cpu", asymmetric=True)
    x = torch.randn(3, 96).half()
    views = (packed[:, 64 * 4 : 192 * 4], scales[:, 64:192], zeros[:, 16:48], None)
    whole, part = check(kernel, x, (packed, scales, zeros, perm), 32, 8), check(kernel, x, views, 32, 8)
    assert torch.equal(whole[:, 64:192], part)
    stack = [torch.stack((torch.full_like(t, 7), t)) for t in (packed, scales, zeros)]
    assert torch.equal(check(kernel, x, (*(t[1] for t in stack), None), 32, 8), whole)


def test_a_token_that_is_not_finite_is_alone(kernel):
    x = torch.randn(11, 64).half()
    x[4, 7], x[9, 0] = float("nan"), float("inf")
    out = product(kernel, x, random_marlin(64, 64, 32, 4, "cpu"), 32)[0]
    assert out[4].isnan().all() and not out[9].isfinite().any()
    assert out[torch.tensor([i not in (4, 9) for i in range(11)])].isfinite().all()


@pytest.mark.parametrize("tokens, in_features, out_features", [(0, 64, 64), (3, 64, 0), (3, 0, 64)])
def test_empty_products(kernel, tokens, in_features, out_features):
    tensors = random_marlin(in_features, 64, -1, 4, "cpu")
    check(kernel, torch.randn(tokens, in_features).half(), tensors, -1, 4, torch.randn(out_features), out_features)


def test_a_token_does_not_depend_on_its_neighbours(emulated):
    """As long as the tile is the same: the sums of a token have one order."""
    tensors, x = random_marlin(128, 64, 64, 4, "cpu"), torch.randn(8, 128).half()
    args = (*tensors, None, torch.zeros(0, dtype=torch.int32), 64, 64, 4, "fp32", 0)
    together = emulated.op("marlin_gemm")(x, *args)
    assert all(torch.equal(emulated.op("marlin_gemm")(x[t : t + 1], *args)[0], together[t]) for t in range(8))


def test_float32_is_refused(emulated):
    args = (*random_marlin(64, 64, 32, 4, "cpu"), None, torch.zeros(0, dtype=torch.int32), 64, 32, 4, "fp32", 0)
    with pytest.raises(RuntimeError, match=r"\[marlin_gemm\] x: expected float16 or bfloat16 \(..., K\), got Float"):
        emulated.op("marlin_gemm")(torch.randn(3, 64), *args)


REFUSED = [
    *((change, message) for change, message in REFUSED_PRODUCTS if not {"x"} & change.keys()),
    ({"x": torch.tensor(1.0).half()}, r"x: expected float16 or bfloat16 \(..., K\)"),
    ({"perm": None, "x": torch.zeros(3, 1000).half()}, r"x: expected floating \(..., K\), K from 0 to"),
    ({"x": torch.zeros(64, 3).half().T}, "x: expected a contiguous last dimension"),
    ({"group_size": 8}, "group_size: expected -1 or a multiple of 16, got 8"),
    ({"packed": torch.zeros(4 * 128 + 2, dtype=torch.int32)[2:].view(4, 128)}, "packed: expected rows aligned to 16"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_bad_input_is_named(emulated, change, message):
    arguments = {**good_product(), "x": torch.randn(3, 64).half(), "reduction": "fp32", "max_sms": 0, **change}
    with pytest.raises(RuntimeError, match=r"\[marlin_gemm\] " + message):
        emulated.op("marlin_gemm")(**arguments)
