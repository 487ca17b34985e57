import math

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

import ferrum_ops
from ferrum_ops.ops import sampling
from ferrum_ops.testing.compare import assert_close, tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.ferrum
NAN, INF = math.nan, math.inf


def naive_argmax(row, allowed):
    """The definition, one value at a time."""
    candidates = [i for i, ok in enumerate(allowed) if ok]
    finite = [i for i in candidates if math.isfinite(row[i])]
    if finite:
        return min(finite, key=lambda i: (-row[i], i))
    return candidates[0] if candidates else -1


@pytest.fixture(params=["kernel", "reference"])
def argmax_rows(request, isa):
    return ferrum_ops.argmax_rows if request.param == "kernel" else sampling.argmax_rows_ref


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_is_the_definition(dtype, argmax_rows):
    logits = torch.randint(-9, 10, (40, 70)).to(dtype)  # many ties
    logits[torch.rand(40, 70) < 0.1] = NAN
    logits[torch.rand(40, 70) < 0.1] = INF
    logits[torch.rand(40, 70) < 0.1] = -INF
    mask = torch.rand(40, 70) < torch.linspace(0, 0.5, 40)[:, None]
    rows, masks = logits.tolist(), mask.tolist()
    assert argmax_rows(logits).tolist() == [naive_argmax(row, [True] * 70) for row in rows]
    assert argmax_rows(logits, mask).tolist() == [naive_argmax(row, m) for row, m in zip(rows, masks)]
    assert argmax_rows(logits, mask[20]).tolist() == [naive_argmax(row, masks[20]) for row in rows]


@pytest.mark.parametrize(
    "row, expected",
    [
        ([1.0, 3.0, 3.0, 3.0], 1),
        ([0.0, -0.0], 0),
        ([-0.0, 0.0], 0),
        ([NAN, -5.0, NAN], 1),
        ([INF, 2.0, -INF], 1),
        ([NAN, NAN], 0),
        ([-INF, INF], 0),
        ([-INF, -3e38, NAN], 1),
        ([7.0], 0),
    ],
)
def test_argmax_edges(row, expected, argmax_rows):
    assert argmax_rows(torch.tensor([row])).tolist() == [expected]


@pytest.mark.parametrize(
    "row, mask, expected",
    [
        ([1.0, 9.0, 2.0], [1, 0, 1], 2),
        ([1.0, 9.0, 2.0], [0, 0, 0], -1),
        ([NAN, NAN, INF], [0, 1, 1], 1),
        ([NAN, NAN, NAN], [0, 0, 0], -1),
        ([5.0, NAN, 5.0], [0, 1, 1], 2),
    ],
)
def test_argmax_mask_edges(row, mask, expected, argmax_rows):
    logits, mask = torch.tensor([row, row]), torch.tensor(mask).bool()
    assert argmax_rows(logits, mask).tolist() == [expected] * 2
    assert argmax_rows(logits, mask.expand(2, -1)).tolist() == [expected] * 2


@pytest.mark.parametrize("winner", [0, 15, 16, 511, 512, 32767, 32768, 65535, 65536, 70000])
def test_argmax_across_blocks_and_spans(winner, argmax_rows):
    logits = torch.full((2, 70001), -4.0)
    logits[0, winner:] = -2.0
    logits[1, winner] = torch.finfo(torch.float32).max
    assert argmax_rows(logits).tolist() == [winner, winner]


def test_argmax_of_nothing(argmax_rows):
    ids = argmax_rows(torch.empty(0, 5))
    assert ids.shape == (0,) and ids.dtype == torch.int64


def test_argmax_does_not_depend_on_threads(isa):
    logits = torch.randint(-50, 50, (3, 100_000)).float()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OPS.argmax_rows(logits))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


def csr(*rows, dtype=torch.int32):
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(dtype)
    return torch.tensor([i for row in rows for i in row], dtype=dtype), offsets


