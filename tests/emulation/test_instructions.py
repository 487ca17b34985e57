"""Emulated instructions do what CUDA's programming guide and the PTX ISA say."""

import pytest
import torch

from tests.emulation.conftest import ORDERS
from tests.emulation.emulator import HERE, Emulated

#: Of the emulator itself, with a library of its own to compile.
pytestmark = pytest.mark.slow

ALL_LANES = 0xFFFFFFFF


@pytest.fixture(scope="module")
def instructions(emulation):
    return Emulated([HERE / "kernels" / "instructions.cu"], "ferrum_instructions")


@pytest.fixture(params=ORDERS)
def schedule(request, instructions):
    with instructions.schedule(request.param, seed=5):
        yield


def signed(words):
    """Numbers below 2**32 as the int32 of the same bits."""
    words = torch.as_tensor(words)
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("width", (32, 16, 4))
@pytest.mark.parametrize("argument", (1, 3))
@pytest.mark.parametrize("mask", (ALL_LANES, 0x0000FFFF, 0xFF00FF00), ids=hex)
def test_exchange_within_a_warp(mask, argument, width, instructions, schedule):
    if mask != ALL_LANES:
        width = min(width, 4)  # no lane reads one outside the mask
    x = torch.randint(-6, 7, (32,), dtype=torch.int32)
    values, lanes = x.tolist(), [i for i in range(32) if mask >> i & 1]

    def group(i):
        return i // width * width

    present = [values[i] for i in lanes]
    everyone = {
        4: sum(1 << i for i in lanes if values[i] > 0),
        5: int(any(v > 5 for v in present)),
        6: int(all(v > -6 for v in present)),
        7: sum(present),
        8: max(present),
        9: min(present),
    }
    expected = torch.full((11, 32), 2**31 - 1, dtype=torch.int64)  # what torch.empty holds in tests
    for i in lanes:
        expected[0, i] = values[group(i) + argument % width]
        expected[1, i] = values[i - argument if i - argument >= group(i) else i]
        expected[2, i] = values[i + argument if i + argument < group(i) + width else i]
        expected[3, i] = values[i ^ argument]
        for row, value in everyone.items():
            expected[row, i] = value
        expected[10, i] = sum(1 << j for j in lanes if values[j] == values[i])
    with instructions.guard_pages("behind"):
        got = instructions.op("warp_exchange")(x, mask, argument, width)
    assert torch.equal(got, signed(expected))


@pytest.mark.parametrize("mask", (ALL_LANES, 0x00FF00FF), ids=hex)
def test_a_lane_must_not_read_one_outside_the_mask(mask, instructions):
    x = torch.zeros(32, dtype=torch.int32)
    if mask == ALL_LANES:
        instructions.op("warp_exchange")(x, mask, 9, 32)
    else:
        with pytest.raises(RuntimeError, match="lane 0 reads lane 9, which takes no part"):
            instructions.op("warp_exchange")(x, mask, 9, 32)


@pytest.mark.parametrize("count", (0, 1, 40, 64))
def test_votes_of_a_block(count, instructions, schedule):
    x = torch.zeros(64, dtype=torch.int32)
    x[torch.randperm(64)[:count]] = 7
    expected = torch.tensor([count, count > 0, count == 64], dtype=torch.int32).expand(64, 3)
    assert torch.equal(instructions.op("block_votes")(x), expected)


def registers(matrix, place):
    """int32 `[32, count]`: register r of a lane holds the numbers at `place(lane, r, i)` of `matrix`, i = 0 in its low bits."""
    per_register = 4 // matrix.element_size()
    count = next(r for r in (4, 2) if r * per_register * 32 == matrix.numel())
    numbers = [matrix[place(lane, r, i)] for lane in range(32) for r in range(count) for i in range(per_register)]
    return torch.stack(numbers).view(torch.int32).view(32, count)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.int8), ids=str)
