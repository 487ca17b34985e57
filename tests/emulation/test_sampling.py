"""What the CUDA kernels of the sampling family must do beyond the registry's samples: rows cut into spans and windows,
and offsets, ids and penalties that no host has checked."""

import math

import pytest
import torch

from tests.emulation.conftest import GUARD, ORDERS
from tests.ops.test_sampling import BAD, naive_argmax

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = math.nan, math.inf
SPAN, WINDOW = 2048, 16384


@pytest.fixture(params=ORDERS)
def run(request, emulated):
    """`run(name, *args)` under one order of the threads, on copies between guard pages."""

    def call(name, *args):
        with emulated.guard_pages(GUARD[request.param]):
            args = [a.clone() if isinstance(a, torch.Tensor) and a.is_contiguous() else a for a in args]
            with emulated.schedule(request.param, seed=3):
                result = emulated.op(name)(*args)
        return args[0] if result is None else result

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 70])
def test_argmax_is_the_definition(dtype, size, run):
    logits = torch.randint(-9, 10, (40, size)).to(dtype)  # many ties
    logits[torch.rand(40, size) < 0.1] = NAN
    logits[torch.rand(40, size) < 0.1] = INF
    logits[torch.rand(40, size) < 0.1] = -INF
    mask = torch.rand(40, size) < torch.linspace(0, 0.5, 40)[:, None]
    rows, masks = logits.tolist(), mask.tolist()
    assert run("argmax_rows", logits).tolist() == [naive_argmax(row, [True] * size) for row in rows]
    assert run("argmax_rows", logits, mask).tolist() == [naive_argmax(row, m) for row, m in zip(rows, masks)]
    assert run("argmax_rows", logits, mask[20]).tolist() == [naive_argmax(row, masks[20]) for row in rows]
    apart = torch.cat([mask, mask[:, :1]], 1)[:, :size]  # rows of the mask are aligned to nothing
    assert run("argmax_rows", logits, apart).tolist() == [naive_argmax(row, m) for row, m in zip(rows, masks)]


@pytest.mark.parametrize(
    "row, mask, expected",
    [
        ([0.0, -0.0], None, 0),
        ([-0.0, 0.0], None, 0),
        ([NAN, NAN], None, 0),
        ([-INF, INF], None, 0),
        ([-INF, -3e38, NAN], None, 1),
        ([1.0, 9.0, 2.0], [0, 0, 0], -1),
        ([NAN, NAN, INF], [0, 1, 1], 1),
        ([NAN, 3.0, INF], [1, 0, 1], 0),
        ([NAN, NAN, NAN], [0, 0, 0], -1),
        ([5.0, NAN, 5.0], [0, 1, 1], 2),
    ],
)
def test_argmax_edges(row, mask, expected, run):
    mask = None if mask is None else torch.tensor(mask).bool()
    assert run("argmax_rows", torch.tensor([row] * 2), mask).tolist() == [expected] * 2


@pytest.mark.parametrize("winner", [0, SPAN - 1, SPAN, 2 * SPAN - 1, 5 * SPAN + 17, 20479])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_across_spans(winner, dtype, run):
    logits = torch.full((1, 20480), -4.0, dtype=dtype)
    logits[0, winner:] = -2.0
    assert run("argmax_rows", logits).tolist() == [winner]
    assert run("argmax_rows", logits.roll(1, 1)[:, 1:].clone()).tolist() == [winner % 20479]  # no whole vectors
    mask = torch.zeros(20480, dtype=torch.bool)
    assert run("argmax_rows", logits, mask).tolist() == [-1]
    mask[winner] = True
    assert run("argmax_rows", torch.full_like(logits, NAN), mask).tolist() == [winner]


def test_a_vocabulary_is_cut_into_many_blocks(emulated):
    logits = torch.randn(1, 151936).bfloat16()
    logits[0, 150000:] = logits.max() + 1  # more candidates than a warp has lanes, and the best is one of the last
    launches, collectives = emulated.launches(), emulated.collectives()
    got = emulated.op("argmax_rows")(logits)
    assert emulated.launches() - launches == 2
    # In each of 75 blocks: at least 5 shuffles of each of 8 warps, and a barrier.
    assert emulated.collectives() - collectives >= 75 * (8 * 5 + 1)
    assert got.tolist() == [int((logits[0] == logits.max()).nonzero()[0])]
    launches = emulated.launches()
    assert emulated.op("argmax_rows")(torch.randn(3, 100)).shape == (3,)
    assert emulated.launches() - launches == 1


