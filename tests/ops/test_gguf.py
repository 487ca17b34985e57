"""The ops on GGUF blocks. tests/formats/test_gguf.py compares gguf_dequantize with the Python package gguf."""

import pytest
import torch

import ferrum_ops
from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats import gguf_tiles
from ferrum_ops.formats.gguf import BLOCK_SIZES, QUANTIZED_TYPES, GGMLType
from ferrum_ops.formats.gguf_tiles import TILED
from ferrum_ops.ops.gguf import gguf_linear_ref, random_stack
from ferrum_ops.testing.compare import assert_close, relative_error
from tests.conftest import isa_levels

# Rounding a block of 256 activations to int8 is an error of at most half a step of max|x|/127 each: 0.7 % for normal
# data, of what the weights add up to. Types with mins have sums that cancel, and the error is larger beside them.
INT8_ERROR = 2e-2
# Rows on both sides of the kernels' blocks: straight from the file, every remainder of a panel, several row blocks.
ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 13, 49, 100)

BYTES = torch.zeros(2, 144, dtype=torch.uint8)


@pytest.mark.parametrize(
    "blocks, type, dtype, argument, message",
    [
        (BYTES, 4, torch.float32, "type", "expected a ggml type that ferrum_ops.formats.gguf.GGMLType lists, got 4"),
        (BYTES, -1, torch.float32, "type", "expected a ggml type .*, got -1"),
        (BYTES.float(), GGMLType.Q4_K, torch.float32, "blocks", "expected Byte, got Float"),
        (BYTES[:, :72], GGMLType.Q4_0, torch.float32, "blocks", "expected a contiguous tensor"),
        (torch.tensor(1, dtype=torch.uint8), GGMLType.Q4_0, torch.float32, "blocks", "expected at least 1 dimension"),
        (
            BYTES,
            GGMLType.Q6_K,
            torch.float32,
            "blocks",
            r"rows of a multiple of 210 bytes for Q6_K, got shape \(2, 144\)",
        ),
        (BYTES, GGMLType.Q4_K, torch.int32, "dtype", "expected float32, float16 or bfloat16, got Int"),
    ],
)
def test_bad_dequantize_argument_is_named(blocks, type, dtype, argument, message):
    with pytest.raises(RuntimeError, match=rf"\[gguf_dequantize\] {argument}: .*{message}"):
        ferrum_ops.gguf_dequantize(blocks, type, dtype)


