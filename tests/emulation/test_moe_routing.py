"""What the CUDA kernels of the routing family must do beyond the registry's samples: every register count, one launch
and three, ids that no host has checked. Integers are those of the CPU kernels, bit for bit."""

import pytest
import torch

from ferrum_ops.ops import moe_routing
from ferrum_ops.testing.compare import assert_close
from tests.emulation.conftest import GUARD, ORDERS
from tests.emulation.emulator import emulated_op_names
from tests.ops.test_moe_routing import BAD, random_ids

CPU = torch.ops.ferrum


@pytest.fixture(params=ORDERS)
def run(request, emulated):
    """`run(name, *args)` under one order of the threads, tensors between guard pages."""

    def call(name, *args):
        with emulated.guard_pages(GUARD[request.param]):
            args = [a.clone() if isinstance(a, torch.Tensor) and a.is_contiguous() else a for a in args]
            with emulated.schedule(request.param, seed=3):
                return emulated.op(name)(*args)

    return call


def assert_route(run, logits, top_k):
    for renormalize in (True, False):
        ids, weights = run("route_topk_softmax", logits, top_k, renormalize)
        expected_ids, expected = CPU.route_topk_softmax(logits, top_k, renormalize)
        assert torch.equal(ids, expected_ids)
        assert_close("route_topk_softmax", weights, expected, 1e-6)


@pytest.mark.parametrize("experts", [1, 31, 32, 33, 63, 64, 65, 128, 129, 256, 257, 512, 513, 1000, 1024])
def test_route_at_every_register_count(experts, run):
    assert_route(run, torch.randn(5, experts), min(8, experts))


@pytest.mark.parametrize("top_k", [31, 32, 33, 64, 65, 100])
def test_route_of_more_slots_than_lanes(top_k, run):
    assert_route(run, torch.randn(3, 100), top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_route_of_ties_signed_zeros_and_strided_rows(dtype, run):
    assert_route(run, torch.randint(-1, 2, (9, 200)).to(dtype)[:, 7:135], 20)
    zeros = torch.zeros(2, 70, dtype=dtype)
    zeros[:, ::3] = -0.0
    ids, _ = run("route_topk_softmax", zeros, 5, True)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_route_of_nan_and_infinity(dtype, run):
    logits = torch.randn(8, 128).to(dtype)
    logits[0], logits[1], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, ::2], logits[4, 5:100], logits[5, 9] = torch.nan, torch.inf, torch.inf
    logits[6, :120] = -torch.inf
    ids, weights = run("route_topk_softmax", logits, 12, True)
    assert_route(run, logits, 12)
    assert weights.isfinite().all() and ((weights.sum(-1) - 1).abs() < 1e-6).all()
    assert all(len(set(row)) == 12 for row in ids.tolist())
    assert ids[0].tolist() == list(range(12)) and torch.equal(weights[:3], torch.full((3, 12), 1 / 12))


def test_route_of_the_extremes_of_float32(run):
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[-largest, largest, 0.0, -0.0, 1e-45, -1e-45, torch.nan, largest]])
    ids, _ = run("route_topk_softmax", logits, 8, True)
    assert ids.tolist() == [[1, 7, 4, 2, 3, 5, 0, 6]]


# Pairs in one launch (up to 4096 of up to 1024 experts) and in three, and tables for fewer warps.
SORTS = {
    "one pair": (1, 1, 1),
    "a decode step": (1, 8, 128),
    "one step of each warp": (128, 8, 60),
    "the most for one launch": (512, 8, 128),
    "one launch, 1024 experts": (99, 4, 1024),
    "two chunks": (513, 8, 64),
    "three chunks": (4321, 2, 7),
    "experts beyond one launch": (40, 4, 1025),
    "half the warps": (40, 60, 2000),
    "one warp": (30, 7, 40000),
}


@pytest.fixture
def count(run, emulated):
    """As `run`, giving the number of launches beside the result."""

    def call(name, *args):
        before = emulated.launches()
        result = run(name, *args)
        return emulated.launches() - before, result

    return call


@pytest.mark.parametrize("case", SORTS)
def test_pairs_equal_the_cpus(case, count):
    tokens, top_k, experts = SORTS[case]
    for ids in (random_ids(tokens, top_k, experts), torch.full((tokens, top_k), experts - 1).int()):
        launches, got = count("moe_build_pairs_by_token", ids, experts)
        for g, e in zip(got, CPU.moe_build_pairs_by_token(ids, experts), strict=True):
            assert torch.equal(g, e)
        assert launches == (1 if tokens * top_k <= 4096 and experts <= 1024 else 3)


@pytest.mark.parametrize("case", SORTS)
@pytest.mark.parametrize("pair_ids", [True, False])
@pytest.mark.parametrize("mapped", [False, True])
def test_blocks_equal_the_cpus(case, pair_ids, mapped, count):
    tokens, top_k, experts = SORTS[case]
    ids = random_ids(tokens, top_k, experts)
    expert_map = torch.randint(-2, experts + 2, (experts,)).int() if mapped else None  # neither a bijection nor inside
    block_size = moe_routing.BLOCK_SIZES[(tokens + 3 * pair_ids + mapped) % 6]
    launches, got = count("moe_align_block_size", ids, experts, block_size, pair_ids, expert_map)
    for g, e in zip(got, CPU.moe_align_block_size(ids, experts, block_size, pair_ids, expert_map), strict=True):
        assert torch.equal(g, e)
    three = 3 if pair_ids else 6  # packed rows are numbered first
    assert launches == (1 if tokens * top_k <= 4096 and experts <= 1024 else three)