def test_more_columns_than_an_index_holds_are_refused(emulated):
    with pytest.raises(RuntimeError, match=r"\[argmax_rows\] logits: expected at most 2147483647 columns, got"):
        emulated.op("argmax_rows")(torch.empty(0, 2**31))


def naive_penalty(logits, ids, offsets, penalty):
    """The rule for devices, one element at a time."""
    out = logits.clone()
    for t in range(logits.shape[0]):
        p = penalty[t].item()
        listed = ids[max(int(offsets[t]), 0) : max(min(int(offsets[t + 1]), ids.numel()), 0)].tolist()
        if not 0 < p < INF or p == 1:
            continue
        for i in {i for i in listed if 0 <= i < logits.shape[1]}:
            v = logits[t, i].float()
            if v.isfinite():
                out[t, i] = (v / penalty[t] if v > 0 else v * penalty[t]).to(out.dtype)
    return out


def assert_penalty(run, logits, ids, offsets, penalty):
    got = run("repetition_penalty_", logits, ids, offsets, penalty)
    expected = naive_penalty(logits, ids, offsets, penalty)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_penalty_counts_an_id_once_whatever_its_window(dtype, integers, run):
    edges = [0, 31, 32, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW - 1, 2 * WINDOW, 2 * WINDOW + 6]
    ids = torch.tensor(edges * 40 + [-1, 2 * WINDOW + 7, 5], dtype=integers)
    offsets = torch.tensor([0, 200, 200, ids.numel()], dtype=integers)
    assert_penalty(run, 3 * torch.randn(3, 2 * WINDOW + 7).to(dtype), ids, offsets, torch.tensor([1.3, 2.0, 0.7]))


@pytest.mark.parametrize(
    "offsets",
    [
        [-5, 3, 9],
        [2, 4, 12],
        [0, 7, 3],
        [0, 99, 2**31 - 1],
        [-(2**31), 2**31 - 1, 5],
        [50, 60, 70],
        [-9, -3, -1],
    ],
)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_bad_offsets_are_never_followed(offsets, integers, run):
    ids, penalty = torch.arange(12).to(integers), torch.tensor([2.0, 3.0])
    assert_penalty(run, torch.randn(2, 40), ids, torch.tensor(offsets).to(integers), penalty)


@pytest.mark.parametrize("penalty", [0.0, -1.5, -INF, INF, NAN, 1.0])
def test_rows_with_these_penalties_are_left_alone(penalty, run):
    logits, ids, offsets = torch.randn(2, 9), torch.arange(9).repeat(2), torch.tensor([0, 9, 18])
    got = run("repetition_penalty_", logits, ids, offsets, torch.tensor([penalty, 2.0]))
    assert torch.equal(got[0], logits[0]) and not torch.equal(got[1], logits[1])


@pytest.mark.parametrize("bad", [-(2**63), 2**63 - 1, 2**32, -1, 9])
def test_ids_outside_the_vocabulary_are_skipped(bad, run):
    ids = torch.tensor([bad, 3, bad])
    assert_penalty(run, torch.ones(1, 9), ids, torch.tensor([0, 3]), torch.tensor([2.0]))


def test_penalty_of_rows_in_a_larger_tensor(emulated):
    storage = torch.ones(3, 8)
    ids, offsets = torch.tensor([-1, 4, 1, 2]), torch.tensor([0, 3, 4])
    emulated.op("repetition_penalty_")(storage[:2, 2:6], ids, offsets, torch.tensor([2.0, 4.0]))
    expected = torch.ones(3, 8)
    expected[0, 3], expected[1, 4] = 0.5, 0.25
    assert torch.equal(storage, expected)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, emulated):
    name, args, message = BAD[case]
    with pytest.raises(RuntimeError, match=rf"\[{name}\] {message}"):
        emulated.op(name)(*args)