def test_number_of_threads_does_not_matter():
    blocks = formats.random_blocks(GGMLType.Q5_K, 300, 512)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ferrum_ops.gguf_dequantize(blocks, GGMLType.Q5_K, torch.float16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def width_of(type):
    """An in-features that ends inside a chunk of 256 where the type allows it."""
    return 288 if BLOCK_SIZES[type][0] == 32 else 768


@pytest.mark.parametrize("type", QUANTIZED_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("activation, bound", [("full", 2e-6), ("int8", INT8_ERROR)])
def test_linear_equals_dequantised_product(isa, type, activation, bound):
    blocks = formats.random_blocks(type, 50, width_of(type))
    weight = formats.dequantize(blocks, type).double()
    for rows in (1, 7):
        x = torch.randn(rows, width_of(type))
        out = ferrum_ops.gguf_linear(x, [blocks], [type], None, activation)
        # In units of what the products add up to in magnitude, so that cancelling mins do not count as an error.
        size = (x.double().square() @ weight.square().T).sqrt().norm()
        error = (out.double() - x.double() @ weight.T).norm() / size
        assert error < bound


@pytest.mark.parametrize("type", QUANTIZED_TYPES, ids=lambda t: t.name)
def test_int8_has_the_same_bits_on_every_level_and_in_every_batch(type):
    blocks = formats.random_blocks(type, 100, width_of(type))
    x = torch.randn(max(ROWS), width_of(type))
    with ferrum_ops.use_cpu_isa("generic"):
        whole = ferrum_ops.gguf_linear(x, [blocks], [type], None, "int8")
    assert_close("gguf_linear", whole, gguf_linear_ref(x.double(), [blocks], [type], None, "int8"))
    for level in isa_levels():
        with ferrum_ops.use_cpu_isa(level):
            for rows in ROWS:
                assert torch.equal(ferrum_ops.gguf_linear(x[:rows], [blocks], [type], None, "int8"), whole[:rows])
            assert torch.equal(ferrum_ops.gguf_linear(x[57:58], [blocks], [type], None, "int8"), whole[57:58])


@pytest.mark.parametrize("type", QUANTIZED_TYPES, ids=lambda t: t.name)
def test_tiles_are_the_same_weights_and_give_the_same_bits(isa, type):
    blocks = formats.random_blocks(type, 80, 512)
    tiles = ferrum_ops.gguf_pack(blocks, type)
    assert torch.equal(tiles, gguf_tiles.pack(blocks, type))
    weight = formats.dequantize(blocks, type)
    assert torch.equal(gguf_tiles.dequantize(tiles, type), weight)
    assert torch.equal(ferrum_ops.gguf_dequantize(tiles, type + TILED, torch.float32), weight)
    x = torch.randn(max(ROWS), 512)
    for activation in ("int8", "full"):
        whole = ferrum_ops.gguf_linear(x, [blocks], [type], None, activation)
        for rows in (*range(1, 14), 49, 100):
            assert torch.equal(
                ferrum_ops.gguf_linear(x[:rows], [tiles], [type + TILED], None, activation), whole[:rows]
            )


@pytest.mark.parametrize("type", QUANTIZED_TYPES, ids=lambda t: t.name)
def test_any_bits_survive_packing(isa, type):
    """Uniform bits hold every code and scale there is: NaN, infinite, subnormal, negative."""
    blocks = torch.randint(0, 256, (48, formats.row_bytes(type, 512)), dtype=torch.uint8)
    tiles = ferrum_ops.gguf_pack(blocks, type)
    assert torch.equal(tiles, gguf_tiles.pack(blocks, type))
    weight = ferrum_ops.gguf_dequantize(tiles, type + TILED, torch.float32)
    torch.testing.assert_close(weight, formats.dequantize(blocks, type), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ["int8", "full"])
def test_experts_in_tiles_give_the_same_bits(isa, activation):
    types = [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K]
    stacks = [random_stack(t, 6, 256, 256, seed) for seed, t in enumerate(types)]
    tiles = [ferrum_ops.gguf_pack(s, t) for s, t in zip(stacks, types)]
    for tokens in (1, 7, 90):
        x, weights = torch.randn(tokens, 256), torch.rand(tokens, 3)
        ids = torch.rand(tokens, 7).argsort(1)[:, :3].to(torch.int32)
        expected = ferrum_ops.moe_experts_gguf(x, ids, weights, *stacks, types, activation)
        for tiled in ((0, 1, 2), (1,), (0, 2)):
            mixed = [tiles[i] if i in tiled else stacks[i] for i in range(3)]
            mixed_types = [t + TILED * (i in tiled) for i, t in enumerate(types)]
            got = ferrum_ops.moe_experts_gguf(x, ids, weights, *mixed, mixed_types, activation)
            assert torch.equal(got, expected)
        expected = ferrum_ops.gguf_moe_linear(x, stacks[0], types[0], ids, activation)
        got = ferrum_ops.gguf_moe_linear(x, tiles[0], types[0] + TILED, ids, activation)
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "blocks, type, argument, message",
    [
        (BYTES, GGMLType.F16, "type", "expected a quantised ggml type, got F16"),
        (BYTES, GGMLType.Q4_K + TILED, "type", "expected packed rows, got tiles"),
        (
            BYTES,
            GGMLType.Q4_K,
            "blocks",
            r"expected a multiple of 16 rows .* 144 bytes .* for Q4_K, got shape \(2, 144\)",
        ),
        (
            torch.zeros(16, 34, dtype=torch.uint8),
            GGMLType.Q8_0,
            "blocks",
            "expected a multiple of 16 rows .* 272 bytes",
        ),
        (
            torch.zeros(144, dtype=torch.uint8),
            GGMLType.Q4_K,
            "blocks",
            r"expected a multiple of 16 rows .*, got shape \(144\)",
        ),
        (torch.zeros(16, 288, dtype=torch.uint8)[:, ::2], GGMLType.Q4_K, "blocks", "expected a contiguous tensor"),
    ],
)
def test_bad_pack_argument_is_named(blocks, type, argument, message):
    with pytest.raises(RuntimeError, match=rf"\[gguf_pack\] {argument}: {message}"):
        ferrum_ops.gguf_pack(blocks, type)


@pytest.mark.parametrize(
    "blocks, type, argument, message",
    [
        (
            torch.zeros(2, 288, dtype=torch.uint8),
            GGMLType.Q4_K + TILED,
            "blocks",
            r"shape \(\*, 4736\), got \(2, 288\)",
        ),
        (torch.zeros(2, 4736, dtype=torch.uint8), GGMLType.F16 + TILED, "types", "expected a ggml type .*, got 65537"),
        (torch.zeros(2, 4736, dtype=torch.uint8), TILED * 2, "types", "expected a ggml type .*, got 131072"),
    ],
)
def test_bad_tiles_are_named(blocks, type, argument, message):
    with pytest.raises(RuntimeError, match=rf"\[gguf_linear\] {argument}: .*{message}"):
        ferrum_ops.gguf_linear(torch.zeros(3, 512), [blocks], [type], None, "int8")
    with pytest.raises(RuntimeError, match=r"\[gguf_linear\] x: expected a multiple of 256 .* tiles of Q8_0, got 288"):
        ferrum_ops.gguf_linear(torch.zeros(3, 288), [blocks], [GGMLType.Q8_0 + TILED], None, "int8")


@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.Q8_0], ids=lambda t: t.name)
def test_full_does_not_depend_on_the_batch(isa, type):
    blocks = formats.random_blocks(type, 70, 512)
    x = torch.randn(max(ROWS), 512)
    whole = ferrum_ops.gguf_linear(x, [blocks], [type], None, "full")
    for rows in ROWS:
        assert torch.equal(ferrum_ops.gguf_linear(x[:rows], [blocks], [type], None, "full"), whole[:rows])


