"""The kernels that make the Marlin layout and dense weights of it: bit for bit what their references are."""

import pytest
import torch

from ferrum_ops.formats import gptq, marlin
from ferrum_ops.ops.marlin import random_marlin
from tests.ops.test_marlin import REFUSED_DENSE, good_dense, projection

DTYPES = (torch.float16, torch.bfloat16)
FILL = 7.0


def dequantized(kernel, out, packed, scales, zeros, perm, group_size, bits=4, offsets=None, interleaved=False):
    """What the kernel makes of `out`, beside what the reference does; everything that is not a weight must be kept."""
    args = (packed, scales, zeros, perm, offsets, group_size, bits, interleaved)
    got = kernel("marlin_dequantize_out", *args, out)[0]
    expected = out.clone()
    marlin.dequantize_into(*args, expected)
    assert torch.equal(got, expected)
    return got


def filled(*shape, dtype=torch.float16):
    return torch.full(shape, FILL, dtype=dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [-1, 16, 48, 128])
def test_groups(kernel, group_size, asymmetric, bits):
    """17 tiles of rows are three warps', the last of which has one; nine units are two blocks'."""
    tensors = random_marlin(272, 192, group_size, bits, "cpu", asymmetric=asymmetric)
    dequantized(kernel, filled(272, 192, dtype=DTYPES[asymmetric]), *tensors, group_size, bits)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("scales_dtype", [torch.float32, *DTYPES])
def test_dtypes(kernel, scales_dtype, dtype):
    packed, scales, zeros, perm = random_marlin(48, 64, 16, 8, "cpu", asymmetric=True)
    dequantized(kernel, filled(48, 64, dtype=dtype), packed, scales.to(scales_dtype), zeros, perm, 16, 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 48])
def test_act_order_with_uneven_groups(kernel, group_size, bits):
    weight, tensors, size = projection(144, 128, group_size, bits, True, True)
    got = dequantized(kernel, filled(144, 128, dtype=torch.float32), *tensors, size, bits)
    assert torch.equal(got.double(), weight)


def test_perm_entries_that_are_no_row_are_padding(kernel):
    packed, scales, zeros, _ = random_marlin(48, 64, 16, 4, "cpu")
    perm = torch.arange(48).int()
    perm[::5] = torch.tensor([-1, -(2**31), 48, 2**31 - 1] * 3)[:10].int()
    got = kernel("marlin_dequantize_out", packed, scales, zeros, perm, None, 16, 4, False, filled(48, 64))[0]
    expected = marlin.dequantize(packed, scales, zeros, 16, 4).half()
    expected[::5] = FILL
    assert torch.equal(got, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [1, 8, 31, 40, 64])
def test_gate_and_up_come_apart(kernel, width, bits):
    tensors = random_marlin(48, 128, 16, bits, "cpu")
    got = dequantized(kernel, filled(48, 2 * width), *tensors, 16, bits, interleaved=True)
    gate, up = marlin.split_gate_up(marlin.dequantize(*tensors[:3], 16, bits).half())
    assert torch.equal(got, torch.cat((gate[:, :width], up[:, :width]), dim=1))


@pytest.mark.parametrize("rows, columns", [(1, 64), (40, 1), (47, 63), (33, 72), (48, 128)])
def test_padding_is_not_written(kernel, rows, columns):
    """And neither is what lies around the rows: `out` is a part of a larger tensor, aligned or not."""
    tensors = random_marlin(48, 128, 16, 4, "cpu", asymmetric=True)
    for row, first in ((128, 0), (160, 16), (136, 5), (135, 0)):
        whole = filled(rows + 1, row)
        part = whole[1:, first : first + columns]
        if first + columns <= row:
            dequantized(kernel, part, *tensors, 16)


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_without_rows_are_left_alone(kernel, bits):
    stacks = [random_marlin(64, 64, 32, bits, "cpu", asymmetric=True, act_order=True) for _ in range(5)]
    tensors = [torch.stack(tensors) for tensors in zip(*stacks)]
    offsets = torch.tensor([0, 0, 3, 3, 4, 4], dtype=torch.int32)
    got = dequantized(kernel, filled(5, 64, 64), *tensors, 32, bits, offsets)
    assert [(m != FILL).any().item() for m in got] == [False, True, False, True, False]
    assert (dequantized(kernel, filled(5, 64, 64), *tensors, 32, bits) != FILL).flatten(1).any(1).all()


def test_columns_of_a_wider_stack(kernel):
    packed, scales, zeros, _ = random_marlin(96, 320, 32, 8, "cpu", asymmetric=True)
    views = (packed[:, 64 * 4 : 192 * 4], scales[:, 64:192], zeros[:, 16:48], None)
    whole = dequantized(kernel, filled(96, 320), packed, scales, zeros, None, 32, 8)
    assert torch.equal(dequantized(kernel, filled(96, 320)[:, 100:228], *views, 32, 8), whole[:, 64:192])


