"""int4_pack, int4_unpack, int4_linear and int8_linear on every instruction level."""

import pytest
import torch

import ferrum_ops
from ferrum_ops.formats import gptq, int4, int8
from ferrum_ops.ops.int4 import int4_linear_ref, int8_linear_ref, random_int8_matrix, random_matrix
from ferrum_ops.testing.compare import assert_close, relative_error

# Rounding activations to int8 is an error of at most half a step of max|x|/127 each: about 0.5 % for normal data.
INT8_ERROR = 1e-2
# Rows on both sides of every kernel's blocks: single rows, full and partial blocks, several panel buffers.
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 49, 100)


def linear(x, matrix, out_features, group_size, activation, bias=None):
    return ferrum_ops.int4_linear(x, *matrix, bias, out_features, group_size, activation)


def oracle(x, matrix, out_features, group_size):
    return x.double() @ int4.dequantize(*matrix, x.shape[-1], out_features, group_size)


@pytest.mark.parametrize("activation, bound", [("full", 2e-6), ("int8", INT8_ERROR)])
@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act_order"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize(
    "in_features, out_features, group_size",
    [(256, 64, 128), (200, 40, 64), (136, 17, 32), (72, 100, 8), (1000, 80, 128), (96, 48, 40)],
)
def test_equals_dequantised_product(
    isa, in_features, out_features, group_size, asymmetric, act_order, activation, bound
):
    matrix = random_matrix(in_features, out_features, group_size, asymmetric=asymmetric, act_order=act_order)
    for rows in (1, 7):
        x = torch.randn(rows, in_features)
        out = linear(x, matrix, out_features, group_size, activation)
        assert_close("int4_linear", out, oracle(x, matrix, out_features, group_size), bound)