@pytest.mark.parametrize("activation", ["int8", "full"])
@pytest.mark.parametrize("rows", [1, 9])
def test_matrices_of_several_types_stand_side_by_side(isa, activation, rows):
    parts = [(GGMLType.Q4_K, 130), (GGMLType.Q8_0, 5), (GGMLType.Q6_K, 64)]
    blocks = [formats.random_blocks(type, n, 512, seed=i) for i, (type, n) in enumerate(parts)]
    types = [type for type, _ in parts]
    x, bias = torch.randn(rows, 512), torch.randn(199)
    out = ferrum_ops.gguf_linear(x, blocks, types, bias, activation)
    single = [ferrum_ops.gguf_linear(x, [b], [t], None, activation) for b, t in zip(blocks, types)]
    assert torch.equal(out, torch.cat(single, dim=1) + bias)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("type", QUANTIZED_TYPES, ids=lambda t: t.name)
def test_largest_products_do_not_overflow(isa, type, rows, sign):
    """Bits all set give the largest codes and scales; then every code 0: what 16-bit sums must hold."""
    for byte in (255, 0):
        blocks = formats.random_blocks(type, 20, 512)
        halves = blocks.clone()
        blocks.fill_(byte)
        nbytes = BLOCK_SIZES[type][1]
        at = [0] if type == GGMLType.MXFP4 else list(formats._HALF_FIELDS[type])
        for field in at:
            width = 1 if type == GGMLType.MXFP4 else 2
            view, source = (t.view(-1, nbytes)[:, field : field + width] for t in (blocks, halves))
            view.copy_(source)
        x = torch.full((rows, 512), sign)
        out = ferrum_ops.gguf_linear(x, [blocks], [type], None, "int8")
        expected = x.double() @ formats.dequantize(blocks, type).double().T
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("byte", [0, 255])
@pytest.mark.parametrize("type", QUANTIZED_TYPES, ids=lambda t: t.name)
def test_tiles_take_dot_products_on_either_side_of_16_bits(isa, type, byte):
    """Equal codes times m activations of every magnitude: from some m on, 32 products (or 16) leave an int16."""
    blocks = torch.full((16, formats.row_bytes(type, 512)), byte, dtype=torch.uint8)
    halves = formats.random_blocks(type, 16, 512).view(-1, BLOCK_SIZES[type][1])
    for field in [] if type == GGMLType.MXFP4 else formats._HALF_FIELDS[type]:
        blocks.view(-1, BLOCK_SIZES[type][1])[:, field : field + 2] = halves[:, field : field + 2]
    x = torch.zeros(127, 512)
    x[:, :32] = torch.arange(1.0, 128.0)[:, None]
    x[:, 256:288] = -x[:, :32]
    x[:, 255::256] = 127.0  # codes are the values
    expected = ferrum_ops.gguf_linear(x, [blocks], [type], None, "int8")
    got = ferrum_ops.gguf_linear(x, [ferrum_ops.gguf_pack(blocks, type)], [type + TILED], None, "int8")
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ["int8", "full"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0], ids=lambda t: t.name)
def test_nan_and_infinity_stay_in_their_row(isa, type, activation, bad):
    blocks = formats.random_blocks(type, 40, 512)
    x = torch.randn(9, 512)
    clean = ferrum_ops.gguf_linear(x, [blocks], [type], None, activation)
    x[4, 77] = bad
    out = ferrum_ops.gguf_linear(x, [blocks], [type], None, activation)
    assert torch.equal(out[:4], clean[:4]) and torch.equal(out[5:], clean[5:])
    assert (out[4].isnan() if activation == "int8" or bad != bad else ~out[4].isfinite()).all()


