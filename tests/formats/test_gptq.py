"""`ferrum_ops.formats.gptq` against bit streams built with Python integers, and against itself: exact
inverses."""

import pytest
import torch

from ferrum_ops.formats import gptq

ALL_BITS = pytest.mark.parametrize("bits", gptq.SUPPORTED_BITS)
FORMATS = pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
UNIT = {2: 16, 3: 32, 4: 8, 8: 4}  # codes until a field starts at bit 0 of a word again


def random_words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def stream(words):
    """The words as one integer, first word lowest."""
    return sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(words))


def words_of(value, count):
    """Inverse of `stream`."""
    unsigned = [(value >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return torch.tensor([w - 2**32 if w >= 2**31 else w for w in unsigned], dtype=torch.int32)


def codes_of(words, bits):
    whole = stream(words)
    return [(whole >> (bits * i)) & (2**bits - 1) for i in range(len(words) * 32 // bits)]


@ALL_BITS
@pytest.mark.parametrize("periods", [0, 1, 3])
def test_rows_are_one_little_endian_bit_stream(bits, periods):
    qweight = random_words(periods * (3 if bits == 3 else 1), 5)
    codes = gptq.unpack_rows(qweight, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (periods * UNIT[bits], 5)
    for n in range(5):
        assert codes[:, n].tolist() == codes_of(qweight[:, n], bits)
    assert torch.equal(gptq.pack_rows(codes, bits), qweight)


@ALL_BITS
def test_columns_are_one_little_endian_bit_stream(bits):
    qzeros = random_words(4, 6)
    codes = gptq.unpack_columns(qzeros, bits, 192 // bits)
    for g in range(4):
        assert codes[g].tolist() == codes_of(qzeros[g], bits)
    assert torch.equal(gptq.pack_columns(codes, bits), qzeros)


@ALL_BITS
def test_stacks_of_experts(bits):
    qweight, qzeros = random_words(2, 3, 6, 8), random_words(2, 3, 4, 6)
    codes, zeros = gptq.unpack_rows(qweight, bits), gptq.unpack_columns(qzeros, bits, 192 // bits)
    assert torch.equal(codes[1, 2], gptq.unpack_rows(qweight[1, 2], bits))
    assert torch.equal(zeros[1, 2], gptq.unpack_columns(qzeros[1, 2], bits, 192 // bits))
    assert torch.equal(gptq.pack_rows(codes, bits), qweight)
    assert torch.equal(gptq.pack_columns(zeros, bits), qzeros)


def test_known_words():
    assert gptq.unpack_rows(torch.tensor([[0x76543210]], dtype=torch.int32), 4).flatten().tolist() == list(range(8))
    three_bit = words_of(sum((i % 8) << (3 * i) for i in range(32)), 3)
    assert [w & 0xFFFFFFFF for w in three_bit.tolist()] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert gptq.unpack_rows(three_bit.view(3, 1), 3).flatten().tolist() == [i % 8 for i in range(32)]


@ALL_BITS
@FORMATS
def test_zeros_round_trip_for_every_word(bits, checkpoint_format):
    qzeros = random_words(64, 6)
    zeros = gptq.decode_zeros(qzeros, bits, 192 // bits, checkpoint_format)
    assert torch.equal(gptq.encode_zeros(zeros, bits, checkpoint_format), qzeros)
    every = torch.randint(0, 2**bits, (64, 96), dtype=torch.uint8)
    qzeros = gptq.encode_zeros(every, bits, checkpoint_format)
    assert torch.equal(gptq.decode_zeros(qzeros, bits, 96, checkpoint_format), every)


@pytest.mark.parametrize("bits, ones", [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_v1_zeros_are_one_subtraction_per_word(bits, ones):
    zeros = torch.randint(0, 2**bits, (16, 32 // bits), dtype=torch.uint8)
    zeros[0] = 0
    zeros[1, 0] = 0
    packed = gptq.encode_zeros(zeros, bits, "gptq")
    for row, word in zip(zeros.tolist(), packed.flatten().tolist()):
        plain = sum(z << (bits * i) for i, z in enumerate(row))
        assert word & 0xFFFFFFFF == (plain - ones) % 2**32


def test_v1_zero_of_zero_borrows_from_its_neighbour():
    word = torch.tensor([[0x7777776F]], dtype=torch.int32)  # zeros 0, 8, 8, ...: 0 - 1 borrowed from the second
    assert gptq.decode_zeros(word, 4, 8, "gptq").tolist() == [[0, 8, 8, 8, 8, 8, 8, 8]]


def test_v1_three_bit_zeros_are_subtracted_field_by_field():
    zeros = torch.arange(32, dtype=torch.uint8).view(1, 32) % 8
    stored = gptq.unpack_columns(gptq.encode_zeros(zeros, 3, "gptq"), 3, 32)
    assert torch.equal(stored, (zeros + 7) % 8)


@ALL_BITS
@FORMATS
def test_symmetric_checkpoints_decode_to_the_middle(bits, checkpoint_format):
    stored = 2 ** (bits - 1) - (checkpoint_format == "gptq")
    words = words_of(sum(stored << (bits * i) for i in range(96 // bits)), 3).view(1, 3)
    assert (gptq.decode_zeros(words, bits, 96 // bits, checkpoint_format) == 2 ** (bits - 1)).all()


@ALL_BITS
def test_columns_that_do_not_fill_the_last_word(bits):
    zeros = torch.randint(0, 2**bits, (3, 45), dtype=torch.uint8)
    for checkpoint_format in gptq.ZERO_OFFSETS:
        qzeros = gptq.encode_zeros(zeros, bits, checkpoint_format)
        assert qzeros.shape == (3, gptq.packed_columns(45, bits))
        assert torch.equal(gptq.decode_zeros(qzeros, bits, 45, checkpoint_format), zeros)


@ALL_BITS
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("g_idx_kind", ["none", "sorted", "shuffled"])
def test_dequantize_equals_a_loop(bits, offset, g_idx_kind):
    in_features, out_features, groups = 64, 32, 4
    qweight = random_words(in_features * bits // 32, out_features)
    zeros = torch.randint(0, 2**bits, (groups, out_features), dtype=torch.uint8)
    qzeros = gptq.encode_zeros(zeros, bits, "gptq" if offset else "gptq_v2")
    scales = torch.rand(groups, out_features).half()
    regular = torch.arange(in_features, dtype=torch.int32) // 16
    g_idx = regular[torch.randperm(in_features)] if g_idx_kind == "shuffled" else regular
    out = gptq.dequantize(qweight, qzeros, scales, None if g_idx_kind == "none" else g_idx, bits, offset)
    codes = [codes_of(qweight[:, n], bits) for n in range(out_features)]
    for k in range(in_features):
        g = int(g_idx[k])
        for n in range(out_features):
            assert out[k, n].item() == (codes[n][k] - int(zeros[g, n])) * scales[g, n].item()


def irregular(counts, shuffle=False):
    g_idx = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts))
    return g_idx[torch.randperm(len(g_idx))] if shuffle else g_idx


@pytest.mark.parametrize("in_features, group_size", [(128, 32), (100, 32), (128, -1), (64, 128), (0, 32), (7, 7)])
def test_regular_g_idx_needs_no_perm(in_features, group_size):
    size = in_features if group_size == -1 else group_size
    g_idx = torch.arange(in_features, dtype=torch.int32) // max(size, 1)
    assert gptq.sort_groups(g_idx, in_features, group_size) is None
    assert torch.equal(gptq.g_idx_from_perm(None, group_size, in_features), g_idx)


@pytest.mark.parametrize(
    "g_idx, group_size, packed",
    [
        pytest.param(irregular([32] * 4, shuffle=True), 32, 32, id="act-order"),
        pytest.param(irregular([32, 32, 32, 4], shuffle=True), 32, 32, id="act-order-short-last-group"),
        pytest.param(irregular([4, 32, 32, 32]), 32, 32, id="sorted-short-first-group"),
        pytest.param(irregular([50, 14, 0, 64]), 32, 64, id="sorted-unequal-and-an-empty-group"),
        pytest.param(irregular([33, 31], shuffle=True), 32, 33, id="unequal-act-order"),
        pytest.param(irregular([32] * 4).flip(0), 32, 32, id="descending"),
    ],
)
@pytest.mark.parametrize("extra", [0, 8])
def test_sort_groups_puts_each_group_in_one_run(g_idx, group_size, packed, extra):
    in_features = len(g_idx)
    groups = gptq.num_groups(in_features, group_size)
    assert gptq.packed_group_size(g_idx, in_features, group_size) == packed
    size = packed + extra
    perm = gptq.sort_groups(g_idx, in_features, group_size, size if extra else None)
    assert perm.dtype == torch.int32 and perm.shape == (groups * size,)
    assert sorted(perm[perm >= 0].tolist()) == list(range(in_features))
    for g, rows in enumerate(perm.view(groups, size).tolist()):
        kept = [r for r in rows if r >= 0]
        assert kept == torch.nonzero(g_idx == g).flatten().tolist()  # in their old order
        assert rows[len(kept) :] == [-1] * (size - len(kept))
    assert torch.equal(gptq.g_idx_from_perm(perm, size, in_features), g_idx)


def test_a_larger_packed_size_pads_a_regular_g_idx():
    g_idx = irregular([20, 20, 10])
    assert gptq.packed_group_size(g_idx, 50, 20, multiple=8) == 24
    perm = gptq.sort_groups(g_idx, 50, 20, 24)
    assert perm.view(3, 24)[:, 20:].eq(-1).all() and perm[24].item() == 20
    assert torch.equal(gptq.g_idx_from_perm(perm, 24, 50), g_idx)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gptq.unpack_rows(random_words(4, 4), 5), r"\[gptq\] bits: expected one of .*, got 5"),
        (
            lambda: gptq.unpack_rows(random_words(4, 4), 3),
            "qweight: expected rows in multiples of 3 for 3 bits, got 4",
        ),
        (lambda: gptq.unpack_rows(random_words(4, 4).long(), 4), "qweight: expected int32"),
        (
            lambda: gptq.pack_rows(torch.full((8, 1), 16, dtype=torch.uint8), 4),
            "codes: expected values below 16, got 16",
        ),
        (
            lambda: gptq.pack_rows(torch.zeros(9, 1, dtype=torch.uint8), 4),
            "codes: expected uint8 rows in multiples of 8",
        ),
        (
            lambda: gptq.unpack_columns(random_words(1, 5), 4, 32),
            "qzeros: expected 4 columns for 32 out-features",
        ),
        (
            lambda: gptq.decode_zeros(random_words(1, 4), 4, 32, "awq"),
            "checkpoint_format: expected one of .*'awq'",
        ),
        (lambda: gptq.sort_groups(torch.zeros(4), 4, 2), "g_idx: expected int32"),
        (lambda: gptq.sort_groups(torch.zeros(5, dtype=torch.int32), 4, 2), "g_idx: expected int32"),
        (
            lambda: gptq.sort_groups(torch.tensor([0, 0, 1, 2], dtype=torch.int32), 4, 2),
            r"in \[0, 2\), got .* \[0, 2\]",
        ),
        (
            lambda: gptq.sort_groups(torch.tensor([0, 0, 1, -1], dtype=torch.int32), 4, 2),
            r"got values in \[-1, 1\]",
        ),
        (lambda: gptq.sort_groups(irregular([3, 1]), 4, 2, 2), "packed_size: expected at least 3, got 2"),
        (
            lambda: gptq.sort_groups(irregular([2, 2]), 4, 0),
            "group_size: expected -1 or a positive number, got 0",
        ),
        (
            lambda: gptq.g_idx_from_perm(torch.tensor([0, 0], dtype=torch.int32), 2, 2),
            "perm: expected every row",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