@pytest.fixture(params=["kernel", "reference"])
def repetition_penalty_(request, isa):
    return ferrum_ops.repetition_penalty_ if request.param == "kernel" else sampling.repetition_penalty__ref


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_penalty_equals_transformers(dtype, integers, repetition_penalty_):
    logits = (4 * torch.randn(3, 127)).to(dtype)
    tokens = torch.randint(0, 127, (3, 200))  # every row repeats some
    expected = RepetitionPenaltyLogitsProcessor(1.3)(tokens, logits.double())
    ids, offsets = csr(*tokens.tolist(), dtype=integers)
    assert repetition_penalty_(logits, ids, offsets, torch.full((3,), 1.3)) is None
    assert_close("repetition_penalty_", logits, expected, tolerance("repetition_penalty_", dtype))


def test_penalty_of_each_row_and_of_listed_ids_only(repetition_penalty_):
    logits = torch.tensor([[2.0, -2.0, 4.0, 0.0]] * 3)
    ids, offsets = csr([0, 1, 3], [], [2, 2, 2])
    repetition_penalty_(logits, ids, offsets, torch.tensor([2.0, 3.0, 0.5]))
    expected = [[1.0, -4.0, 4.0, 0.0], [2.0, -2.0, 4.0, 0.0], [2.0, -2.0, 8.0, 0.0]]
    assert logits.tolist() == expected


def test_penalty_skips_ids_outside(repetition_penalty_):
    storage = torch.ones(3, 8)
    ids, offsets = csr([-1, 4, 2**31 - 1, 1], [-(2**31), 4, 7])
    repetition_penalty_(storage[:2, 2:6], ids, offsets, torch.tensor([2.0, 2.0]))
    expected = torch.ones(3, 8)
    expected[0, 3] = 0.5
    assert torch.equal(storage, expected)


