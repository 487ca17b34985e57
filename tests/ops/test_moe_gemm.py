"""moe_experts_int4: the routed experts of a layer as one op, on every instruction level. gptq_moe_gemm and marlin_moe_gemm: one grouped
product against a loop over pairs."""

import pytest
import torch
import torch.nn.functional as F

import ferrum_ops
from ferrum_ops.formats import gptq, int4, marlin
from ferrum_ops.ops.gptq import random_projection
from ferrum_ops.ops.marlin import marlin_workspace
from ferrum_ops.ops.moe_gemm import moe_experts_int4_ref, random_experts, random_gptq_experts
from ferrum_ops.ops.moe_routing import BLOCK_SIZES
from ferrum_ops.testing.compare import assert_close, tolerance
from tests.conftest import isa_levels

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
# Activations are rounded to int8 before each of the two products, half a step of max|x|/127 at most: about 0.5 % each,
# of what the products add up to before they cancel.
INT8_ERROR = 3e-2
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
    weights = random_experts(4, 136, 75, 64, perm_parts=perm_parts)
    weights[1][:, -2:, :, 75 % 16 :] = 0.01  # columns behind the last one never reach the down product
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
    for level in isa_levels():
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


def marlin_experts(experts, in_features, out_features, group_size=32, bits=4, act_order=False, gate_up=False):
    """float64 weights `[E, K, N]` by GPTQ's formula and a stack of the same matrices in the Marlin layout.

    Every expert has its own order. gate_up: the first half of N is gate, the second up, interleaved when packed.
    """
    groups = gptq.num_groups(in_features, group_size)
    weights, stack = [], []
    for _ in range(experts):
        qweight, qzeros, scales = random_projection(in_features, out_features, groups, bits, "cpu")
        g_idx = torch.arange(in_features, dtype=torch.int32) // gptq.effective_group_size(in_features, group_size)
        g_idx = g_idx[torch.randperm(in_features)] if act_order else g_idx
        weights.append(gptq.dequantize(qweight, qzeros, scales.double(), g_idx, bits, 1))
        zeros = gptq.decode_zeros(qzeros, bits, out_features, "gptq")
        if gate_up:
            qweight, scales, zeros = (marlin.interleave_gate_up(*t.chunk(2, -1)) for t in (qweight, scales, zeros))
        perm = gptq.sort_groups(g_idx, in_features, group_size)
        packed = ferrum_ops.marlin_repack(qweight, perm, in_features, out_features, bits)
        scales = ferrum_ops.marlin_permute_scales(scales, in_features, group_size)
        stack.append((packed, scales, marlin.pack_zeros(zeros, bits), perm))
    columns = tuple(None if column[0] is None else torch.stack(column) for column in zip(*stack))
    return torch.stack(weights), columns


def grouped(x, columns, blocks, block_size, out_features, *, top_k=1, group_size=32, bits=4, **options):
    bias, weights = options.pop("bias", None), options.pop("topk_weights", None)
    return ferrum_ops.marlin_moe_gemm(
        x, *columns, bias, *blocks, weights, marlin_workspace("cpu"), top_k, block_size, out_features, group_size, bits,
        **options,
    )  # fmt: skip


