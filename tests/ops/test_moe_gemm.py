"""moe_experts_int4: the routed experts of a layer as one op, on every instruction level."""

import pytest
import torch
import torch.nn.functional as F

import ferrum_ops
from ferrum_ops.formats import int4
from ferrum_ops.ops.moe_gemm import moe_experts_int4_ref, random_experts
from ferrum_ops.testing.compare import assert_close

NAMES = [
    "hidden",
    "topk_ids",
    "topk_weights",
    "w13",
    "w13_scales",
    "w13_zeros",
    "w13_perm",
    "w13_group_size",
    "w2",
    "w2_scales",
    "w2_zeros",
    "w2_perm",
    "w2_group_size",
    "intermediate_size",
    "activation",
]
# Activations are rounded to int8 before each of the two products, half a step of max|x|/127 at most: about 0.5 % each.
INT8_ERROR = 2e-2
BOUNDS = {"full": 3e-6, "int8": INT8_ERROR}


def routing(tokens, top_k, experts, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)]).to(torch.int32)
    return ids, torch.rand(tokens, top_k, generator=g)


def dense_weights(weights, hidden_size):
    """float64 `(gate [E, I, H], up [E, I, H], down [E, H, I])` of packed experts."""
    w13, s13, z13, p13, g13, w2, s2, z2, p2, g2, intermediate = weights

    def part(tensor, e, half=None):
        if tensor is None:
            return None
        return tensor[e] if half is None else tensor[e, half::2]

    def matrix(e, half):
        perm = None if p13 is None else p13[e, min(half, p13.shape[1] - 1)]
        tiles = [part(t, e, half) for t in (w13, s13, z13)]
        return int4.dequantize(*tiles, perm, hidden_size, intermediate, g13).T

    experts = range(w13.shape[0])
    gate, up = (torch.stack([matrix(e, half) for e in experts]) for half in (0, 1))
    down = [int4.dequantize(w2[e], s2[e], part(z2, e), part(p2, e), intermediate, hidden_size, g2).T for e in experts]
    return gate, up, torch.stack(down)


def oracle(hidden, ids, slot_weights, weights):
    """A plain loop over the pairs in float64."""
    gate, up, down = dense_weights(weights, hidden.shape[1])
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for t, row in enumerate(ids.tolist()):
        for k, e in enumerate(row):
            if 0 <= e < gate.shape[0]:
                x = hidden[t].double()
                out[t] += slot_weights[t, k].double() * (down[e] @ (F.silu(gate[e] @ x) * (up[e] @ x)))
    return out


def experts(hidden, ids, slot_weights, weights, activation):
    return ferrum_ops.moe_experts_int4(hidden, ids, slot_weights, *weights, activation)