@pytest.mark.parametrize("shape", [(0, 64), (48, 0)])
def test_empty_weights(kernel, shape):
    dequantized(kernel, filled(*shape), *random_marlin(48, 64, 16, 4, "cpu"), 16)
    dequantized(kernel, filled(0, 48, 64), words(0, 3, 128), torch.empty(0, 3, 64), None, None, 16)


@pytest.mark.parametrize("change, message", REFUSED_DENSE)
def test_bad_dense_input_is_named(emulated, change, message):
    with pytest.raises(RuntimeError, match=r"\[marlin_dequantize_out\] " + message):
        emulated.op("marlin_dequantize_out")(**good_dense() | change)


def words(*shape):
    return torch.randint(-(2**31), 2**31, shape).int()


def repacked(kernel, qweight, perm, bits):
    in_features, columns = qweight.shape[-2] * 32 // bits, qweight.shape[-1]
    got = kernel("marlin_repack", qweight, perm, in_features, columns, bits)[0]
    assert torch.equal(got, marlin.repack(qweight, perm, in_features, columns, bits))
    return got


@pytest.mark.parametrize("bits", [4, 8])
def test_repacking(kernel, bits):
    """Nine units, eight to a block, alone and in a stack."""
    qweight, perm = words(48 * bits // 32, 192), torch.randperm(48).int()
    repacked(kernel, qweight, None, bits)
    repacked(kernel, qweight, perm, bits)
    stack, perms = torch.stack((qweight, ~qweight)), torch.stack((perm, perm.flip(0)))
    repacked(kernel, stack, perms, bits)
    repacked(kernel, stack, None, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_repacking_pads_groups(kernel, bits):
    g_idx = torch.tensor([0] * 7 + [1] * 22 + [2] * 11)[torch.randperm(40)].int()
    perm = gptq.sort_groups(g_idx, 40, 14, 32)
    assert len(perm) == 96
    repacked(kernel, words(40 * bits // 32, 64), perm, bits)


def test_repacking_rows_that_are_not_aligned(kernel):
    wide, perm = words(2, 6, 200), torch.stack((torch.randperm(48), torch.randperm(48))).int()
    for view in (
        wide[:, :, 3:67],
        wide[:, :, 4:132],
        wide[:, :, 4:132:2],
        wide[::2, :, :64],
    ):
        repacked(kernel, view, perm[: len(view)], 4)
    repacked(kernel, words(64, 6).T, None, 4)
    repacked(kernel, wide[:, :, 1:65], perm.T.contiguous().T, 4)


def test_repacking_takes_what_is_no_row_for_padding(kernel):
    qweight, perm = words(6, 64), torch.randperm(48).int()
    bad = perm.clone()
    bad[::5] = torch.tensor([-1, -(2**31), 48, 2**31 - 1] * 3)[:10].int()
    got = kernel("marlin_repack", qweight, bad, 48, 64, 4)[0]
    codes = gptq.unpack_rows(qweight, 4)[perm.long()]
    codes[::5] = 8
    assert torch.equal(marlin.unpack(got, None, 48, 64, 4), gptq.pack_rows(codes, 4))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 3}, r"bits: expected one of \(4, 8\), got 3"),
        ({"in_features": 40}, "in_features: expected a multiple of 16 rows, got 40"),
        ({"in_features": 32}, r"qweight: expected int32 \(4, 64\) or \(E, 4, 64\), got Int \(6, 64\)"),
        ({"in_features": 44, "perm": torch.zeros(48).int()}, "in_features: expected a multiple of 8, got 44"),
        ({"out_features": 96}, "out_features: expected a multiple of 64, got 96"),
        ({"qweight": torch.zeros(6, 64)}, "qweight: expected int32"),
        ({"qweight": torch.zeros(64).int()}, "qweight: expected int32"),
        ({"perm": torch.zeros(2, 48).int()}, r"perm: expected int32 \(rows\), got Int \(2, 48\)"),
        ({"perm": torch.zeros(48)}, "perm: expected int32"),
        ({"perm": torch.zeros(40).int()}, "in_features: expected a multiple of 16 rows, got 40"),
    ],
)
def test_bad_words_are_named(emulated, change, message):
    arguments = {"qweight": words(6, 64), "perm": None, "in_features": 48, "out_features": 64, "bits": 4}
    with pytest.raises(RuntimeError, match=r"\[marlin_repack\] " + message):
        emulated.op("marlin_repack")(**arguments | change)