@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_error_of_int8_beside_an_outlier(isa, outlier):
    """One channel a hundred times the rest costs its block of 256 (Q4_K) or of 32 (Q8_0) its resolution."""
    x = torch.randn(16, 2048)
    x[:, 1000] *= outlier
    errors = {}
    for type in (GGMLType.Q8_0, GGMLType.Q6_K):
        blocks = formats.random_blocks(type, 64, 2048)
        expected = x.double() @ formats.dequantize(blocks, type).double().T
        errors[type] = relative_error(ferrum_ops.gguf_linear(x, [blocks], [type], None, "int8"), expected)
    assert errors[GGMLType.Q8_0] < (0.006 if outlier == 1.0 else 0.02)
    assert errors[GGMLType.Q6_K] < (0.01 if outlier == 1.0 else 0.05)


@pytest.mark.parametrize("op", ["linear", "moe_linear", "experts"])
@pytest.mark.parametrize("activation", ["int8", "full"])
def test_number_of_threads_does_not_change_products(op, activation):
    gate, up = (random_stack(GGMLType.Q4_K, 4, 96, 512, seed) for seed in (0, 1))
    down = random_stack(GGMLType.Q8_0, 4, 512, 96, 2)
    x, ids, weights = torch.randn(33, 512), torch.randint(0, 4, (33, 2), dtype=torch.int32), torch.rand(33, 2)
    calls = {
        "linear": lambda: ferrum_ops.gguf_linear(x, [gate[0], up[0]], [GGMLType.Q4_K] * 2, None, activation),
        "moe_linear": lambda: ferrum_ops.gguf_moe_linear(x, gate, GGMLType.Q4_K, ids, activation),
        "experts": lambda: ferrum_ops.moe_experts_gguf(
            x, ids, weights, gate, up, down, [GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q8_0], activation
        ),
    }
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(calls[op]())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("activation", ["int8", "full"])
@pytest.mark.parametrize("per_slot", [False, True], ids=["broadcast", "per slot"])
def test_moe_linear_is_one_linear_per_pair(isa, activation, per_slot):
    blocks = random_stack(GGMLType.Q5_K, 5, 70, 512)
    ids = torch.tensor([[0, 4, 0], [-1, 5, 3], [2, 2, 1], [7, -9, -1]], dtype=torch.int32)
    x = torch.randn(4, 3, 512) if per_slot else torch.randn(4, 512)
    out = ferrum_ops.gguf_moe_linear(x, blocks, GGMLType.Q5_K, ids, activation)
    for token, row in enumerate(ids.tolist()):
        for slot, expert in enumerate(row):
            value = x[token, slot] if per_slot else x[token]
            expected = torch.zeros(70)
            if 0 <= expert < 5:
                expected = ferrum_ops.gguf_linear(value, [blocks[expert]], [GGMLType.Q5_K], None, activation)
            assert torch.equal(out[token, slot], expected)