def test_mma(dtype, instructions, schedule):
    # PTX ISA, "Matrix Fragments for mma.m16n8k16" and "... k32": groupID g, threadID_in_group t.
    step = 4 // torch.empty(0, dtype=dtype).element_size()
    k = 8 * step
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, shape, dtype=dtype) for shape in ((16, k), (k, 8)))
        d = torch.randint(-1000, 1000, (16, 8), dtype=torch.int32)
    else:
        a, b, d = torch.randn(16, k).to(dtype), torch.randn(k, 8).to(dtype), torch.randn(16, 8)
        a[0, 0] = 2.0**-20 if dtype == torch.float16 else 2.0**-130  # subnormal
    a_registers = registers(a, lambda l, r, i: (l // 4 + 8 * (r % 2), step * (l % 4) + 4 * step * (r // 2) + i))
    b_registers = registers(b, lambda l, r, i: (step * (l % 4) + 4 * step * r + i, l // 4))
    d_place = [(l // 4 + 8 * (i // 2), 2 * (l % 4) + i % 2) for l in range(32) for i in range(4)]
    rows, columns = map(list, zip(*d_place))
    got = d[rows, columns]
    instructions.op("mma_")(torch.empty(0, dtype=dtype), a_registers, b_registers, got)
    expected = (a.double() @ b.double() + d.double())[rows, columns]
    assert torch.allclose(got.double(), expected, rtol=1e-6, atol=1e-5 if dtype != torch.int8 else 0)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("value", (float("inf"), float("-inf"), float("nan"), 65504.0, 2.0**-24))
def test_mma_keeps_special_numbers(dtype, value, instructions):
    one = torch.ones(1, dtype=dtype)
    pair = torch.tensor([value, 0.0]).to(dtype)
    a, b = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(32, 2, dtype=torch.int32)
    a[0, 0] = pair.view(torch.int32)  # row 0, column 0
    b[0, 0] = torch.cat((one, 0 * one)).view(torch.int32)
    d = torch.zeros(32, 4)
    instructions.op("mma_")(torch.empty(0, dtype=dtype), a, b, d)
    assert d[0, 0].to(dtype).equal(pair[0]) or (d[0, 0].isnan() and pair[0].isnan())


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_ldmatrix(count, transposed, instructions, schedule):
    x = torch.randint(-30000, 30000, (count * 8, 8), dtype=torch.int16)
    with instructions.guard_pages("behind"):
        got = instructions.op("matrices")(x.clone(), transposed)
    each = x.view(count, 8, 8)
    each = each.mT if transposed else each
    expected = each.reshape(count, 32, 2).contiguous().view(torch.int32).squeeze(-1).T
    assert torch.equal(got, expected)


def test_bits(instructions):
    a, b, c = torch.randint(0, 2**32, (3, 32)).unbind()
    got = instructions.op("bits")(signed(a), signed(b), signed(c)).tolist()

    def signed_bytes(x):
        return [(x >> 8 * i & 0xFF) - (x >> 8 * i + 7 & 1) * 256 for i in range(4)]

    for lane, (x, y, z) in enumerate(zip(a.tolist(), b.tolist(), c.tolist())):
        eight = [(y << 32 | x) >> 8 * i & 0xFF for i in range(8)]
        sign = [0xFF * (byte >> 7) for byte in eight]
        chosen = [eight[digit & 7] for digit in (lane & 15, (0x21 + (lane >> 4)) & 15, 2, 3)]
        dot = sum(p * q for p, q in zip(signed_bytes(x), signed_bytes(y))) + z
        expected = [
            x & y | z,
            x ^ y ^ z,
            eight[0] | eight[1] << 8 | eight[4] << 16 | eight[5] << 24,
            eight[2] | sign[4] << 8 | eight[7] << 16 | sign[3] << 24,
            None if lane & 8 else chosen[0] | (eight[1 + (lane >> 4)]) << 8 | eight[2] << 16 | eight[3] << 24,
            x.bit_count() if hasattr(x, "bit_count") else bin(x).count("1"),
            32 - (x >> lane).bit_length(),
            (((x << lane & 0xFFFFFFFF) & -(x << lane & 0xFFFFFFFF)).bit_length()),
            int(f"{x:032b}"[::-1], 2),
            x * y >> 32,
            dot & 0xFFFFFFFF,
        ]
        for row, value in enumerate(expected):
            if value is not None:
                assert got[row][lane] & 0xFFFFFFFF == value, (row, lane)


def test_conversions_to_integers_saturate(instructions):
    x = torch.zeros(32)
    x[:10] = torch.tensor([0.5, 1.5, -0.5, -2.5, 2.4999, 3e9, -3e9, float("inf"), float("-inf"), float("nan")])
    top, bottom = 2**31 - 1, -(2**31)
    expected = [
        [0, 0, 0, 1],
        [2, 1, 1, 2],
        [0, 0, -1, 0],
        [-2, -2, -3, -2],
        [2, 2, 2, 3],
        [top] * 4,
        [bottom] * 4,
        [top] * 4,
        [bottom] * 4,
        [0] * 4,
    ]
    assert instructions.op("rounded")(x)[:10].tolist() == expected


@pytest.mark.parametrize("size", (4, 8, 16))
@pytest.mark.parametrize("missing", (0, 1, "all"))
def test_copies_fill_up_with_zeros(size, missing, instructions, schedule):
    valid = 0 if missing == "all" else size - missing
    x = torch.randint(1, 255, (32 * size,), dtype=torch.uint8)
    expected = x.view(32, size).clone()
    expected[:, valid:] = 0
    with instructions.guard_pages("behind"):
        got = instructions.op("copied")(x.clone(), valid)
    assert torch.equal(got.view(32, size), expected)
