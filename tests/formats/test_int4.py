"""The CPU layout: exact inverses, groups, and round-to-nearest."""

import pytest
import torch

from ferrum_ops.formats import gptq, int4


def random_codes(in_features, out_features):
    return torch.randint(0, 16, (in_features, out_features), dtype=torch.uint8)


@pytest.mark.parametrize("columns", [16, 17, 40])
def test_byte_order_of_a_line(columns):
    codes = random_codes(16, columns)
    packed = int4.pack(gptq.pack_rows(codes, 4), None, 16)
    assert packed.shape == (-(-columns // 16), 2, 64)
    for line, column, b in ((0, 0, 0), (1, 5, 2), (0, 15, 3), (1, 13, 1)):
        byte = int(packed[0, line, 4 * column + b])
        assert byte & 15 == codes[8 * line + b, column]
        assert byte >> 4 == codes[8 * line + 4 + b, column]


@pytest.mark.parametrize("in_features, out_features", [(8, 1), (72, 17), (128, 48)])
def test_pack_unpack_is_exact(in_features, out_features):
    qweight = gptq.pack_rows(random_codes(in_features, out_features), 4)
    perm = torch.randperm(in_features).to(torch.int32)
    padded = torch.cat([perm, torch.full((16,), -1, dtype=torch.int32)])
    for order in (None, perm, padded):
        packed = int4.pack(qweight, order, in_features)
        assert torch.equal(int4.unpack(packed, order, in_features, out_features), qweight)


def test_padding_columns_and_rows_are_zero():
    packed = int4.pack(torch.full((1, 3), -1, dtype=torch.int32), None, 5)
    codes = int4.unpack_codes(packed, 16)
    assert (codes[:5, :3] == 15).all()
    assert (codes[5:] == 0).all()
    assert (codes[:, 3:] == 0).all()


@pytest.mark.parametrize("lead", [(), (3,)])
def test_groups_round_trip(lead):
    values = torch.rand(*lead, 5, 40).half()
    tiled = int4.pack_groups(values)
    assert tiled.shape == (*lead, 3, 5, 16)
    assert torch.equal(int4.unpack_groups(tiled, 40), values)
    assert (tiled[..., 2, :, 8:] == 0).all()


def test_interleave_round_trip():
    gate, up = torch.randint(0, 256, (2, 4, 3, 2, 64), dtype=torch.uint8)
    tiles = int4.interleave_tiles(gate, up)
    assert torch.equal(tiles[:, 2], gate[:, 1])
    assert torch.equal(tiles[:, 3], up[:, 1])
    for part, original in zip(int4.deinterleave_tiles(tiles), (gate, up)):
        assert torch.equal(part, original)


@pytest.mark.parametrize(
    "group_size, in_features, expected",
    [(128, 256, 128), (256, 512, 128), (192, 384, 96), (-1, 200, 128), (-1, 64, 128), (1024, 1100, 128), (8, 24, 8)],
)
def test_split_groups_keeps_every_weight(group_size, in_features, expected):
    full = in_features if group_size == -1 else group_size
    groups = -(-in_features // full)
    scales, zeros = torch.rand(groups, 5).half(), torch.randint(0, 17, (groups, 5))
    new_scales, new_zeros, size = int4.split_groups(scales, zeros, group_size, in_features)
    assert size == expected
    k = torch.arange(in_features)
    assert new_scales.shape[0] == -(-in_features // size)
    assert torch.equal(new_scales[k // size], scales[k // full])
    assert torch.equal(new_zeros[k // size], zeros[k // full])


@pytest.mark.parametrize("group_size", [0, 12, -2])
def test_split_groups_names_a_bad_group_size(group_size):
    with pytest.raises(ValueError, match=rf"\[split_groups\] group_size: .* got {group_size}"):
        int4.split_groups(torch.ones(1, 4), None, group_size, 64)


def test_split_groups_names_a_wrong_number_of_groups():
    with pytest.raises(ValueError, match=r"\[split_groups\] scales: expected 2 groups .* got 3"):
        int4.split_groups(torch.ones(3, 4), None, 64, 128)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_dequantize_equals_gptq(act_order, asymmetric):
    in_features, out_features, group_size = 128, 24, 32
    codes = random_codes(in_features, out_features)
    g_idx = (torch.arange(in_features) // group_size).to(torch.int32)
    if act_order:
        g_idx = g_idx[torch.randperm(in_features)]
    scales = torch.rand(4, out_features).half()
    zeros = (
        torch.randint(0, 16, (4, out_features), dtype=torch.uint8) if asymmetric else torch.full((4, out_features), 8)
    )
    zeros = zeros.to(torch.uint8)
    expected = (codes.double() - zeros.double()[g_idx.long()]) * scales.double()[g_idx.long()]
    perm = gptq.sort_groups(g_idx, in_features, group_size)
    out = int4.dequantize(
        int4.pack(gptq.pack_rows(codes, 4), perm, in_features),
        int4.pack_groups(scales),
        int4.pack_groups(zeros) if asymmetric else None,
        perm,
        in_features,
        out_features,
        group_size,
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_rtn_error_is_half_a_step_except_at_the_clipped_end(group_size):
    weight = torch.randn(12, 200)
    codes, scales = int4.quantize_rtn(weight, group_size)
    size = 200 if group_size == -1 else group_size
    assert codes.shape == (200, 12)
    assert scales.shape == (-(-200 // size), 12)
    step = scales.float()[torch.arange(200) // size]
    error = ((codes.float() - 8) * step - weight.T).abs() / step
    # The grid reaches from -8 to 7 steps and the largest weight is 7.5: there, and only there, the error may be larger.
    assert (error[codes < 15] <= 0.5 + 1e-3).all()
    assert (error <= 0.5 + 8e-3).all()  # float16 rounds the scale by up to 2^-11


def test_rtn_of_zeros_is_zero():
    codes, scales = int4.quantize_rtn(torch.zeros(3, 64), 32)
    assert (codes == 8).all()
    assert (scales == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_rtn_refuses_what_float16_scales_cannot_hold(bad):
    weight = torch.zeros(2, 32)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match=r"\[quantize_rtn\] weight"):
        int4.quantize_rtn(weight, 32)