@pytest.mark.parametrize("block_size", moe_routing.BLOCK_SIZES)
@pytest.mark.parametrize("tokens", [9, 1100])
def test_every_block_size_and_an_expert_with_all_pairs(block_size, tokens, run):
    spread = torch.arange(4 * tokens).remainder(20).int().view(tokens, 4)
    for ids in (spread, torch.zeros_like(spread), torch.full_like(spread, 19), torch.full_like(spread, -1)):
        got = run("moe_align_block_size", ids, 20, block_size, True, None)
        for g, e in zip(got, CPU.moe_align_block_size(ids, 20, block_size, True, None), strict=True):
            assert torch.equal(g, e)


# Tokens, slots, experts. One launch holds 16 warps: each token has one, each 32 pairs or experts have one if they can.
ROUTED = {
    "none": (0, 2, 40),
    "one": (1, 8, 128),
    "few": (5, 3, 7),
    "as many warps as tokens": (16, 8, 128),
    "experts beyond the threads": (3, 9, 1024),
    "the most pairs": (16, 128, 130),
    "pairs beyond": (16, 129, 130),
    "tokens beyond": (17, 4, 60),
}


@pytest.mark.parametrize("case", ROUTED)
@pytest.mark.parametrize("renormalize", [True, False])
def test_route_and_align_equal_both_ops(case, renormalize, count):
    """Bit for bit, of any logits."""
    tokens, top_k, experts = ROUTED[case]
    dtype = [torch.float32, torch.float16, torch.bfloat16][(tokens + renormalize) % 3]
    block_size = moe_routing.BLOCK_SIZES[(top_k + renormalize) % 6]
    logits = torch.randn(tokens, experts + 3).to(dtype)[:, 3:]
    logits[2:3], logits[4:5, ::2] = torch.nan, torch.inf
    launches, got = count("route_topk_align", logits, top_k, renormalize, block_size)
    _, (ids, weights) = count("route_topk_softmax", logits, top_k, renormalize)
    _, blocks = count("moe_align_block_size", ids, experts, block_size, True, None)
    for g, e in zip(got, (ids, weights, *blocks), strict=True):
        assert g.dtype == e.dtype and torch.equal(g, e)
    assert launches == (2 if "beyond" in case and tokens > 3 else 1)


@pytest.mark.parametrize("block_size", moe_routing.BLOCK_SIZES)
def test_route_and_align_of_one_choice(block_size, run):
    """All tokens on the same experts, which have one block or two."""
    logits = torch.arange(20.0).expand(16, 20)
    got = run("route_topk_align", logits, 3, True, block_size)
    assert got[0].tolist() == [[19, 18, 17]] * 16
    for g, e in zip(got[2:], CPU.moe_align_block_size(got[0], 20, block_size, True, None), strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("experts", [4, 1500])
def test_no_pairs(experts, run):
    empty = torch.empty(0, 8, dtype=torch.int32)
    pairs, tokens, offsets = run("moe_build_pairs_by_token", empty, experts)
    assert pairs.numel() == tokens.numel() == 0 and torch.equal(offsets, torch.zeros(experts + 1).int())
    sorted_ids, block_ids, total = run("moe_align_block_size", empty, experts, 16, False, None)
    assert sorted_ids.numel() == block_ids.numel() == 0 and total.tolist() == [0]


@pytest.mark.parametrize("outside", [2**31 - 1, -(2**31), 16, -1])
def test_ids_outside_have_no_row(outside, run):
    ids = torch.tensor([[3, outside], [outside, 15]], dtype=torch.int32)
    expert_map = torch.arange(16).int()
    for name, args in (
        ("moe_build_pairs_by_token", (ids, 16)),
        ("moe_align_block_size", (ids, 16, 8, False, expert_map)),
        ("moe_compute_ids_tpe", (ids, 16, [64])),
    ):
        for g, e in zip(run(name, *args), getattr(CPU, name)(*args), strict=True):
            assert torch.equal(g, e)


@pytest.mark.parametrize("name", ["moe_build_pairs_by_token", "moe_align_block_size"])
def test_more_experts_than_a_table_holds_are_refused(name, emulated):
    rest = (16, True, None) if name == "moe_align_block_size" else ()
    with pytest.raises(RuntimeError, match=rf"\[{name}\] num_experts: expected at most 49152 on CUDA, got 49153"):
        emulated.op(name)(torch.zeros(1, 2, dtype=torch.int32), 49153, *rest)


@pytest.mark.parametrize("tokens, top_k, experts", [(1, 8, 128), (100, 3, 9), (700, 4, 3)])
@pytest.mark.parametrize("products", [0, 1, 64, 65])
def test_lists_equal_the_cpus(tokens, top_k, experts, products, count):
    ids, features = random_ids(tokens, top_k, experts), list(range(60, 60 + products))
    launches, got = count("moe_compute_ids_tpe", ids, experts, features)
    for g, e in zip(got, CPU.moe_compute_ids_tpe(ids, experts, features), strict=True):
        assert torch.equal(g, e)
    assert launches == 1 + -(-products // 64)


@pytest.mark.parametrize("case", [case for case, (name, *_) in BAD.items() if name in emulated_op_names()])
def test_bad_input_is_named(case, emulated):
    name, args, message = BAD[case]
    with pytest.raises(RuntimeError, match=rf"\[{name}\] {message}"):
        emulated.op(name)(*args)