def test_penalty_skips_values_that_are_not_finite(repetition_penalty_):
    bits = torch.tensor([0x7F800001, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int32)
    logits = bits.view(torch.float32)[None].clone()
    repetition_penalty_(logits, *csr([0, 1, 2, 3]), torch.tensor([2.0]))
    assert torch.equal(logits[0, 2:].view(torch.int32), bits[2:]) and logits[0, :2].isnan().all()


@pytest.mark.parametrize("penalty", [1.0, INF, NAN])
def test_rows_with_these_penalties_are_left_alone(penalty, repetition_penalty_):
    logits = torch.randn(1, 5)
    before = logits.clone()
    repetition_penalty_(logits, *csr([0, 1, 2, 3, 4]), torch.tensor([penalty]))
    assert torch.equal(logits, before)


def test_penalty_of_no_rows(repetition_penalty_):
    repetition_penalty_(torch.empty(0, 5), *csr(), torch.empty(0))
    logits = torch.ones(2, 5)
    repetition_penalty_(logits, *csr([], []), torch.full((2,), 2.0))
    assert torch.equal(logits, torch.ones(2, 5))


def test_ids_that_no_row_owns_are_skipped(repetition_penalty_):
    logits = torch.ones(1, 5)
    ids, _ = csr([1, 2, 3])
    repetition_penalty_(logits, ids, torch.tensor([0, 2]), torch.tensor([2.0]))
    assert logits.tolist() == [[1.0, 0.5, 0.5, 1.0, 1.0]]


X = torch.ones(2, 6)
MASK = torch.ones(6).bool()
IDS, OFFSETS = csr([1, 2], [3])
P = torch.full((2,), 2.0)
BAD = {
    "argmax integers": ("argmax_rows", (X.int(),), r"logits: expected float32, float16 or bfloat16, got"),
    "argmax dims": ("argmax_rows", (X[0],), r"logits: expected shape \(tokens, vocabulary\) with .*, got \(6,?\)"),
    "no columns": ("argmax_rows", (X[:, :0],), r"logits: expected .*at least 1 column, got \(2, 0\)"),
    "argmax strides": ("argmax_rows", (torch.ones(6, 2).t(),), r"logits: expected a contiguous last dimension, got"),
    "mask dtype": ("argmax_rows", (X, MASK.int()), r"mask: expected [bB]ool, got"),
    "mask size": ("argmax_rows", (X, MASK[:5]), r"mask: expected shape \(6,\) or \(2, 6\), got \(5,?\)"),
    "mask rows": ("argmax_rows", (X, MASK.expand(3, 6)), r"mask: expected shape \(6,\) or \(2, 6\), got \(3, 6\)"),
    "mask strides": ("argmax_rows", (X, torch.ones(12).bool()[::2]), r"mask: expected a contiguous last dimension"),
    "logits dims": ("repetition_penalty_", (X[0], IDS, OFFSETS, P), r"logits: expected shape \(tokens, vocabulary\)"),
    "logits overlap": (
        "repetition_penalty_",
        (X[:1].expand(2, 6), IDS, OFFSETS, P),
        r"logits: expected rows that do not overlap, got",
    ),
    "ids dtype": ("repetition_penalty_", (X, IDS.short(), OFFSETS, P), r"ids: expected int32 or int64, got"),
    "ids dims": ("repetition_penalty_", (X, IDS[None], OFFSETS, P), r"ids: expected 1 dimension, got 2"),
    "ids strides": ("repetition_penalty_", (X, IDS[::2], OFFSETS, P), r"ids: expected a contiguous tensor, got"),
    "offsets shape": ("repetition_penalty_", (X, IDS, OFFSETS[:2], P), r"offsets: expected shape \(3,?\), got \(2,?\)"),
    "penalty dtype": ("repetition_penalty_", (X, IDS, OFFSETS, P.half()), r"penalty: expected [fF]loat(32)?, got"),
    "penalty shape": ("repetition_penalty_", (X, IDS, OFFSETS, P[:1]), r"penalty: expected shape \(2,?\), got \(1,?\)"),
}
BAD_VALUES = {
    "offsets start": ((X, IDS, OFFSETS + 1, P), r"offsets: expected a list that starts at 0, .*, got 1 at index 0"),
    "offsets fall": ((X, IDS, torch.tensor([0, 3, 2]), P), r"offsets: expected .* never falls .*, got 2 at index 2"),
    "offsets past": ((X, IDS, torch.tensor([0, 3, 4]), P), r"offsets: expected .* within 3, got 4 at index 2"),
    "penalty zero": ((X, IDS, OFFSETS, P * 0), r"penalty: expected positive values, got 0 at index 0"),
    "penalty negative": ((X, IDS, OFFSETS, P - 2.5), r"penalty: expected positive values, got -0.5 at index 0"),
}


@pytest.mark.parametrize("form", ["kernel", "reference", "fake"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    op, args, message = BAD[case]
    function = {"kernel": getattr(OPS, op), "reference": ferrum_ops.OPS[op].ref, "fake": ferrum_ops.OPS[op].fake}
    with pytest.raises(RuntimeError, match=rf"\[{op}\] {message}"):
        function[form](*args)


@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_are_named_and_nothing_is_written(case, form):
    (logits, *rest), message = BAD_VALUES[case]
    function = OPS.repetition_penalty_ if form == "kernel" else sampling.repetition_penalty__ref
    logits = logits.clone()
    with pytest.raises(RuntimeError, match=rf"\[repetition_penalty_\] {message}"):
        function(logits, *rest)
    assert torch.equal(logits, X)


def test_gradients_are_refused():
    logits = torch.ones(2, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"\[repetition_penalty_\] has no backward"):
        ferrum_ops.repetition_penalty_(logits, IDS, OFFSETS, P)
    assert ferrum_ops.argmax_rows(logits).tolist() == [0, 0]  # integers have no gradient


def test_references_trace_whole():
    compiled = torch.compile(sampling.argmax_rows_ref, backend="eager", fullgraph=True)
    logits = torch.randn(3, 64)
    assert torch.equal(compiled(logits), sampling.argmax_rows_ref(logits))
    compiled = torch.compile(sampling.repetition_penalty__ref, backend="eager", fullgraph=True)
    got, expected = X.clone(), X.clone()
    compiled(got, IDS, OFFSETS, P)
    sampling.repetition_penalty__ref(expected, IDS, OFFSETS, P)
    assert torch.equal(got, expected)
