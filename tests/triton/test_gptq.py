"""The Triton kernels for GPTQ words beyond the registry's samples: every configuration, its choice, and bad input."""

import itertools
import random

import pytest
import torch

pytest.importorskip("triton")

import ferrum_ops
from ferrum_ops.formats import gptq as formats
from ferrum_ops.ops.gptq import random_projection
from ferrum_ops.testing.compare import assert_close, tolerance
from ferrum_ops.triton import gptq
from ferrum_ops.triton.gptq_kernels import FROM_G_IDX, ONE_PER_PERIOD, ONE_PER_TILE
from ferrum_ops.triton.launch import Target
from tests.ops.test_gptq import REFUSED, good, good_gemm

H200 = Target(90, 132)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_FIRST = [pytest.param(dtype, marks=[] if dtype == torch.float16 else pytest.mark.slow) for dtype in DTYPES]
GROUPS = {"tile": ONE_PER_TILE.value, "period": ONE_PER_PERIOD.value, "g_idx": FROM_G_IDX.value}


def reference(x, *rest):
    return ferrum_ops.OPS["gptq_gemm"].ref(x.double(), *rest)


def projection(groups, bits, tiles=2, out_features=150, scale_dtype=torch.float16):
    """Tensors and g_idx whose groups are found in the way `groups`; the last tile of K is partly filled."""
    tile = 16 * gptq.codes_per_period(bits)
    in_features = tile * tiles if groups == "tile" else tile * tiles - 32
    count = tiles if groups == "tile" else in_features // 32
    tensors = random_projection(in_features, out_features, count, bits, "cpu", scale_dtype)
    order = torch.randperm(in_features)
    return tensors, (torch.arange(in_features, dtype=torch.int32) // 32)[order] if groups == "g_idx" else None


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("bits", formats.SUPPORTED_BITS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(dtype, groups, bits, rows, interpreter):
    tensors, g_idx = projection(groups, bits)
    bias = torch.randn(150)
    x = torch.randn(rows, tensors[0].shape[0] * 32 // bits).to(dtype)
    with interpreter() as asked:
        out = gptq.gptq_gemm(x, *tensors, g_idx, bias, bits, 1)
    by_row = dtype == torch.float32 or (groups == "period" and bits == 3)
    assert f"groups{GROUPS['g_idx' if by_row else groups]}-" in asked[0]
    assert_close("gptq_gemm", out, reference(x, *tensors, g_idx, bias, bits, 1), tolerance("gptq_gemm", dtype))


@pytest.mark.parametrize("scale_dtype", HALF_FIRST)
def test_one_group_and_a_partly_filled_tile(scale_dtype, interpreter):
    for in_features, bits in itertools.product((96, 160), formats.SUPPORTED_BITS):
        tensors = random_projection(in_features, 33, 1, bits, "cpu", scale_dtype)
        x = torch.randn(2, in_features).half()
        with interpreter():
            out = gptq.gptq_gemm(x, *tensors, None, None, bits, 0)
        assert_close("gptq_gemm", out, reference(x, *tensors, None, None, bits, 0), 1e-3)


@pytest.mark.parametrize("groups", ["tile", *(pytest.param(g, marks=pytest.mark.slow) for g in ("period", "g_idx"))])
def test_splits_of_k_change_only_the_order_of_the_sum(groups, interpreter):
    tensors, g_idx = projection(groups, 4, tiles=5, out_features=130)
    x, bias = torch.randn(3, tensors[0].shape[0] * 8).half(), torch.randn(130)
    expected = reference(x, *tensors, g_idx, bias, 4, 1)
    results = []
    for multiprocessors, launches in ((1, 1), (132, 2), (132, 2)):
        with interpreter(multiprocessors) as asked:
            results.append(gptq.gptq_gemm(x, *tensors, g_idx, bias, 4, 1))
        assert len(asked) == launches
        assert_close("gptq_gemm", results[-1], expected, tolerance("gptq_gemm", x.dtype))
    assert torch.equal(*results[1:])


def test_codes_and_zeros_are_multiplied_exactly(interpreter):
    """Within one group per tile nothing is rounded but the sum: integers come out exact, in bfloat16 too."""
    qweight, qzeros, scales = random_projection(128, 64, 1, 8, "cpu")
    x = torch.randint(-3, 4, (4, 128)).to(torch.bfloat16)
    scales = torch.ones_like(scales)
    exact = reference(x, qweight, qzeros, scales, None, None, 8, 1)
    with interpreter():
        assert torch.equal(gptq.gptq_gemm(x, qweight, qzeros, scales, None, None, 8, 1), exact.to(x.dtype))


@pytest.mark.parametrize("groups", GROUPS)
def test_weights_beyond_float16_and_below_bfloat16_steps(groups, interpreter):
    """Scales near the ends of float16: the weights overflow it, the products with small activations do not."""
    (qweight, qzeros, scales), g_idx = projection(groups, 4, out_features=20)
    scales[:, ::2], scales[:, 1::2] = 6e4, 6e-8
    x = (torch.randn(2, qweight.shape[0] * 8) * 1e-4).half()
    with interpreter():
        out = gptq.gptq_gemm(x.bfloat16(), qweight, qzeros, scales, g_idx, None, 4, 1)
        half = gptq.gptq_gemm(x, qweight, qzeros, scales, g_idx, None, 4, 1)
    expected = reference(x, qweight, qzeros, scales, g_idx, None, 4, 1)
    wide = reference(x.bfloat16(), qweight, qzeros, scales, g_idx, None, 4, 1)
    assert half.isfinite().all()
    for column in (0, 1):
        assert_close("gptq_gemm", out[:, column::2], wide[:, column::2], 8e-3)
    assert_close("gptq_gemm", half[:, ::2], expected[:, ::2], 1e-3)


@pytest.mark.parametrize("groups", GROUPS)
def test_nan_spreads_over_its_row_and_no_further(groups, interpreter):
    tensors, g_idx = projection(groups, 4)
    x = torch.randn(18, tensors[0].shape[0] * 8).half()
    x[3, 100], x[5, 0] = float("nan"), float("inf")
    with interpreter():
        out = gptq.gptq_gemm(x, *tensors, g_idx, None, 4, 1)
    assert out[3].isnan().all() and not out[5].isfinite().any()
    rest = [row for row in range(18) if row not in (3, 5)]
    assert out[rest].isfinite().all()


@pytest.mark.parametrize("group", [-1, 4, 2**31 - 1])
def test_rows_of_unknown_groups_are_nan_and_read_nothing(group, interpreter):
    tensors = random_projection(128, 40, 4, 4, "cpu")
    g_idx = torch.arange(128, dtype=torch.int32) // 32
    g_idx[77] = group
    with interpreter():
        weight = gptq.gptq_dequantize(*tensors, g_idx, 4, 1, torch.float16)
        out = gptq.gptq_gemm(torch.randn(2, 128), *tensors, g_idx, None, 4, 1)
    assert weight[77].isnan().all() and weight[:77].isfinite().all() and weight[78:].isfinite().all()
    assert out.isnan().all()


@pytest.mark.parametrize("scale", [float("inf"), pytest.param(float("nan"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("groups", GROUPS)
def test_scales_that_are_not_finite_stay_in_their_column(groups, scale, interpreter):
    tensors, g_idx = projection(groups, 4)
    tensors[2][1, 7] = scale
    x = torch.randn(2, tensors[0].shape[0] * 8)
    with interpreter():
        out = gptq.gptq_gemm(x, *tensors, g_idx, None, 4, 1)
    assert not out[:, 7].isfinite().any()
    assert out[:, :7].isfinite().all() and out[:, 8:].isfinite().all()


def test_dequantised_special_values_and_rounding(interpreter):
    scales = torch.tensor([[float("inf"), float("nan"), 6e4, 1e-7, -3e-8, 65535.0, 65519.9, 1e-9, 0.0]])
    qweight = torch.full((1, 9), 0x13579BDF, dtype=torch.int32)
    qzeros = formats.pack_columns(torch.full((1, 9), 8, dtype=torch.uint8), 4)
    for dtype in DTYPES:
        with interpreter():
            out = gptq.gptq_dequantize(qweight, qzeros, scales, None, 4, 0, dtype)
        expected = ferrum_ops.gptq_dequantize(qweight, qzeros, scales, None, 4, 0, dtype)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF_FIRST)
def test_activations_of_any_strides(dtype, interpreter):
    tensors = random_projection(64, 24, 2, 4, "cpu")
    base = torch.randn(5, 3, 200).to(dtype)
    views = (base[..., 1:65], base[:, 1, 2:66], base[:, :, 10:138:2], base.transpose(0, 1)[..., 4:68], base[0, 0, 3:67])
    for x in views:
        with interpreter():
            out = gptq.gptq_gemm(x, *tensors, None, None, 4, 1)
        assert out.shape == (*x.shape[:-1], 24) and out.is_contiguous()
        assert_close("gptq_gemm", out, reference(x, *tensors, None, None, 4, 1), tolerance("gptq_gemm", dtype))


@pytest.mark.parametrize("change, message", REFUSED)
def test_dequantize_refuses_by_name(change, message):
    if "g_idx: expected values" in message:
        pytest.skip("a device's values are not read: such rows are NaN")
    with pytest.raises((RuntimeError, ValueError), match=r"\[gptq_dequantize\] " + message):
        gptq.gptq_dequantize(**{**good(), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        *(r for r in REFUSED if "dtype" not in r[0] and "expected values" not in r[1]),
        ({"x": torch.zeros(3, 63)}, "x: expected"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "x: expected float32, float16 or bfloat16, got torch.float64"),
        ({"x": torch.tensor(1.0)}, "x: expected"),
        ({"bias": torch.zeros(33)}, "bias: expected"),
        ({"bias": torch.zeros(32, dtype=torch.float64)}, "bias: expected float32, float16 or bfloat16"),
    ],
)
def test_gemm_refuses_by_name(change, message):
    with pytest.raises((RuntimeError, ValueError), match=r"\[gptq_gemm\] " + message):
        gptq.gptq_gemm(**{**good_gemm(), **change})


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_strided_weights_are_refused(name):
    for function, arguments in ((gptq.gptq_gemm, good_gemm()), (gptq.gptq_dequantize, good())):
        arguments[name] = arguments[name].T.contiguous().T
        with pytest.raises(RuntimeError, match=rf"\[{function.__name__}\] {name}: expected a contiguous tensor"):
            function(**arguments)


def pick(rows, in_features, out_features, group_size=128, bits=4, has_g_idx=False, dtype=torch.bfloat16):
    return gptq.pick_gptq_gemm_config(rows, in_features, out_features, bits, group_size, has_g_idx, dtype, H200)


def test_where_the_group_comes_from():
    assert pick(1, 2048, 5120).groups == GROUPS["tile"]
    assert pick(1, 2048, 5120, group_size=2048).groups == GROUPS["tile"]
    assert pick(1, 2048, 5120, group_size=64).groups == GROUPS["period"]
    assert pick(1, 2040, 5120, group_size=12).groups == GROUPS["g_idx"]
    assert pick(1, 2048, 5120, has_g_idx=True).groups == GROUPS["g_idx"]
    assert pick(1, 2048, 5120, dtype=torch.float32).groups == GROUPS["g_idx"]
    assert pick(1, 2048, 5120, bits=3).groups == GROUPS["tile"]
    assert pick(1, 2048, 5120, bits=3, group_size=64).groups == GROUPS["g_idx"]
    assert pick(1, 2048, 5120, bits=8, group_size=64).groups == GROUPS["tile"]
    assert pick(1, 0, 5120, group_size=0).groups == GROUPS["tile"]


def test_few_tiles_are_split_until_they_fill_the_device():
    assert pick(1, 2048, 5120).splits == 8  # 40 tiles of columns, 16 of K
    assert pick(1, 2048, 151936).splits == 1
    assert pick(4096, 2048, 5120).splits == 1
    assert pick(64, 4096, 2048).splits == 16
    assert pick(1, 128, 64).splits == 1
    assert pick(1, 0, 64, group_size=0).splits == 1


def test_every_split_has_tiles_and_every_choice_is_listed():
    listed = set(gptq.binaries(90))
    generator = random.Random(0)
    for _ in range(500):
        bits, dtype = generator.choice(formats.SUPPORTED_BITS), generator.choice(DTYPES)
        groups = generator.randrange(1, 20)
        group_size = 32 * generator.choice((1, 2, 4, 8, 16, 40))
        rows, out_features = generator.randrange(1, 5000), generator.randrange(1, 20000)
        config = pick(rows, groups * group_size, out_features, group_size, bits, generator.random() < 0.3, dtype)
        assert gptq._gemm_binary(config, bits, dtype) in listed
        tiles = -(-groups * group_size // (16 * gptq.codes_per_period(bits)))
        each = -(-tiles // config.splits)
        assert 1 <= config.splits <= gptq.MAX_SPLITS and (config.splits - 1) * each < tiles
