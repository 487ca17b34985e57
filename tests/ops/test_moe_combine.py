import pytest
import torch

import ferrum_ops
from ferrum_ops.ops import moe_combine
from ferrum_ops.testing.compare import assert_close, tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.ferrum


def naive_combine(packed, pairs, weights):
    out = torch.zeros(weights.shape[0], packed.shape[1], dtype=torch.float64)
    for t in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            row = int(pairs[t * weights.shape[1] + j])
            if 0 <= row < packed.shape[0]:
                out[t] += weights[t, j].double() * packed[row].double()
    return out


def test_references_equal_a_loop_in_float64():
    packed, weights = torch.randn(20, 63, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64)
    pairs = torch.randint(-2, 23, (24,)).int()
    expected = naive_combine(packed, pairs, weights)
    assert_close("moe_combine", moe_combine.moe_combine_ref(packed, pairs, weights), expected, 1e-14)
    slots = torch.randn(6, 4, 63, dtype=torch.float64)
    expected = torch.einsum("tk,tkh->th", weights, slots)
    assert_close("weighted_sum", moe_combine.weighted_sum_ref(slots, weights), expected, 1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_undoes_the_packed_order(dtype, isa):
    ids = torch.randint(0, 16, (30, 4)).int()
    pairs, _, _ = OPS.moe_build_pairs_by_token(ids, 16)
    slots, weights = torch.randn(120, 127).to(dtype), torch.rand(30, 4)
    packed = torch.empty_like(slots)
    packed[pairs.long()] = slots
    assert torch.equal(OPS.moe_combine(packed, pairs, weights), OPS.weighted_sum(slots.view(30, 4, 127), weights))


@pytest.mark.parametrize("outside", [-1, -7, 6, 2**31 - 1, -(2**31)])
def test_pair_outside_is_skipped_whatever_its_weight(outside, isa):
    packed, weights = torch.randn(6, 63), torch.rand(3, 2)
    pairs = torch.tensor([0, 1, 2, outside, 4, 5], dtype=torch.int32)
    weights[1, 1] = torch.nan
    got = OPS.moe_combine(packed, pairs, weights)
    assert_close("moe_combine", got, naive_combine(packed, pairs, weights))
    assert_close("moe_combine", moe_combine.moe_combine_ref(packed, pairs, weights), got, 1e-6)


def test_nan_in_an_unused_row_is_not_read(isa):
    packed = torch.randn(4, 100)
    packed[2] = torch.nan
    assert OPS.moe_combine(packed, torch.tensor([0, 3, -1, 1]).int(), torch.rand(2, 2)).isfinite().all()


def test_nan_in_a_used_row_reaches_its_token_only(isa):
    packed = torch.randn(4, 100)
    packed[2, 99] = torch.nan
    nan = OPS.moe_combine(packed, torch.tensor([0, 3, 2, 1]).int(), torch.rand(2, 2)).isnan()
    assert nan[1, 99] and nan.sum() == 1
    slots = torch.randn(2, 2, 100)
    slots[1, 0, 3] = torch.nan
    nan = OPS.weighted_sum(slots, torch.rand(2, 2)).isnan()
    assert nan[1, 3] and nan.sum() == 1


def test_token_without_pairs_is_zero(isa):
    got = OPS.moe_combine(torch.randn(4, 100), torch.full((4,), -1, dtype=torch.int32), torch.rand(2, 2))
    assert torch.equal(got, torch.zeros(2, 100))
    assert torch.equal(OPS.moe_combine(torch.empty(0, 9), torch.zeros(2).int(), torch.rand(1, 2)), torch.zeros(1, 9))
    assert torch.equal(OPS.weighted_sum(torch.empty(3, 0, 9), torch.empty(3, 0)), torch.zeros(3, 9))


def test_no_tokens(isa):
    none = torch.empty(0, dtype=torch.int32)
    assert OPS.moe_combine(torch.randn(4, 63), none, torch.empty(0, 2)).shape == (0, 63)
    assert OPS.weighted_sum(torch.empty(0, 2, 63), torch.empty(0, 2)).shape == (0, 63)


def test_order_of_the_sum_is_ascending(isa):
    # 1e8 + 1 - 1e8 is 0 in float32 in this order and 1 in any order that adds the large ones first.
    slots = torch.tensor([1e8, 1.0, -1e8]).view(1, 3, 1).expand(1, 3, 160).contiguous()
    assert torch.equal(OPS.weighted_sum(slots, torch.ones(1, 3)), torch.zeros(1, 160))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_every_16_bit_value_is_read_and_written_exactly(dtype, isa):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for size in (2**16, 2**16 - 7):  # whole vectors, and a tail
        got = OPS.weighted_sum(values[:size].view(1, 1, size), torch.ones(1, 1))[0]
        assert torch.equal(got.isnan(), values[:size].isnan())
        assert torch.equal(got.nan_to_num(nan=0.0), values[:size].nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_nan_with_every_bit_set_stays_nan(dtype, isa):
    # Rounded as a number, its bits would carry into the sign.
    weights = torch.tensor([[2**31 - 1]], dtype=torch.int32).view(torch.float32)
    assert OPS.weighted_sum(torch.ones(1, 1, 23, dtype=dtype), weights).isnan().all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_results_are_rounded_to_nearest_even(dtype, isa):
    a, b = torch.randint(-(2**15), 2**15, (2, 200_003)).to(torch.int16).view(dtype).unbind()
    b[::2] = a[::2] * 2**-9  # around half a unit in the last place of a
    expected = (a.float() + b.float()).to(dtype)
    got = OPS.weighted_sum(torch.stack((a, b))[None], torch.ones(1, 2))[0]
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_depends_on_neither_threads_nor_neighbours(dtype, isa):
    slots, weights = torch.randn(200, 4, 160).to(dtype), torch.rand(200, 4)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OPS.weighted_sum(slots, weights))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(OPS.weighted_sum(slots[99:100], weights[99:100]), results[0][99:100])
    expected = torch.einsum("tk,tkh->th", weights.double(), slots.double())
    assert_close("weighted_sum", results[0], expected, tolerance("weighted_sum", dtype))


PACKED, PAIRS, WEIGHTS, SLOTS = torch.ones(6, 8), torch.zeros(6).int(), torch.ones(3, 2), torch.ones(3, 2, 8)
RESIDUAL, NORM_WEIGHT = torch.ones(3, 8), torch.ones(8)
UPDATE, UPDATE_NORM = "weighted_sum_residual_", "weighted_sum_residual_norm_"
BAD = {
    "residual dtype": (UPDATE, (RESIDUAL.half(), SLOTS, WEIGHTS), r"residual: expected .*[fF]loat.*, got"),
    "residual shape": (UPDATE, (RESIDUAL[:2], SLOTS, WEIGHTS), r"residual: expected shape \(3, 8\), got \(2, 8\)"),
    "residual stride": (UPDATE, (torch.ones(8, 3).t(), SLOTS, WEIGHTS), r"residual: expected a contiguous last dim"),
    "residual rows": (UPDATE, (RESIDUAL[:1].expand(3, 8), SLOTS, WEIGHTS), r"residual: expected rows that do not"),
    "update slots": (UPDATE, (RESIDUAL, PACKED, WEIGHTS), r"slots: expected shape \(tokens, top_k, hidden\), got"),
    "norm weight": (
        UPDATE_NORM,
        (RESIDUAL, SLOTS, WEIGHTS, NORM_WEIGHT[:3], torch.ones(3, 8), 1e-6),
        r"norm_weight: expected shape \(8,?\), got \(3,?\)",
    ),
    "norm out": (
        UPDATE_NORM,
        (RESIDUAL, SLOTS, WEIGHTS, NORM_WEIGHT, torch.ones(2, 8), 1e-6),
        r"out: expected shape \(3, 8\), got \(2, 8\)",
    ),
    "norm out dtype": (
        UPDATE_NORM,
        (RESIDUAL, SLOTS, WEIGHTS, NORM_WEIGHT, torch.ones(3, 8).half(), 1e-6),
        r"out: expected .*[fF]loat.*, got",
    ),
    "norm out stride": (
        UPDATE_NORM,
        (RESIDUAL, SLOTS, WEIGHTS, NORM_WEIGHT, torch.ones(3, 16)[:, ::2], 1e-6),
        r"out: expected a contiguous tensor, got",
    ),
    "integers": ("moe_combine", (PACKED.int(), PAIRS, WEIGHTS), r"packed: expected float32, float16 or bfloat16"),
    "packed shape": ("moe_combine", (SLOTS, PAIRS, WEIGHTS), r"packed: expected shape \(rows, hidden\), got"),
    "packed stride": ("moe_combine", (PACKED[:, ::2], PAIRS, WEIGHTS), r"packed: expected a contiguous last dim"),
    "pairs dtype": ("moe_combine", (PACKED, PAIRS.long(), WEIGHTS), r"pairs_by_token: expected [iI]nt(32)?, got"),
    "pairs shape": ("moe_combine", (PACKED, PAIRS[:5], WEIGHTS), r"pairs_by_token: expected shape \(6,?\), got"),
    "weights dtype": ("moe_combine", (PACKED, PAIRS, WEIGHTS.half()), r"topk_weights: expected [fF]loat(32)?, got"),
    "weights shape": ("moe_combine", (PACKED, PAIRS, WEIGHTS[0]), r"topk_weights: expected shape \(tokens, top_k\)"),
    "weights stride": ("moe_combine", (PACKED, PAIRS, torch.ones(2, 3).t()), r"topk_weights: expected a contiguous"),
    "slots shape": ("weighted_sum", (PACKED, WEIGHTS), r"slots: expected shape \(tokens, top_k, hidden\), got"),
    "slots stride": ("weighted_sum", (SLOTS[..., ::2], WEIGHTS), r"slots: expected a contiguous last dimension"),
    "slot count": ("weighted_sum", (SLOTS, torch.ones(3, 4)), r"weights: expected shape \(3, 2\), got \(3, 4\)"),
}


@pytest.mark.parametrize("form", ["kernel", "reference", "fake"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    op, args, message = BAD[case]
    function = {"kernel": getattr(OPS, op), "reference": ferrum_ops.OPS[op].ref, "fake": ferrum_ops.OPS[op].fake}
    with pytest.raises(RuntimeError, match=rf"\[{op}\] {message}"):
        function[form](*args)


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match="has no backward"):
        ferrum_ops.moe_combine(PACKED, PAIRS, WEIGHTS.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="has no backward"):
        ferrum_ops.weighted_sum(SLOTS.clone().requires_grad_(), WEIGHTS)

    for function, rest in (
        (ferrum_ops.weighted_sum_residual_, ()),
        (ferrum_ops.weighted_sum_residual_norm_, (NORM_WEIGHT,)),
    ):
        with pytest.raises(RuntimeError, match="has no backward"):
            function(RESIDUAL.clone(), SLOTS, WEIGHTS.clone().requires_grad_(), *rest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_the_sum_rounded_once_and_nothing_else_is_written(dtype, isa):
    slots, weights = torch.randn(6, 4, 127).to(dtype), torch.rand(6, 4)
    storage = torch.randn(6, 200).to(dtype)
    before = storage.clone()
    assert ferrum_ops.weighted_sum_residual_(storage[:, 30:157], slots, weights) is None
    expected = before[:, 30:157].double() + torch.einsum("tk,tkh->th", weights.double(), slots.double())
    assert_close(UPDATE, storage[:, 30:157], expected, tolerance(UPDATE, dtype))
    assert torch.equal(storage[:, :30], before[:, :30]) and torch.equal(storage[:, 157:], before[:, 157:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_the_residual_is_the_same_residual_and_its_norm(dtype, isa):
    slots, weights, norm_weight = torch.randn(6, 4, 127).to(dtype), torch.rand(6, 4), torch.randn(127)
    residual = torch.randn(6, 127).to(dtype)
    updated = residual.clone()
    ferrum_ops.weighted_sum_residual_(updated, slots, weights)
    total = residual.double() + torch.einsum("tk,tkh->th", weights.double(), slots.double())
    normed = ferrum_ops.weighted_sum_residual_norm_(residual, slots, weights, norm_weight, 1e-5)
    assert torch.equal(residual, updated)
    expected = torch.nn.functional.rms_norm(total, (127,), norm_weight.double(), 1e-5)
    assert_close(UPDATE_NORM, normed, expected, tolerance(UPDATE_NORM, dtype))


@pytest.mark.parametrize("form", ["kernel", "reference"])
def test_residual_is_normalised_before_it_is_rounded(form, isa):
    # As in fused_add_rms_norm: 257 is no bfloat16, and the norm of the rounded 256 has another last bit.
    residual, out = torch.tensor([[256.0, 1.0]]).bfloat16(), torch.empty(1, 2).bfloat16()
    slots, weights = torch.tensor([[[1.0, 0.0]]]).bfloat16(), torch.ones(1, 1)
    function = OPS.weighted_sum_residual_norm_ if form == "kernel" else moe_combine.weighted_sum_residual_norm__ref
    function(residual, slots, weights, torch.ones(2), out, 0.0)
    exact = torch.tensor([[257.0, 1.0]], dtype=torch.float64)
    assert torch.equal(out, (exact / exact.square().mean().sqrt()).bfloat16())
    assert residual.tolist() == [[256.0, 1.0]]


def test_residual_without_tokens_or_slots(isa):
    residual = torch.randn(3, 8)
    before = residual.clone()
    ferrum_ops.weighted_sum_residual_(residual, torch.empty(3, 0, 8), torch.empty(3, 0))
    assert torch.equal(residual, before)
    normed = ferrum_ops.weighted_sum_residual_norm_(residual, torch.empty(3, 0, 8), torch.empty(3, 0), torch.ones(8))
    assert torch.equal(normed, OPS.rms_norm(before, torch.ones(8), 1e-6))
    assert ferrum_ops.weighted_sum_residual_norm_(
        residual[:0], torch.empty(0, 2, 8), torch.empty(0, 2), torch.ones(8)
    ).shape == (0, 8)


def test_norm_into_the_residual_is_refused():
    residual = RESIDUAL.clone()
    with pytest.raises(RuntimeError, match=r"\[weighted_sum_residual_norm_\] out: expected other memory than that of"):
        OPS.weighted_sum_residual_norm_(residual, SLOTS, WEIGHTS, NORM_WEIGHT, residual, 1e-6)


def test_updates_compile_whole():
    def function(residual):
        ferrum_ops.weighted_sum_residual_(residual, SLOTS, WEIGHTS)
        return ferrum_ops.weighted_sum_residual_norm_(residual, SLOTS, WEIGHTS, NORM_WEIGHT), residual * 2

    got = torch.compile(function, backend="aot_eager", fullgraph=True)(RESIDUAL.clone())
    for g, e in zip(got, function(RESIDUAL.clone())):
        assert torch.equal(g, e)


def test_references_trace_whole():
    compiled = torch.compile(moe_combine.moe_combine_ref, backend="eager", fullgraph=True)
    args = (torch.randn(6, 8), torch.tensor([0, 5, -1, 2, 6, 1]).int(), torch.rand(3, 2))
    assert torch.equal(compiled(*args), moe_combine.moe_combine_ref(*args))