def pair_loop(x, ids, weights, top_k):
    """float64 `[P, N]`: pair by pair; pairs without an expert are zero."""
    out = torch.zeros(ids.numel(), weights.shape[-1], dtype=torch.float64)
    for pair, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < len(weights):
            out[pair] = x[pair // top_k].double() @ weights[expert]
    return out


def uneven_ids(tokens, top_k, experts):
    """Distinct ids per token; expert 1 has no pair, and one pair in eight is of no expert here (-1, E, beyond)."""
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int()
    outside = torch.tensor([-1, experts, experts + 7]).int()
    ids[ids == 1] = -1
    return torch.where(torch.rand(ids.shape) < 0.125, outside[torch.randint(3, ids.shape)], ids)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("pair_ids", [True, False], ids=["pairs", "packed rows"])
def test_grouped_product_at_every_block_size(block_size, pair_ids):
    tokens, top_k, experts = 29, 3, 5
    weights, columns = marlin_experts(experts, 64, 128)
    ids = uneven_ids(tokens, top_k, experts)
    blocks = ferrum_ops.moe_align_block_size(ids, experts, block_size, pair_ids)
    x = torch.randn(tokens, 64)
    expected = pair_loop(x, ids, weights, top_k)
    if pair_ids:
        out = grouped(x, columns, blocks, block_size, 128, top_k=top_k)
    else:
        pairs, packed_token_idx, _ = ferrum_ops.moe_build_pairs_by_token(ids, experts)
        gathered = torch.zeros(ids.numel(), 64)
        gathered[: len(packed_token_idx)] = x[packed_token_idx.clamp(0, tokens - 1).long()]
        packed = grouped(gathered, columns, blocks, block_size, 128)
        rows = pairs.flatten().long()
        out = torch.where(rows.unsqueeze(1) >= 0, packed[rows.clamp(min=0)], 0)
    assert_close("marlin_moe_gemm", out, expected)
    assert (out[(ids.flatten() < 0) | (ids.flatten() >= experts)] == 0).all()


@pytest.mark.parametrize("group_size", [-1, 16, 64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
def test_grouped_product_of_every_layout(group_size, bits, act_order):
    weights, columns = marlin_experts(3, 64, 64, group_size, bits, act_order)
    ids = uneven_ids(9, 2, 3)
    blocks = ferrum_ops.moe_align_block_size(ids, 3, 8)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(9, 64).to(dtype)
        out = grouped(x, columns, blocks, 8, 64, top_k=2, group_size=group_size, bits=bits)
        bound = tolerance("marlin_moe_gemm", dtype)
        assert out.dtype == dtype
        assert_close("marlin_moe_gemm", out, pair_loop(x, ids, weights, 2), bound)


def test_bias_comes_before_the_routers_weight():
    weights, columns = marlin_experts(3, 32, 64)
    ids, slot_weights, bias = uneven_ids(6, 2, 3), torch.rand(6, 2), torch.randn(3, 64)
    x, known = torch.randn(6, 32), (ids.flatten() >= 0) & (ids.flatten() < 3)
    blocks = ferrum_ops.moe_align_block_size(ids, 3, 16)
    out = grouped(x, columns, blocks, 16, 64, top_k=2, bias=bias, topk_weights=slot_weights)
    expected = pair_loop(x, ids, weights, 2) + bias.double()[ids.flatten().clamp(0, 2).long()]
    expected = torch.where(known.unsqueeze(1), expected * slot_weights.double().view(-1, 1), 0)
    assert_close("marlin_moe_gemm", out, expected)


@pytest.mark.parametrize("intermediate_size", [32, 20], ids=["whole runs", "part of a run"])
def test_two_products_are_the_routed_block(intermediate_size):
    """gate and up with SiLU in the epilogue, then down with the router's weight."""
    experts, top_k, hidden_size = 4, 2, 64
    w13, first = marlin_experts(experts, hidden_size, 64, gate_up=True)
    w2, second = marlin_experts(experts, 32, hidden_size)
    hidden, ids, slot_weights = torch.randn(11, hidden_size), uneven_ids(11, top_k, experts), torch.rand(11, top_k)
    blocks = ferrum_ops.moe_align_block_size(ids, experts, 16)
    middle = grouped(hidden, first, blocks, 16, intermediate_size, top_k=top_k, epilogue="silu_mul")
    assert middle.shape == (22, intermediate_size)
    slots = grouped(middle, second, blocks, 16, hidden_size, topk_weights=slot_weights)
    out = ferrum_ops.weighted_sum(slots.view(11, top_k, hidden_size), torch.ones(11, top_k))
    expected = torch.zeros(11, hidden_size, dtype=torch.float64)
    for t in range(11):
        for k, e in enumerate(ids[t].tolist()):
            if 0 <= e < experts:
                gate, up = (hidden[t].double() @ w13[e]).chunk(2)
                activated = (F.silu(gate) * up)[:intermediate_size]
                expected[t] += slot_weights[t, k] * (activated @ w2[e][:intermediate_size])
    assert_close("marlin_moe_gemm", out, expected, 4e-6)


def test_blocks_without_an_expert_and_entries_behind_the_end_leave_zeros():
    weights, columns = marlin_experts(3, 32, 64)
    ids = torch.tensor([[0], [1], [2], [0], [1]]).int()
    x = torch.randn(5, 32)
    sorted_token_ids, block_ids, total = ferrum_ops.moe_align_block_size(ids, 3, 8)
    whole = grouped(x, columns, (sorted_token_ids, block_ids, total), 8, 64)
    assert_close("marlin_moe_gemm", whole, pair_loop(x, ids, weights, 1))
    for nobody in (-1, 3, 2**30):
        changed = block_ids.clone()
        changed[1] = nobody
        out = grouped(x, columns, (sorted_token_ids, changed, total), 8, 64)
        assert (out[[1, 4]] == 0).all() and torch.equal(out[[0, 2, 3]], whole[[0, 2, 3]])
    out = grouped(x, columns, (sorted_token_ids, block_ids, torch.tensor([16]).int()), 8, 64)
    assert (out[2] == 0).all() and torch.equal(out[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])
    for padding in (5, 2**30, -1):
        entries = torch.where(sorted_token_ids == 5, padding, sorted_token_ids).int()
        assert torch.equal(grouped(x, columns, (entries, block_ids, total), 8, 64), whole)


def test_an_expert_map_keeps_the_experts_of_this_rank():
    weights, columns = marlin_experts(2, 32, 64)  # experts 1 and 3 of four
    expert_map, local = torch.tensor([-1, 0, -1, 1]).int(), torch.tensor([-1, 0, -1, 1])
    ids = torch.randint(0, 4, (13, 2)).int()
    blocks = ferrum_ops.moe_align_block_size(ids, 4, 8, True, expert_map)
    x = torch.randn(13, 32)
    out = grouped(x, columns, blocks, 8, 64, top_k=2)
    assert_close("marlin_moe_gemm", out, pair_loop(x, local[ids.long()], weights, 2))


def good_grouped():
    _, (packed, scales, zeros, perm) = marlin_experts(3, 32, 64)
    return {
        "x": torch.randn(4, 32),
        "packed": packed,
        "scales": scales,
        "zeros": zeros,
        "perm": perm,
        "bias": None,
        "sorted_token_ids": torch.full((16,), 4, dtype=torch.int32),
        "block_ids": torch.zeros(2, dtype=torch.int32),
        "total_post_pad": torch.tensor([16], dtype=torch.int32),
        "topk_weights": torch.rand(4, 1),
        "workspace": marlin_workspace("cpu"),
        "top_k": 1,
        "block_size": 8,
        "out_features": 64,
        "group_size": 32,
        "bits": 4,
    }


REFUSED_GROUPED = [
    ({"x": torch.zeros(2, 3, 32)}, r"x, top_k: expected \(M, K\)"),
    ({"top_k": 0}, "x, top_k: expected"),
    ({"block_size": 7}, "block_size: expected one of"),
    ({"epilogue": "gelu"}, r"epilogue: expected one of \('none', 'silu_mul'\), got 'gelu'"),
    ({"epilogue": "silu_mul"}, "out_features: expected at most 64 columns of packed, got 128"),
    ({"packed": torch.zeros(2, 128, dtype=torch.int32)}, "packed: expected int32"),
    ({"scales": torch.zeros(2, 1, 64)}, r"scales: expected floating \(3, 1, 64\)"),
    ({"perm": torch.zeros(32, dtype=torch.int32)}, r"perm: expected int32 \(3, 32\)"),
    ({"bias": torch.zeros(64)}, r"bias: expected contiguous floating \(3, 64\)"),
    ({"sorted_token_ids": torch.zeros(16, dtype=torch.int64)}, "sorted_token_ids: expected contiguous int32"),
    ({"block_ids": torch.zeros(3, dtype=torch.int32)}, r"block_ids: expected contiguous int32 \(2,\)"),
    ({"total_post_pad": torch.zeros(2, dtype=torch.int32)}, "total_post_pad: expected contiguous int32"),
    ({"topk_weights": torch.ones(5, 1)}, "topk_weights: expected contiguous float32 with 4 elements"),
    ({"topk_weights": torch.ones(4, 1).half()}, "topk_weights: expected contiguous float32"),
    ({"workspace": torch.zeros(0)}, "workspace: expected int32"),
    ({"slots": 3}, "slots: expected a divisor of 4 rows, from 1 to 1024, got 3"),
    ({"slots": 0}, "slots: expected a divisor of 4 rows"),
    ({"x": torch.zeros(2048, 32), "slots": 2048}, "slots: expected a divisor of 2048 rows, from 1 to 1024"),
]


@pytest.mark.parametrize("change, message", REFUSED_GROUPED)
def test_grouped_product_refuses_by_name(change, message):
    arguments = good_grouped()
    ferrum_ops.marlin_moe_gemm(**arguments)
    with pytest.raises(ValueError, match=r"\[marlin_moe_gemm\] " + message):
        ferrum_ops.marlin_moe_gemm(**{**arguments, **change})


@pytest.mark.parametrize("name", ["x", "topk_weights"])
def test_grouped_product_refuses_to_be_differentiated(name):
    _, columns = marlin_experts(2, 32, 64)
    blocks = ferrum_ops.moe_align_block_size(torch.zeros(4, 1, dtype=torch.int32), 2, 8)
    given = {"x": torch.randn(4, 32), "topk_weights": torch.rand(4, 1)}
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"\[marlin_moe_gemm\] has no backward"):
        grouped(given["x"], columns, blocks, 8, 64, topk_weights=given["topk_weights"])


def good_gptq(tokens=5, top_k=2, experts=3, block_size=16):
    ids = uneven_ids(tokens, top_k, experts)
    qweight, qzeros, scales = random_gptq_experts(experts, 64, 40, 4, 4, "cpu")
    sorted_token_ids, block_ids, total_post_pad = ferrum_ops.moe_align_block_size(ids, experts, block_size)
    g_idx = torch.stack([(torch.arange(64).int() // 16)[torch.randperm(64)] for _ in range(experts)])
    return ids, dict(
        x=torch.randn(tokens, 64),
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        g_idx=g_idx,
        bias=torch.randn(experts, 40),
        sorted_token_ids=sorted_token_ids,
        block_ids=block_ids,
        total_post_pad=total_post_pad,
        topk_weights=torch.rand(tokens, top_k),
        top_k=top_k,
        block_size=block_size,
    )


@pytest.mark.parametrize("block_size", [8, 64])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_stack_equals_one_product_for_each_row(act_order, block_size):
    ids, given = good_gptq(block_size=block_size)
    given["g_idx"] = given["g_idx"] if act_order else None
    out = ferrum_ops.gptq_moe_gemm(**given)
    for p, e in enumerate(ids.flatten().tolist()):
        row = torch.zeros(40)
        if 0 <= e < 3:
            tensors = (given[name][e] for name in ("qweight", "qzeros", "scales"))
            order = given["g_idx"][e] if act_order else None
            row = ferrum_ops.gptq_gemm(given["x"][p // 2], *tensors, order, given["bias"][e])
            row = row * given["topk_weights"].flatten()[p]
        assert_close("gptq_moe_gemm", out[p], row.double())


REFUSED_GPTQ = [
    ({"qweight": torch.zeros(8, 40, dtype=torch.int32)}, r"qweight: expected \(0, rows, columns\), got \(8, 40\)"),
    ({"scales": torch.ones(2, 4, 40)}, r"scales: expected \(3, rows, columns\)"),
    ({"g_idx": torch.zeros(64, dtype=torch.int32)}, r"g_idx: expected \(3, K\), got \(64,\)"),
    ({"qzeros": torch.zeros(3, 4, 6, dtype=torch.int32)}, "qzeros: expected int32"),
    ({"x": torch.randn(5, 63)}, r"x: expected floating \(M, 64\), got float32 \(5, 63\)"),
    ({"bias": torch.randn(40)}, r"bias: expected floating \(3, 40\)"),
    ({"top_k": 0}, "top_k: expected at least 1, got 0"),
    ({"block_size": 24}, "block_size: expected one of"),
    ({"topk_weights": torch.ones(4)}, "topk_weights: expected contiguous float32 with 10 elements"),
    ({"bits": 5}, "bits: expected one of"),
]


@pytest.mark.parametrize("change, message", REFUSED_GPTQ)
def test_gptq_stack_refuses_by_name(change, message):
    _, given = good_gptq()
    with pytest.raises(ValueError, match=r"\[gptq_moe_gemm\] " + message):
        ferrum_ops.gptq_moe_gemm(**{**given, **change})


@pytest.mark.parametrize("name", ["x", "bias", "topk_weights"])
def test_gptq_stack_refuses_to_be_differentiated(name):
    _, given = good_gptq()
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"\[gptq_moe_gemm\] has no backward"):
        ferrum_ops.gptq_moe_gemm(**given)
