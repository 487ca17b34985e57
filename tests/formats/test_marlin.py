"""`ferrum_ops.formats.marlin` against loops written from the layout's definition: which lane owns what."""

import pytest
import torch

from ferrum_ops.formats import gptq, marlin

BITS = pytest.mark.parametrize("bits", marlin.SUPPORTED_BITS)
WORD_ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


def random_words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def signed(word):
    return word - 2**32 if word >= 2**31 else word


def repack_by_lane(codes, bits):
    """codes uint8 [K, N] -> int32 [K/16, N*bits/2]: lane by lane, tile by tile."""
    rows, columns = codes.shape
    per_word = 32 // bits
    out = torch.zeros(rows // 16, columns * bits // 2, dtype=torch.int32)
    for row_tile in range(rows // 16):
        words = []
        for unit in range(columns // 64):
            for lane in range(32):
                for tile in range(4):
                    column = 64 * unit + 16 * tile + lane // 4
                    owned = [
                        int(codes[16 * row_tile + 2 * (lane % 4) + row, column + 8 * half])
                        for half in (0, 1)
                        for row in (0, 1, 8, 9)
                    ]
                    for start in range(0, 8, per_word):
                        order = [owned[start + i] for i in WORD_ORDER[bits]]
                        words.append(signed(sum(code << (bits * i) for i, code in enumerate(order))))
        out[row_tile] = torch.tensor(words, dtype=torch.int32)
    return out


@BITS
@pytest.mark.parametrize("rows, columns", [(16, 64), (32, 128), (48, 192)])
def test_repack_equals_the_loop_over_lanes(bits, rows, columns):
    qweight = random_words(rows * bits // 32, columns)
    packed = marlin.repack(qweight, None, rows, columns, bits)
    assert packed.is_contiguous()
    assert torch.equal(packed, repack_by_lane(gptq.unpack_rows(qweight, bits), bits))
    assert torch.equal(marlin.unpack(packed, None, rows, columns, bits), qweight)


def test_known_words_of_one_unit():
    """Codes that name their own place. Lane 0 of tile 0 owns rows 0, 1, 8, 9 of columns 0 and 8."""
    rows = torch.arange(16, dtype=torch.uint8).view(16, 1).expand(16, 64)
    packed = marlin.repack(gptq.pack_rows(rows, 4), None, 16, 64, 4)
    assert packed.shape == (1, 128)
    # Low to high: (row 0, column 0), (8, 0), (0, 8), (8, 8), then the same of rows 1 and 9.
    assert packed[0, 0].item() & 0xFFFFFFFF == 0x91918080
    assert packed[0, 4].item() & 0xFFFFFFFF == 0xB3B3A2A2  # lane 1: rows 2, 3, 10, 11
    assert packed[0, 12].item() & 0xFFFFFFFF == 0xF7F7E6E6  # lane 3
    assert packed[0, 16].item() == packed[0, 0].item()  # lane 4: the next column, the same rows
    columns = (torch.arange(64, dtype=torch.uint8) // 8).expand(16, 64).contiguous()  # which half of which tile
    packed = marlin.repack(gptq.pack_rows(columns, 4), None, 16, 64, 4)
    assert [w & 0xFFFFFFFF for w in packed[0, :4].tolist()] == [0x11001100, 0x33223322, 0x55445544, 0x77667766]


def test_known_words_of_eight_bits():
    codes = (torch.arange(16).view(16, 1) * 16 + torch.arange(64) // 8).to(torch.uint8)
    packed = marlin.repack(gptq.pack_rows(codes, 8), None, 16, 64, 8)
    assert packed.shape == (1, 256)
    # Lane 0, tile 0: rows 0, 8, 1, 9 of column 0, then of column 8.
    assert [w & 0xFFFFFFFF for w in packed[0, :2].tolist()] == [0x90108000, 0x91118101]


@BITS
def test_perm_orders_rows_before_tiling(bits):
    qweight = random_words(48 * bits // 32, 64)
    perm = torch.randperm(48).to(torch.int32)
    packed = marlin.repack(qweight, perm, 48, 64, bits)
    assert torch.equal(packed, repack_by_lane(gptq.unpack_rows(qweight, bits)[perm.long()], bits))
    assert torch.equal(marlin.unpack(packed, perm, 48, 64, bits), qweight)


@BITS
def test_padding_rows_hold_the_symmetric_zero_point(bits):
    g_idx = torch.tensor([0] * 20 + [1] * 4 + [2] * 16, dtype=torch.int32)[torch.randperm(40)]
    perm = gptq.sort_groups(g_idx, 40, 16, 32)
    qweight = random_words(40 * bits // 32, 64)
    packed = marlin.repack(qweight, perm, 40, 64, bits)
    codes = gptq.unpack_rows(qweight, bits)
    expected = torch.full((96, 64), 2 ** (bits - 1), dtype=torch.uint8)
    for j, row in enumerate(perm.tolist()):
        if row >= 0:
            expected[j] = codes[row]
    assert torch.equal(packed, repack_by_lane(expected, bits))
    assert torch.equal(marlin.unpack(packed, perm, 40, 64, bits), qweight)


@BITS
@pytest.mark.parametrize("act_order", [False, True])
def test_every_expert_of_a_stack(bits, act_order):
    qweight = random_words(5, 32 * bits // 32, 128)
    perm = torch.stack([torch.randperm(32) for _ in range(5)]).to(torch.int32) if act_order else None
    packed = marlin.repack(qweight, perm, 32, 128, bits)
    for expert in range(5):
        alone = marlin.repack(qweight[expert], None if perm is None else perm[expert], 32, 128, bits)
        assert torch.equal(packed[expert], alone)
    assert torch.equal(marlin.unpack(packed, perm, 32, 128, bits), qweight)


def test_grouped_scales_are_transposed_in_runs_of_64():
    scales = torch.arange(2 * 128).view(2, 128).float()
    out = marlin.permute_scales(scales, 256, 128)
    expected = [64 * run + i + 8 * j for run in range(2) for i in range(8) for j in range(8)]
    assert out[0].tolist() == expected
    assert out[1].tolist() == [128 + e for e in expected]


@pytest.mark.parametrize("group_size", [-1, 256, 512])
def test_scales_of_one_group_go_in_runs_of_32(group_size):
    scales = torch.arange(64).view(1, 64).float()
    out = marlin.permute_scales(scales, 256, group_size)
    offsets = (0, 1, 8, 9, 16, 17, 24, 25)
    assert out[0].tolist() == [32 * run + 2 * i + o for run in range(2) for i in range(4) for o in offsets]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape, group_size", [((4, 128), 32), ((1, 192), -1), ((3, 4, 64), 32), ((3, 1, 64), -1)])
def test_scales_round_trip(dtype, shape, group_size):
    scales = torch.randn(shape).to(dtype)
    out = marlin.permute_scales(scales, 128, group_size)
    assert out.dtype == dtype and not torch.equal(out, scales)
    assert torch.equal(marlin.unpermute_scales(out, 128, group_size), scales)


@BITS
def test_zero_points(bits):
    zeros = torch.randint(0, 2**bits, (3, 128), dtype=torch.uint8)
    packed = marlin.pack_zeros(zeros, bits)
    assert packed.shape == (3, 128 * bits // 32)
    per_word = 32 // bits
    for g in range(3):
        ordered = [int(zeros[g, 64 * run + i + 8 * j]) for run in range(2) for i in range(8) for j in range(8)]
        for w in range(len(ordered) // per_word):
            word = [ordered[w * per_word + i] for i in WORD_ORDER[bits]]
            assert packed[g, w].item() == signed(sum(code << (bits * i) for i, code in enumerate(word)))
    assert torch.equal(marlin.unpack_zeros(packed, bits), zeros)


def words(rows=4, columns=64):
    return torch.zeros(rows, columns, dtype=torch.int32)


def perm(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: marlin.repack(words(), None, 32, 64, 3), r"\[marlin_repack\] bits: expected one of \(4, 8\), got 3"),
        (lambda: marlin.repack(words(5), None, 40, 64, 4), "in_features: expected a multiple of 16 rows, got 40"),
        (lambda: marlin.repack(words(4, 96), None, 32, 96, 4), "out_features: expected a multiple of 64, got 96"),
        (lambda: marlin.repack(words(), None, 48, 64, 4), r"qweight: expected int32 \(6, 64\) .*got int32 \(4, 64\)"),
        (lambda: marlin.repack(words().long(), None, 32, 64, 4), "qweight: expected int32"),
        (lambda: marlin.repack(words(), torch.arange(32), 32, 64, 4), "perm: expected int32"),
        (lambda: marlin.repack(words(), torch.arange(32).int().view(1, 32), 32, 64, 4), "perm: expected int32"),
        (lambda: marlin.repack(words(), perm(*[0] * 32), 32, 64, 4), r"perm: expected every row of \[0, 32\) once"),
        (lambda: marlin.repack(words(), perm(*range(1, 33)), 32, 64, 4), r"perm: expected every row of \[0, 32\) once"),
        (lambda: marlin.repack(words(), perm(*range(16)), 32, 64, 4), r"perm: expected every row of \[0, 32\) once"),
        (lambda: marlin.unpack(words(2, 64), None, 32, 64, 4), r"\[marlin_unpack\] packed: expected int32 \(2, 128\)"),
        (lambda: marlin.unpack(words(2, 128), perm(*range(31), 40), 32, 64, 4), "perm: expected every row"),
        (lambda: marlin.permute_scales(torch.ones(2, 64), 256, 64), r"scales: expected floating \(4, 64|N\)"),
        (lambda: marlin.permute_scales(torch.ones(2, 96), 256, 128), "scales: expected N in multiples of 64"),
        (lambda: marlin.permute_scales(torch.ones(2, 64).int(), 256, 128), "scales: expected floating"),
        (lambda: marlin.unpermute_scales(torch.ones(2, 64), 256, -1), r"\[marlin_unpermute_scales\] scales"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gate_and_up_alternate_in_runs_of_eight():
    gate, up = torch.arange(24).view(1, 24), torch.arange(100, 124).view(1, 24)
    columns = marlin.interleave_gate_up(gate, up)
    assert columns[0, :20].tolist() == [*range(8), *range(100, 108), *range(8, 12)]
    assert all(torch.equal(a, b) for a, b in zip(marlin.split_gate_up(columns), (gate, up)))
    with pytest.raises(ValueError, match="gate, up: expected two of the same shape"):
        marlin.interleave_gate_up(gate[:, :20], up[:, :20])
    with pytest.raises(ValueError, match="columns: expected"):
        marlin.split_gate_up(columns[:, :40])