@pytest.mark.parametrize("activation", ["int8", "full"])
def test_a_token_of_the_block_does_not_depend_on_the_others(isa, activation):
    types = [GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q6_K]
    gate, up, down = (random_stack(t, 6, 256, 256, seed) for seed, t in enumerate(types))
    x, weights = torch.randn(130, 256), torch.rand(130, 3)
    ids = torch.rand(130, 6).argsort(1)[:, :3].to(torch.int32)
    whole = ferrum_ops.moe_experts_gguf(x, ids, weights, gate, up, down, types, activation)
    for part in (slice(0, 1), slice(57, 58), slice(3, 40)):
        alone = ferrum_ops.moe_experts_gguf(x[part], ids[part], weights[part], gate, up, down, types, activation)
        assert torch.equal(alone, whole[part])


def test_chunks_of_tokens_join(isa):
    types = [GGMLType.Q8_0] * 3
    gate, up, down = (random_stack(GGMLType.Q8_0, 2, 32, 32, seed) for seed in range(3))
    x, weights = torch.randn(1030, 32), torch.rand(1030, 1)
    ids = torch.randint(0, 3, (1030, 1), dtype=torch.int32)
    whole = ferrum_ops.moe_experts_gguf(x, ids, weights, gate, up, down, types, "int8")
    last = ferrum_ops.moe_experts_gguf(x[1000:], ids[1000:], weights[1000:], gate, up, down, types, "int8")
    assert torch.equal(whole[1000:], last)
    assert not whole[ids[:, 0] == 2].any() and whole[ids[:, 0] != 2].any(dim=1).all()


def linear_arguments():
    return {
        "x": torch.randn(3, 512),
        "blocks": [formats.random_blocks(GGMLType.Q4_K, 20, 512), formats.random_blocks(GGMLType.Q8_0, 7, 512)],
        "types": [GGMLType.Q4_K, GGMLType.Q8_0],
        "bias": torch.randn(27),
        "activation": "int8",
    }


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("x", torch.zeros(3, 512, dtype=torch.float64), "expected float32, float16 or bfloat16, got Double"),
        ("x", torch.zeros(3, 1024)[:, ::2], "expected a contiguous tensor"),
        ("x", torch.tensor(1.0), "expected at least 1 dimension, got 0"),
        ("x", torch.zeros(3, 500), "expected a multiple of 256 input channels for Q4_K, got 500"),
        ("x", torch.zeros(3, 0), "expected a multiple of 256 input channels for Q4_K, got 0"),
        ("blocks", [], "expected at least 1 tensor, got 0"),
        ("blocks", [torch.zeros(20, 288), torch.zeros(7, 544)], "expected Byte, got Float"),
        ("blocks", [torch.zeros(20, 144, dtype=torch.uint8)] * 2, r"expected shape \(\*, 288\), got \(20, 144\)"),
        ("blocks", [torch.zeros(0, 288, dtype=torch.uint8)] * 2, r"expected at least 1 row, got shape \(0, 288\)"),
        ("types", [GGMLType.Q4_K], "expected one for each of 2 tensors, got 1"),
        ("types", [GGMLType.Q4_K, 5], "expected a ggml type that .* lists, got 5"),
        ("types", [GGMLType.F16, GGMLType.Q8_0], "expected a quantised ggml type, got F16"),
        ("bias", torch.zeros(26), r"expected shape \(27\), got \(26\)"),
        ("bias", torch.zeros(27, dtype=torch.int32), "expected float32, float16 or bfloat16, got Int"),
        ("activation", "int4", 'expected "int8" or "full", got "int4"'),
    ],
)
def test_bad_linear_argument_is_named(argument, value, message):
    arguments = linear_arguments()
    ferrum_ops.gguf_linear(*arguments.values())
    arguments[argument] = value
    with pytest.raises(RuntimeError, match=rf"\[gguf_linear\] {argument}: {message}"):
        ferrum_ops.gguf_linear(*arguments.values())