@pytest.mark.parametrize("activation", ["int8", "full"])
@pytest.mark.parametrize("perm_parts", [0, 1, 2], ids=["ordered", "shared_order", "own_orders"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize(
    "hidden_size, intermediate_size, group_size", [(128, 64, 128), (72, 40, 8), (200, 24, 64), (96, 104, 32)]
)
def test_equals_loop_over_pairs(isa, hidden_size, intermediate_size, group_size, asymmetric, perm_parts, activation):
    weights = random_experts(
        4, hidden_size, intermediate_size, group_size, asymmetric=asymmetric, perm_parts=perm_parts
    )
    for tokens in (1, 9):
        ids, slot_weights = routing(tokens, 3, 4)
        hidden = torch.randn(tokens, hidden_size)
        out = experts(hidden, ids, slot_weights, weights, activation)
        assert_close("moe_experts_int4", out, oracle(hidden, ids, slot_weights, weights), BOUNDS[activation])


@pytest.mark.parametrize("activation", ["int8", "full"])
@pytest.mark.parametrize("tokens", [65, 130])
def test_all_tokens_on_one_expert(isa, tokens, activation):
    weights = random_experts(3, 64, 40, 32, asymmetric=True)
    ids = torch.full((tokens, 1), 1, dtype=torch.int32)
    hidden, slot_weights = torch.randn(tokens, 64), torch.rand(tokens, 1)
    out = experts(hidden, ids, slot_weights, weights, activation)
    assert_close("moe_experts_int4", out, oracle(hidden, ids, slot_weights, weights), BOUNDS[activation])


def test_more_tokens_than_one_chunk():
    weights = random_experts(4, 32, 16, 32)
    ids, slot_weights = routing(1100, 2, 4)
    hidden = torch.randn(1100, 32)
    out = experts(hidden, ids, slot_weights, weights, "int8")
    assert torch.equal(out[1024:], experts(hidden[1024:], ids[1024:], slot_weights[1024:], weights, "int8"))
    assert_close("moe_experts_int4", out, oracle(hidden, ids, slot_weights, weights), INT8_ERROR)


@pytest.mark.parametrize("skipped", [-1, 4, -(2**31), 2**31 - 1])
def test_ids_outside_the_experts_are_skipped(isa, skipped):
    weights = random_experts(4, 64, 32, 32)
    ids, slot_weights = routing(6, 3, 4)
    hidden = torch.randn(6, 64)
    kept = slot_weights.clone()
    kept[:, 1] = 0
    ids_with_gap = ids.clone()
    ids_with_gap[:, 1] = skipped
    slot_weights[:, 1] = float("nan")  # the weight of a skipped slot is not looked at
    out = experts(hidden, ids_with_gap, slot_weights, weights, "int8")
    assert torch.equal(out, experts(hidden, ids, kept, weights, "int8"))
    assert (experts(hidden, torch.full_like(ids, skipped), slot_weights, weights, "int8") == 0).all()


@pytest.mark.parametrize("activation", ["int8", "full"])
@pytest.mark.parametrize("perm_parts", [0, 2])
def test_a_token_does_not_depend_on_the_batch(isa, activation, perm_parts):
    weights = random_experts(4, 136, 72, 64, perm_parts=perm_parts)
    ids, slot_weights = routing(90, 2, 4)
    hidden = torch.randn(90, 136)
    whole = experts(hidden, ids, slot_weights, weights, activation)
    order = torch.randperm(90)
    assert torch.equal(experts(hidden[order], ids[order], slot_weights[order], weights, activation), whole[order])
    for tokens in (1, 2, 5, 8, 30):
        part = experts(hidden[:tokens], ids[:tokens], slot_weights[:tokens], weights, activation)
        assert torch.equal(part, whole[:tokens])


@pytest.mark.parametrize("activation", ["int8", "full"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_number_of_threads_does_not_matter(isa, activation, tokens):
    weights = random_experts(8, 512, 256, 128)
    ids, slot_weights = routing(tokens, 4, 8)
    hidden = torch.randn(tokens, 512)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(experts(hidden, ids, slot_weights, weights, activation))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_has_the_same_bits_on_every_level(dtype):
    weights = random_experts(4, 200, 72, 64, asymmetric=True, perm_parts=2)
    ids, slot_weights = routing(33, 3, 4)
    hidden = torch.randn(33, 200).to(dtype)
    results = []
    for level in ferrum_ops.CPU_ISA_LEVELS[: ferrum_ops.CPU_ISA_LEVELS.index(ferrum_ops.cpu_isa()) + 1]:
        with ferrum_ops.use_cpu_isa(level):
            results.append(experts(hidden, ids, slot_weights, weights, "int8"))
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("activation", ["int8", "full"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_token(isa, activation, bad):
    weights = random_experts(2, 64, 32, 32)
    ids, slot_weights = routing(7, 2, 2)
    hidden = torch.randn(7, 64)
    clean = experts(hidden, ids, slot_weights, weights, activation)
    hidden[3, 5] = bad
    out = experts(hidden, ids, slot_weights, weights, activation)
    others = torch.arange(7) != 3
    assert torch.equal(out[others], clean[others])
    assert out[3].isnan().all()


@pytest.mark.parametrize("value", [-200.0, -90.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 90.0, 200.0])
def test_silu_over_its_range(isa, value):
    """One channel in, gate = value and up = 1, one channel out."""
    weights = list(random_experts(1, 8, 8, 8))
    column = int4.pack(torch.full((1, 8), 0x88888889 - 2**32, dtype=torch.int32), None, 8)
    weights[0] = int4.interleave_tiles(column, column)[None]
    weights[1] = torch.ones_like(weights[1])
    weights[5], weights[6] = column[None], torch.ones_like(weights[6])
    hidden = torch.zeros(1, 8)
    hidden[0, 0] = value
    ids, slot_weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    out = experts(hidden, ids, slot_weights, tuple(weights), "full")
    x = torch.tensor(value, dtype=torch.float64)
    torch.testing.assert_close(out[0].double(), (F.silu(x) * x).expand(8), rtol=1e-6, atol=1e-30)


def good():
    ids, slot_weights = routing(5, 2, 3)
    weights = random_experts(3, 64, 40, 32, asymmetric=True, perm_parts=2)
    return dict(zip(NAMES, (torch.randn(5, 64), ids, slot_weights, *weights, "int8")))


def with_entry(perm, value):
    perm = perm.clone()
    perm.view(-1)[3] = value
    return perm


ARGUMENTS = good()
OUT_OF_RANGE_USED = torch.zeros(5, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("hidden", torch.zeros(5, 64, dtype=torch.float64), "expected float32, float16 or bfloat16, got Double"),
        ("hidden", torch.zeros(64), r"expected shape \(\*, \*\), got \(64\)"),
        ("hidden", torch.zeros(64, 5).T, "expected a contiguous tensor"),
        ("topk_ids", torch.zeros(5, 2, dtype=torch.int64), "expected Int, got Long"),
        ("topk_ids", torch.zeros(4, 2, dtype=torch.int32), r"expected shape \(5, \*\), got \(4, 2\)"),
        ("topk_ids", torch.zeros(2, 5, dtype=torch.int32).T, "expected a contiguous tensor"),
        ("topk_weights", torch.zeros(5, 2).half(), "expected Float, got Half"),
        ("topk_weights", torch.zeros(5, 3), r"expected shape \(5, 2\), got \(5, 3\)"),
        ("topk_weights", torch.zeros(2, 5).T, "expected a contiguous tensor"),
        ("w13", ARGUMENTS["w13"][0], r"expected shape \(\*, \*, \*, 64\)"),
        ("w13", ARGUMENTS["w13"][:, :4].contiguous(), r"expected shape \(3, 6, 8, 64\), got \(3, 4, 8, 64\)"),
        ("w13", ARGUMENTS["w13"].float(), "expected Byte, got Float"),
        ("w13_scales", ARGUMENTS["w13_scales"].float(), "expected Half, got Float"),
        ("w13_scales", ARGUMENTS["w13_scales"][:2], r"expected shape \(3, 6, 2, 16\), got \(2, 6, 2, 16\)"),
        ("w13_zeros", ARGUMENTS["w13_zeros"][:, :2].contiguous(), r"expected shape \(3, 6, 2, 16\)"),
        ("w13_perm", ARGUMENTS["w13_perm"].long(), "expected Int, got Long"),
        ("w13_perm", ARGUMENTS["w13_perm"][:, 0], "expected 3 dimensions"),
        ("w13_perm", torch.zeros(3, 3, 64, dtype=torch.int32), r"expected shape \(3, 1 or 2, K_packed\)"),
        ("w13_perm", torch.zeros(3, 2, 60, dtype=torch.int32), "expected K_packed a multiple of 8"),
        ("w13_perm", with_entry(ARGUMENTS["w13_perm"], 64), "expected entries from -1 to 63"),
        ("w13_group_size", 20, "expected a multiple of 8 from 8 to 128, got 20"),
        ("w2", ARGUMENTS["w2"][:, :3].contiguous(), r"expected shape \(3, 4, 8, 64\), got \(3, 3, 8, 64\)"),
        ("w2_scales", ARGUMENTS["w2_scales"][..., :8].contiguous(), r"expected shape \(3, 4, 2, 16\)"),
        ("w2_zeros", ARGUMENTS["w2_zeros"].int(), "expected Byte, got Int"),
        ("w2_perm", ARGUMENTS["w2_perm"][:2], r"expected shape \(3, 64\), got \(2, 64\)"),
        ("w2_perm", with_entry(ARGUMENTS["w2_perm"], -2), "expected entries from -1 to 39"),
        ("w2_group_size", 256, "expected a multiple of 8 from 8 to 128, got 256"),
        ("intermediate_size", 0, "expected at least 1, got 0"),
        ("activation", "bf16", 'expected "int8" or "full", got "bf16"'),
    ],
)
def test_bad_argument_is_named(argument, value, message):
    arguments = dict(ARGUMENTS, topk_ids=OUT_OF_RANGE_USED)  # expert 0, whose permutations are damaged, is in use
    ferrum_ops.moe_experts_int4(**arguments)
    arguments[argument] = value
    with pytest.raises(RuntimeError, match=rf"\[moe_experts_int4\] {argument}: {message}"):
        ferrum_ops.moe_experts_int4(**arguments)


def test_refuses_grad():
    arguments = dict(ARGUMENTS, hidden=ARGUMENTS["hidden"].clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"\[moe_experts_int4\] has no backward"):
        ferrum_ops.moe_experts_int4(**arguments)


def test_reference_equals_loop_over_pairs():
    weights = random_experts(3, 72, 40, 8, asymmetric=True, perm_parts=2)
    ids, slot_weights = routing(5, 2, 3)
    hidden = torch.randn(5, 72, dtype=torch.float64)
    out = moe_experts_int4_ref(hidden, ids, slot_weights, *weights, "full")
    assert_close("moe_experts_int4", out, oracle(hidden, ids, slot_weights, weights), 1e-12)