@pytest.mark.parametrize("group_size", [-1, 256, 512])
def test_large_groups_after_split(isa, group_size):
    in_features, out_features = 520, 32
    codes = torch.randint(0, 16, (in_features, out_features), dtype=torch.uint8)
    size = in_features if group_size == -1 else group_size
    scales = torch.rand(-(-in_features // size), out_features).half()
    weight = (codes.double() - 8) * scales.double()[torch.arange(in_features) // size]
    new_scales, _, kernel_size = int4.split_groups(scales, None, group_size, in_features)
    packed = ferrum_ops.int4_pack(gptq.pack_rows(codes, 4), None, in_features)
    x = torch.randn(3, in_features)
    out = linear(x, (packed, int4.pack_groups(new_scales), None, None), out_features, kernel_size, "full")
    assert_close("int4_linear", out, x.double() @ weight, 2e-6)


@pytest.mark.parametrize("zero", [0, 16])
def test_extreme_zero_points(isa, zero):
    packed, scales, _, _ = random_matrix(128, 32, 32)
    matrix = (packed, scales, torch.full_like(scales, zero, dtype=torch.uint8), None)
    x = torch.randn(5, 128)
    for activation, bound in (("full", 4e-6), ("int8", INT8_ERROR)):
        assert_close("int4_linear", linear(x, matrix, 32, 32, activation), oracle(x, matrix, 32, 32), bound)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rows", [1, 7, 20])
def test_largest_products_do_not_overflow(isa, rows, sign):
    """Every code 15 and every activation at its largest: the sums that 16-bit and 32-bit accumulators must hold."""
    packed = torch.full((2, 32, 64), 255, dtype=torch.uint8)
    matrix = (packed, torch.ones(2, 2, 16).half(), torch.zeros(2, 2, 16, dtype=torch.uint8), None)
    out = linear(torch.full((rows, 256), sign), matrix, 32, 128, "int8")
    torch.testing.assert_close(out, torch.full((rows, 32), sign * 15 * 256), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_int8_is_the_reference_bit_for_bit(isa, rows, dtype):
    """The reference computes in float32 what the kernels compute, operation by operation."""
    matrix = random_matrix(200, 150, 64, asymmetric=True, act_order=True)
    x, bias = torch.randn(rows, 200).to(dtype), torch.randn(150).to(dtype)
    out = linear(x, matrix, 150, 64, "int8", bias)
    assert torch.equal(out, int4_linear_ref(x, *matrix, bias, 150, 64, "int8"))


@pytest.mark.parametrize("activation", ["int8", "full"])
def test_a_row_does_not_depend_on_the_batch(isa, activation):
    matrix = random_matrix(264, 200, 128, asymmetric=True)
    x = torch.randn(max(ROWS), 264)
    whole = linear(x, matrix, 200, 128, activation)
    for rows in ROWS:
        assert torch.equal(linear(x[:rows], matrix, 200, 128, activation), whole[:rows])
    assert torch.equal(linear(x[57:58], matrix, 200, 128, activation), whole[57:58])


@pytest.mark.parametrize("activation", ["int8", "full"])
def test_number_of_threads_does_not_matter(isa, activation):
    matrix = random_matrix(512, 1000, 128)
    x = torch.randn(70, 512)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear(x, matrix, 1000, 128, activation))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_fused_multiply_add_levels_agree_with_full_activations():
    if ferrum_ops.cpu_isa() != "avx512":
        pytest.skip("needs both vector levels")
    matrix = random_matrix(264, 50, 40)
    x = torch.randn(9, 264)
    with ferrum_ops.use_cpu_isa("avx2"):
        narrow = linear(x, matrix, 50, 40, "full")
    assert torch.equal(narrow, linear(x, matrix, 50, 40, "full"))


@pytest.mark.parametrize("activation", ["int8", "full"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_row(isa, activation, bad, dtype):
    matrix = random_matrix(128, 40, 32)
    x = torch.randn(9, 128).to(dtype)
    clean = linear(x, matrix, 40, 32, activation)
    x[4, 77] = bad
    out = linear(x, matrix, 40, 32, activation)
    assert torch.equal(out[:4], clean[:4])
    assert torch.equal(out[5:], clean[5:])
    # With full activations a weight of zero times infinity is NaN and any other weight keeps it: never finite.
    assert (out[4].isnan() if activation == "int8" or bad != bad else ~out[4].isfinite()).all()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1e30])
def test_activations_of_any_magnitude(isa, scale):
    matrix = random_matrix(64, 16, 32)
    x = torch.randn(2, 64) * scale
    out = linear(x, matrix, 16, 32, "int8")
    assert torch.isfinite(out).all()
    if scale >= 1e-20:
        assert relative_error(out, oracle(x, matrix, 16, 32)) < INT8_ERROR


def test_a_zero_row_gives_the_bias(isa):
    matrix = random_matrix(64, 16, 32, asymmetric=True)
    bias = torch.randn(16)
    for activation in ("int8", "full"):
        assert torch.equal(linear(torch.zeros(2, 64), matrix, 16, 32, activation, bias), bias.expand(2, 16))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (2, 3, 64), (64,)])
def test_leading_dimensions(isa, shape):
    matrix = random_matrix(64, 20, 32)
    x = torch.randn(shape)
    out = linear(x, matrix, 20, 32, "int8")
    assert out.shape == (*shape[:-1], 20)
    assert torch.equal(out.reshape(-1, 20), linear(x.reshape(-1, 64), matrix, 20, 32, "int8"))


@pytest.mark.parametrize("in_features, out_features", [(8, 1), (5, 3), (72, 17), (1024, 48), (2000, 300)])
def test_pack_equals_reference_and_unpack_inverts(in_features, out_features):
    codes = torch.randint(0, 16, (in_features + -in_features % 8, out_features), dtype=torch.uint8)
    codes[in_features:] = 0
    qweight = gptq.pack_rows(codes, 4)
    perm = torch.randperm(in_features).to(torch.int32)
    padded = torch.cat([perm, torch.full((8 + -in_features % 8,), -1, dtype=torch.int32)])
    for order in (None, padded):
        packed = ferrum_ops.int4_pack(qweight, order, in_features)
        assert torch.equal(packed, int4.pack(qweight, order, in_features))
        assert torch.equal(ferrum_ops.int4_unpack(packed, order, in_features, out_features), qweight)


def test_pack_ignores_what_lies_behind_the_last_channel():
    qweight = torch.full((1, 3), -1, dtype=torch.int32)
    packed = ferrum_ops.int4_pack(qweight, None, 5)
    assert torch.equal(packed, int4.pack(qweight, None, 5))
    assert torch.equal(ferrum_ops.int4_unpack(packed, None, 5, 3), torch.full((1, 3), 0xFFFFF, dtype=torch.int32))


def good():
    packed, scales, zeros, _ = random_matrix(64, 20, 32, asymmetric=True)
    perm = torch.arange(64, dtype=torch.int32)
    return {
        "x": torch.randn(3, 64),
        "packed": packed,
        "scales": scales,
        "zeros": zeros,
        "perm": perm,
        "bias": torch.randn(20),
        "out_features": 20,
        "group_size": 32,
        "activation": "int8",
    }


def out_of_range(value):
    perm = torch.arange(64, dtype=torch.int32)
    perm[10] = value
    return perm


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("x", torch.zeros(3, 64, dtype=torch.float64), "expected float32, float16 or bfloat16, got Double"),
        ("x", torch.zeros(64, 3).T, "expected a contiguous tensor"),
        ("x", torch.zeros(()), "expected at least 1 dimension"),
        ("x", torch.zeros(3, 0), "expected at least 1 input channel"),
        ("packed", torch.zeros(2, 8, 64), "expected Byte, got Float"),
        ("packed", torch.zeros(2, 9, 64, dtype=torch.uint8), r"expected shape \(2, 8, 64\), got \(2, 9, 64\)"),
        ("packed", torch.zeros(2, 8, 128, dtype=torch.uint8)[..., ::2], "expected a contiguous tensor"),
        ("scales", torch.zeros(2, 2, 16), "expected Half, got Float"),
        ("scales", torch.zeros(2, 3, 16).half(), r"expected shape \(2, 2, 16\), got \(2, 3, 16\)"),
        ("zeros", torch.zeros(2, 2, 16, dtype=torch.int32), "expected Byte, got Int"),
        ("zeros", torch.zeros(2, 1, 16, dtype=torch.uint8), r"expected shape \(2, 2, 16\), got \(2, 1, 16\)"),
        ("perm", torch.arange(64), "expected Int, got Long"),
        ("perm", torch.arange(60, dtype=torch.int32), r"expected shape \(K_packed\), a multiple of 8, got \(60\)"),
        ("perm", out_of_range(64), "expected entries from -1 to 63"),
        ("perm", out_of_range(-2), "expected entries from -1 to 63"),
        ("bias", torch.zeros(21), r"expected shape \(20\), got \(21\)"),
        ("bias", torch.zeros(20, dtype=torch.int32), "expected float32, float16 or bfloat16, got Int"),
        ("out_features", 0, "expected at least 1, got 0"),
        ("group_size", 256, "expected a multiple of 8 from 8 to 128, got 256"),
        ("group_size", 12, "expected a multiple of 8 from 8 to 128, got 12"),
        ("group_size", 0, "expected a multiple of 8 from 8 to 128, got 0"),
        ("activation", "int4", 'expected "int8" or "full", got "int4"'),
    ],
)
def test_bad_argument_is_named(argument, value, message):
    arguments = good()
    ferrum_ops.int4_linear(*arguments.values())
    arguments[argument] = value
    with pytest.raises(RuntimeError, match=rf"\[int4_linear\] {argument}: {message}"):
        ferrum_ops.int4_linear(*arguments.values())