IDS = torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("x", torch.zeros(512), r"expected 2 dimensions \(for all slots\) or 3, got shape \(512\)"),
        ("x", torch.zeros(3, 3, 512), r"expected 2 slots, got shape \(3, 3, 512\)"),
        ("blocks", torch.zeros(4, 20, 144, dtype=torch.uint8), r"expected shape \(\*, \*, 288\), got \(4, 20, 144\)"),
        ("blocks", torch.zeros(0, 20, 288, dtype=torch.uint8), "expected at least 1 expert and 1 row"),
        ("type", GGMLType.F32, "expected a quantised ggml type, got F32"),
        ("topk_ids", IDS.long(), "expected Int, got Long"),
        ("topk_ids", IDS[:2], r"expected shape \(3, \*\), got \(2, 2\)"),
        ("activation", "half", 'expected "int8" or "full", got "half"'),
    ],
)
def test_bad_moe_linear_argument_is_named(argument, value, message):
    arguments = {
        "x": torch.randn(3, 512),
        "blocks": random_stack(GGMLType.Q4_K, 4, 20, 512),
        "type": GGMLType.Q4_K,
        "topk_ids": IDS,
        "activation": "full",
    }
    ferrum_ops.gguf_moe_linear(*arguments.values())
    arguments[argument] = value
    with pytest.raises(RuntimeError, match=rf"\[gguf_moe_linear\] {argument}: {message}"):
        ferrum_ops.gguf_moe_linear(*arguments.values())


@pytest.mark.parametrize(
    "argument, value, named, message",
    [
        ("hidden", torch.zeros(3, 2, 256), "hidden", r"expected shape \(\*, \*\), got \(3, 2, 256\)"),
        ("hidden", torch.zeros(3, 255), "hidden", "expected a multiple of 256 input channels for Q4_K, got 255"),
        ("topk_ids", IDS[:, :1].expand(3, 2), "topk_ids", "expected a contiguous tensor"),
        ("topk_weights", torch.zeros(3, 1), "topk_weights", r"expected shape \(3, 2\), got \(3, 1\)"),
        ("topk_weights", torch.zeros(3, 2).half(), "topk_weights", "expected Float, got Half"),
        (
            "gate",
            torch.zeros(4, 32, 143, dtype=torch.uint8),
            "gate",
            r"expected shape \(\*, \*, 144\), got \(4, 32, 143\)",
        ),
        ("gate", random_stack(GGMLType.Q4_K, 4, 64, 256), "up", r"expected shape \(4, 64, 144\), got \(4, 32, 144\)"),
        ("up", random_stack(GGMLType.Q4_K, 3, 32, 256), "up", r"expected shape \(4, 32, 144\), got \(3, 32, 144\)"),
        ("down", random_stack(GGMLType.Q8_0, 4, 255, 32), "down", r"expected shape \(4, 256, 34\), got \(4, 255, 34\)"),
        ("types", [GGMLType.Q4_K] * 2, "types", r"expected 3 \(gate, up, down\), got 2"),
        ("types", [GGMLType.Q4_K] * 3, "gate", "expected a multiple of 256 input channels for Q4_K, got 32"),
        ("activation", "", "activation", 'expected "int8" or "full", got ""'),
    ],
)
def test_bad_experts_argument_is_named(argument, value, named, message):
    arguments = {
        "hidden": torch.randn(3, 256),
        "topk_ids": IDS,
        "topk_weights": torch.rand(3, 2),
        "gate": random_stack(GGMLType.Q4_K, 4, 32, 256),
        "up": random_stack(GGMLType.Q4_K, 4, 32, 256),
        "down": random_stack(GGMLType.Q8_0, 4, 256, 32),
        "types": [GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q8_0],
        "activation": "int8",
    }
    ferrum_ops.moe_experts_gguf(*arguments.values())
    arguments[argument] = value
    with pytest.raises(RuntimeError, match=rf"\[moe_experts_gguf\] {named}: {message}"):
        ferrum_ops.moe_experts_gguf(*arguments.values())