def test_out_features_must_match_the_tiles():
    arguments = good() | {"out_features": 33, "bias": None}
    with pytest.raises(RuntimeError, match=r"\[int4_linear\] packed: expected shape \(3, 8, 64\), got \(2, 8, 64\)"):
        ferrum_ops.int4_linear(*arguments.values())


INT32 = torch.int32


@pytest.mark.parametrize(
    "qweight, perm, in_features, argument, message",
    [
        (torch.zeros(8, 4), None, 64, "qweight", "expected Int, got Float"),
        (torch.zeros(8, 4, dtype=INT32), None, 72, "qweight", r"expected shape \(9, \*\), got \(8, 4\)"),
        (torch.zeros(4, 8, dtype=INT32).T, None, 64, "qweight", "expected a contiguous tensor"),
        (torch.zeros(8, 0, dtype=INT32), None, 64, "qweight", "expected at least 1 column"),
        (torch.zeros(8, 4, dtype=INT32), None, 0, "in_features", "expected at least 1, got 0"),
        (torch.zeros(8, 4, dtype=INT32), torch.zeros(64), 64, "perm", "expected Int, got Float"),
        (torch.zeros(8, 4, dtype=INT32), torch.zeros(63, dtype=INT32), 64, "perm", r"a multiple of 8, got \(63\)"),
        (torch.zeros(8, 4, dtype=INT32), out_of_range(64), 64, "perm", "expected entries from -1 to 63, got 64 at 10"),
        (torch.zeros(8, 4, dtype=INT32), out_of_range(-2), 64, "perm", "expected entries from -1 to 63, got -2 at 10"),
    ],
)
def test_bad_pack_argument_is_named(qweight, perm, in_features, argument, message):
    with pytest.raises(RuntimeError, match=rf"\[int4_pack\] {argument}: .*{message}"):
        ferrum_ops.int4_pack(qweight, perm, in_features)


@pytest.mark.parametrize(
    "packed, perm, out_features, argument, message",
    [
        (torch.zeros(2, 8, 64), None, 20, "packed", "expected Byte, got Float"),
        (torch.zeros(2, 7, 64, dtype=torch.uint8), None, 20, "packed", r"expected shape \(2, 8, 64\)"),
        (torch.zeros(2, 8, 64, dtype=torch.uint8), None, 0, "out_features", "expected at least 1, got 0"),
        (torch.zeros(2, 8, 64, dtype=torch.uint8), out_of_range(99), 20, "perm", "got 99 at 10"),
    ],
)
def test_bad_unpack_argument_is_named(packed, perm, out_features, argument, message):
    with pytest.raises(RuntimeError, match=rf"\[int4_unpack\] {argument}: .*{message}"):
        ferrum_ops.int4_unpack(packed, perm, 64, out_features)


INT8_SHAPES = [(256, 64, 128), (200, 40, 64), (72, 17, 8), (1000, 80, 128)]


@pytest.mark.parametrize("activation, bound", [("full", 2e-6), ("int8", INT8_ERROR)])
@pytest.mark.parametrize("in_features, out_features, group_size", INT8_SHAPES)
def test_int8_equals_dequantised_product(isa, in_features, out_features, group_size, activation, bound):
    matrix = random_int8_matrix(in_features, out_features, group_size)
    weight = int8.dequantize(*matrix, in_features, out_features, group_size)
    for rows in (1, 2, 9):
        x = torch.randn(rows, in_features)
        out = ferrum_ops.int8_linear(x, *matrix, None, out_features, group_size, activation)
        assert_close("int8_linear", out, x.double() @ weight, bound)


@pytest.mark.parametrize("in_features, out_features, group_size", INT8_SHAPES)
def test_int8_has_the_references_bits_whatever_is_in_the_batch(isa, in_features, out_features, group_size):
    matrix, x = random_int8_matrix(in_features, out_features, group_size), torch.randn(60, in_features)
    out = ferrum_ops.int8_linear(x, *matrix, None, out_features, group_size, "int8")
    assert torch.equal(out, int8_linear_ref(x, *matrix, None, out_features, group_size, "int8"))
    for activation in ("int8", "full"):
        out = ferrum_ops.int8_linear(x, *matrix, None, out_features, group_size, activation)
        for part in (slice(0, 1), slice(3, 5), slice(20, 39)):
            alone = ferrum_ops.int8_linear(x[part], *matrix, None, out_features, group_size, activation)
            assert torch.equal(alone, out[part])


def test_int8_largest_products_are_exact(isa):
    """Every weight and activation at the end of its range: no sum saturates."""
    for code in (0, 255):
        packed = int8.pack(torch.full((128, 16), code, dtype=torch.uint8))
        scales = torch.ones(1, 1, 16, dtype=torch.float16)
        for sign in (1.0, -1.0):
            x = torch.full((3, 128), 127.0 * sign)
            out = ferrum_ops.int8_linear(x, packed, scales, None, 16, 128, "int8")
            assert torch.equal(out, torch.full((3, 16), 128 * 127.0 * sign * (code - 128)))


@pytest.mark.parametrize("in_features, out_features", [(64, 32), (37, 17), (5, 1)])
def test_int8_pack_round_trip(in_features, out_features):
    codes = torch.randint(0, 256, (in_features, out_features)).to(torch.uint8)
    packed = int8.pack(codes)
    assert packed.shape == (-(-out_features // 16), -(-in_features // 8), 128)
    assert torch.equal(int8.unpack(packed, in_features, out_features), codes)
    tile = packed[0].reshape(-1, 2, 16, 4)  # line, half, column, b
    assert tile[0, 0, 0, 3] == codes[3, 0] and tile[0, 1, 0, 0] == codes[4, 0]


def test_int8_rounding_stays_within_half_a_step():
    weight = torch.randn(20, 200)
    weight[3] = 0
    codes, scales = int8.quantize_rtn(weight, 64)
    values = int8.dequantize(int8.pack(codes), int4.pack_groups(scales), 200, 20, 64, torch.float32).T
    steps = scales.float().T.repeat_interleave(64, dim=1)[:, :200]
    assert ((values - weight).abs() <= 0.51 * steps + 1e-12).all()  # float16 scales add a little to the half
    with pytest.raises(ValueError, match=r"\[quantize_rtn\] weight: expected finite values"):
        int8.quantize_rtn(torch.full((2, 8), torch.inf), 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 3)}, r"\[int8_linear\] packed: expected shape \(2, 1, 128\), got \(2, 2, 128\)"),
        ({"packed": torch.ones(2, 2, 64, dtype=torch.uint8)}, r"\[int8_linear\] packed: expected shape \(2, 2, 128\)"),
        ({"scales": torch.ones(2, 2, 16)}, r"\[int8_linear\] scales: expected Half, got Float"),
        ({"bias": torch.ones(16)}, r"\[int8_linear\] bias: expected shape \(17\), got \(16\)"),
        ({"group_size": 12}, r"\[int8_linear\] group_size: expected a multiple of 8 from 8 to 128, got 12"),
        ({"activation": "int4"}, r'\[int8_linear\] activation: expected "int8" or "full", got "int4"'),
    ],
)
def test_int8_linear_errors(change, message):
    packed, scales = random_int8_matrix(16, 17, 8)
    values = {"x": torch.ones(2, 16), "packed": packed, "scales": scales, "bias": None}
    values |= {"out_features": 17, "group_size": 8, "activation": "full"}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ferrum.int8_linear(*(values | change).values())
