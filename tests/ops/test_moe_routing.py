import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

import ferrum_ops
from ferrum_ops.ops import moe_routing
from ferrum_ops.testing.compare import assert_close, tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.ferrum
ROUTES = {"kernel": OPS.route_topk_softmax, "reference": moe_routing.route_topk_softmax_ref}
form = pytest.mark.parametrize("form", ROUTES)


@form
@pytest.mark.parametrize("renormalize", [False, True])
def test_route_equals_transformers(form, renormalize, isa):
    config = Qwen3MoeConfig(hidden_size=64, num_experts=60, num_experts_per_tok=4, norm_topk_prob=renormalize)
    router = Qwen3MoeTopKRouter(config)
    router.weight.data.normal_()
    with torch.no_grad():
        logits, expected, expected_ids = router(torch.randn(100, 64))
    ids, weights = ROUTES[form](logits, 4, renormalize)
    assert torch.equal(ids.long(), expected_ids)
    assert_close("route_topk_softmax", weights, expected, 1e-6)


@form
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_is_float32_whatever_the_logits(form, dtype, isa):
    logits = torch.randn(50, 128).to(dtype)
    ids, weights = ROUTES[form](logits, 8, True)
    chosen = logits.double().softmax(-1).gather(1, ids.long())
    assert weights.dtype == torch.float32
    assert_close("route_topk_softmax", weights, chosen / chosen.sum(-1, keepdim=True), 1e-6)


@form
def test_ties_go_to_the_lower_id(form, isa):
    logits = torch.zeros(1, 100)
    logits[0, [70, 20, 45]] = 1.0
    ids, _ = ROUTES[form](logits, 6, True)
    assert ids.tolist() == [[20, 45, 70, 0, 1, 2]]


@form
def test_selection_is_descending(form, isa):
    logits = torch.randn(40, 127)
    ids, weights = ROUTES[form](logits, 127, False)
    assert (logits.gather(1, ids.long()).diff() <= 0).all()
    assert torch.equal(ids.sort(-1).values, torch.arange(127).int().expand(40, 127))
    assert_close("route_topk_softmax", weights.sum(-1), torch.ones(40), 1e-6)


@form
@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, [0, 1, 2]),  # every logit NaN
        ({7: 1.0}, [7, 0, 1]),
        ({7: torch.inf, 3: 1.0}, [7, 3, 0]),
        ({7: torch.inf, 3: torch.inf, 5: 3e38}, [3, 7, 5]),
        ({7: -torch.inf, 3: -1e38}, [3, 0, 1]),
    ],
)
def test_nan_and_infinity_leave_ids_distinct_and_weights_finite(form, values, expected, isa):
    logits = torch.full((1, 20), torch.nan)
    for expert, value in values.items():
        logits[0, expert] = value
    ids, weights = ROUTES[form](logits, 3, True)
    assert ids.tolist() == [expected]
    assert weights.isfinite().all() and abs(weights.sum().item() - 1) < 1e-6


@form
def test_all_nan_and_all_infinite_rows_are_uniform(form, isa):
    for value in (torch.nan, torch.inf, -torch.inf):
        ids, weights = ROUTES[form](torch.full((2, 63), value), 4, True)
        assert ids.tolist() == [[0, 1, 2, 3]] * 2
        assert torch.equal(weights, torch.full((2, 4), 0.25))


@form
def test_bad_rows_do_not_disturb_their_neighbours(form, isa):
    logits = torch.randn(3, 64)
    expected = ROUTES[form](logits, 4, True)
    logits[1] = torch.nan
    got = ROUTES[form](logits, 4, True)
    for g, e in zip(got, expected):
        assert torch.equal(g[[0, 2]], e[[0, 2]])


@form
def test_underflow_of_all_but_one(form, isa):
    logits = torch.full((1, 64), -1000.0)
    logits[0, 9] = 1000.0
    ids, weights = ROUTES[form](logits, 3, True)
    assert ids.tolist() == [[9, 0, 1]] and weights.tolist() == [[1.0, 0.0, 0.0]]


@form
def test_limits_of_experts_and_top_k(form, isa):
    ids, _ = ROUTES[form](torch.randn(2, 1024), 1024, False)
    assert torch.equal(ids.sort(-1).values, torch.arange(1024).int().expand(2, 1024))
    assert ROUTES[form](torch.randn(3, 1), 1, True)[1].tolist() == [[1.0]] * 3
    assert [t.shape for t in ROUTES[form](torch.empty(0, 8), 2, True)] == [(0, 2), (0, 2)]


def test_route_depends_on_neither_threads_nor_neighbours(isa):
    logits = torch.randn(300, 128)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OPS.route_topk_softmax(logits, 8, True))
    finally:
        torch.set_num_threads(threads)
    alone = OPS.route_topk_softmax(logits[200:201], 8, True)
    for result in results:
        for t, first, one in zip(result, results[0], alone):
            assert torch.equal(t, first) and torch.equal(t[200:201], one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_router_is_the_product_and_its_routing(dtype, isa):
    x, weight = torch.randn(11, 200).to(dtype), (torch.randn(37, 200) / 14).to(dtype)
    logits, ids, weights = OPS.router_topk_softmax(x, weight, 5, True)
    assert logits.dtype == dtype
    assert_close("router_topk_softmax", logits, x.double() @ weight.double().T, tolerance("router_topk_softmax", dtype))
    for got, expected in zip((ids, weights), OPS.route_topk_softmax(logits, 5, True)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("form", ["kernel", "reference"])
def test_router_of_nan_and_infinity(form, isa):
    router = {"kernel": OPS.router_topk_softmax, "reference": moe_routing.router_topk_softmax_ref}[form]
    x = torch.ones(3, 20)
    x[0, 7], x[2, 3] = torch.nan, torch.inf
    logits, ids, weights = router(x, torch.ones(6, 20), 4, True)
    assert logits[0].isnan().all() and logits[1].eq(20).all() and logits[2].isposinf().all()
    assert ids.tolist() == [[0, 1, 2, 3]] * 3 and torch.equal(weights, torch.full((3, 4), 0.25))


@pytest.mark.parametrize("experts", [128, 13])
def test_router_depends_on_neither_threads_nor_neighbours(experts, isa):
    x, weight = torch.randn(71, 1003), torch.randn(experts, 1003)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OPS.router_topk_softmax(x, weight, 8, True))
    finally:
        torch.set_num_threads(threads)
    for rows in (slice(70, 71), slice(3, 5), slice(9, 15)):
        part = OPS.router_topk_softmax(x[rows], weight, 8, True)
        for result in results:
            for t, few in zip(result, part):
                assert torch.equal(t[rows], few)


BUILDS = {"kernel": OPS.moe_build_pairs_by_token, "reference": moe_routing.moe_build_pairs_by_token_ref}
ALIGNS = {"kernel": OPS.moe_align_block_size, "reference": moe_routing.moe_align_block_size_ref}


def naive_buckets(ids, num_experts):
    buckets = [[] for _ in range(num_experts)]
    for pair, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < num_experts:
            buckets[expert].append(pair)
    return buckets


def random_ids(tokens, top_k, experts):
    return torch.randint(-1, experts + 2, (tokens, top_k)).int()  # -1 and two ids too large


@form
@pytest.mark.parametrize("tokens, top_k, experts", [(1, 1, 1), (63, 8, 128), (100, 3, 7), (127, 2, 1)])
def test_pairs_equal_a_loop(form, tokens, top_k, experts):
    ids = random_ids(tokens, top_k, experts)
    pairs, token_idx, offsets = BUILDS[form](ids, experts)
    buckets = naive_buckets(ids, experts)
    order = [pair for bucket in buckets for pair in bucket]
    expected = torch.full((tokens * top_k,), -1, dtype=torch.int32)
    for row, pair in enumerate(order):
        expected[pair] = row
    assert torch.equal(pairs, expected)
    assert token_idx.tolist() == [p // top_k for p in order] + [-1] * (tokens * top_k - len(order))
    assert offsets.tolist() == torch.tensor([0, *map(len, buckets)]).cumsum(0).tolist()


@form
def test_ids_outside_have_no_row(form):
    ids = torch.tensor([[-1, 4, 2], [2**31 - 1, -(2**31), 0]], dtype=torch.int32)
    pairs, token_idx, offsets = BUILDS[form](ids, 4)
    assert pairs.tolist() == [-1, -1, 1, -1, -1, 0]
    assert token_idx.tolist() == [1, 0, -1, -1, -1, -1]
    assert offsets.tolist() == [0, 1, 1, 2, 2]


@form
def test_pairs_of_no_tokens(form):
    for shape in ((0, 8), (3, 0)):
        pairs, token_idx, offsets = BUILDS[form](torch.empty(shape, dtype=torch.int32), 4)
        assert pairs.shape == token_idx.shape == (0,) and offsets.tolist() == [0] * 5


@form
@pytest.mark.parametrize("block_size", moe_routing.BLOCK_SIZES)
@pytest.mark.parametrize("pair_ids", [True, False])
@pytest.mark.parametrize("mapped", [False, True])
def test_alignment_equals_a_loop(form, block_size, pair_ids, mapped):
    experts, pairs = 20, 90 * 4
    ids = random_ids(90, 4, experts)
    ids[ids == 5] = 6  # an expert without pairs
    expert_map = None
    local = ids
    if mapped:  # this rank holds every third expert
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[::3] = torch.arange(7).int()
        inside = (ids >= 0) & (ids < experts)
        local = torch.where(inside, expert_map[ids.clamp(0, experts - 1).long()], -1)
    entries = torch.arange(pairs) if pair_ids else BUILDS["reference"](ids, experts)[0]
    expected, expected_blocks = [], []
    for expert, bucket in enumerate(naive_buckets(local, experts)):
        blocks = -(-len(bucket) // block_size)
        expected += [int(entries[p]) for p in bucket] + [pairs] * (blocks * block_size - len(bucket))
        expected_blocks += [expert] * blocks

    sorted_ids, block_ids, total = ALIGNS[form](ids, experts, block_size, pair_ids, expert_map)
    capacity = moe_routing.align_capacity(pairs, experts, block_size)
    assert sorted_ids.shape == (capacity,) and block_ids.shape == (capacity // block_size,)
    assert total.tolist() == [len(expected)]
    assert sorted_ids.tolist() == expected + [pairs] * (capacity - len(expected))
    assert block_ids.tolist() == expected_blocks + [-1] * (capacity // block_size - len(expected_blocks))


@form
@pytest.mark.parametrize("block_size", moe_routing.BLOCK_SIZES)
@pytest.mark.parametrize("tokens, top_k, experts", [(1, 8, 128), (7, 3, 5), (200, 2, 9)])
def test_capacity_holds_every_routing(form, block_size, tokens, top_k, experts):
    pairs = tokens * top_k
    capacity = moe_routing.align_capacity(pairs, experts, block_size)
    assert capacity % block_size == 0
    assert 0 <= capacity - min(pairs * block_size, pairs + experts * (block_size - 1)) < block_size
    spread = torch.arange(pairs).remainder(experts).int().view(tokens, top_k)
    for ids in (spread, torch.zeros_like(spread), torch.full_like(spread, experts - 1)):
        sorted_ids, block_ids, total = ALIGNS[form](ids, experts, block_size, True, None)
        assert total.item() <= capacity
        kept = sorted_ids[sorted_ids < pairs]
        assert torch.equal(kept.sort().values, torch.arange(pairs).int())
        used = block_ids[: total.item() // block_size].repeat_interleave(block_size)
        rows = sorted_ids[: total.item()]
        assert torch.equal(used[rows < pairs], ids.flatten()[kept.long()])


@form
def test_alignment_of_no_tokens_and_of_no_kept_pairs(form):
    sorted_ids, block_ids, total = ALIGNS[form](torch.empty(0, 8, dtype=torch.int32), 4, 16, True, None)
    assert sorted_ids.numel() == block_ids.numel() == 0 and total.tolist() == [0]
    sorted_ids, block_ids, total = ALIGNS[form](torch.full((3, 2), -1).int(), 4, 16, True, None)
    assert total.tolist() == [0] and (sorted_ids == 6).all() and (block_ids == -1).all()


@form
def test_local_ids_outside_are_left_out(form):
    expert_map = torch.tensor([3, 4, -2, 0], dtype=torch.int32)  # 4 is no local id of 4 experts
    sorted_ids, block_ids, total = ALIGNS[form](torch.tensor([[0, 1, 2, 3]]).int(), 4, 8, True, expert_map)
    assert total.tolist() == [16] and block_ids[:3].tolist() == [0, 3, -1]
    assert sorted_ids[0] == 3 and sorted_ids[8] == 0


LOGITS, IDS = torch.ones(4, 16), torch.zeros(4, 2, dtype=torch.int32)
MAP = torch.zeros(16, dtype=torch.int32)


@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize("tokens, top_k, experts", [(1, 8, 128), (63, 4, 60), (200, 2, 3), (7, 3, 1)])
def test_ids_per_expert_equal_a_loop(form, tokens, top_k, experts):
    function = OPS.moe_compute_ids_tpe if form == "kernel" else moe_routing.moe_compute_ids_tpe_ref
    ids = random_ids(tokens, top_k, experts)
    ids[ids == 1] = experts  # of another rank
    counts, lists, dispatch = function(ids, experts, [1, 64, 65, 2048])
    buckets = [[p for p, e in enumerate(ids.flatten().tolist()) if e == expert] for expert in range(experts)]
    assert counts.tolist() == [len(bucket) for bucket in buckets]
    assert lists.tolist() == [bucket + [-1] * (ids.numel() - len(bucket)) for bucket in buckets]
    rows = max(1, -(-max(map(len, buckets)) // 32))
    assert dispatch.tolist() == [[rows, columns, experts] for columns in (1, 1, 2, 32)]
    assert {t.dtype for t in (counts, lists, dispatch)} == {torch.int32}


@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize("ids", [torch.empty(0, 8).int(), torch.empty(4, 0).int(), torch.full((3, 2), -1).int()])
def test_ids_per_expert_of_no_pairs(form, ids):
    function = OPS.moe_compute_ids_tpe if form == "kernel" else moe_routing.moe_compute_ids_tpe_ref
    counts, lists, dispatch = function(ids, 5, [100])
    assert counts.tolist() == [0] * 5 and dispatch.tolist() == [[1, 2, 5]]  # a grid is never empty
    assert lists.shape == (5, ids.numel()) and (lists == -1).all()
    assert ferrum_ops.moe_compute_ids_tpe(ids, 5)[2].shape == (0, 3)


@pytest.mark.parametrize("tokens", [0, 3, 16, 40])
@pytest.mark.parametrize("form", ["kernel", "reference"])
def test_route_and_align_are_both_ops(form, tokens):
    function = OPS.route_topk_align if form == "kernel" else moe_routing.route_topk_align_ref
    logits = torch.randn(tokens, 30)[:, 6:]
    ids, weights, *blocks = function(logits, 5, True, 16)
    expected_ids, expected = OPS.route_topk_softmax(logits, 5, True)
    assert torch.equal(ids, expected_ids)
    if tokens:
        assert_close("route_topk_softmax", weights, expected, 1e-6)
    for got, e in zip(blocks, OPS.moe_align_block_size(ids, 24, 16, True, None), strict=True):
        assert got.dtype == e.dtype and torch.equal(got, e)


BAD = {
    "tpe int64 ids": ("moe_compute_ids_tpe", (IDS.long(), 4, []), r"topk_ids: expected [iI]nt(32)?, got"),
    "tpe no experts": ("moe_compute_ids_tpe", (IDS, 0, []), r"num_experts: expected at least 1, got 0"),
    "tpe features": ("moe_compute_ids_tpe", (IDS, 4, [8, 0]), r"out_features: expected at least 1, got 0"),
    "logits dtype": ("route_topk_softmax", (LOGITS.int(), 2, True), r"logits: expected float32, float16 or bfloat16"),
    "logits shape": ("route_topk_softmax", (LOGITS[0], 2, True), r"logits: expected shape \(tokens, experts\) with"),
    "1025 experts": ("route_topk_softmax", (torch.ones(1, 1025), 2, True), r"logits: .*at most 1024 experts, got"),
    "logits stride": ("route_topk_softmax", (LOGITS[:, ::2], 2, True), r"logits: expected a contiguous last dim"),
    "top_k 0": ("route_topk_softmax", (LOGITS, 0, True), r"top_k: expected 1 <= top_k <= 16, got 0"),
    "top_k beyond experts": ("route_topk_softmax", (LOGITS, 17, True), r"top_k: expected 1 <= top_k <= 16, got 17"),
    "aligned dtype": ("route_topk_align", (LOGITS.int(), 2, True, 8), r"logits: expected float32, float16 or bfloat16"),
    "aligned shape": ("route_topk_align", (LOGITS[0], 2, True, 8), r"logits: expected shape \(tokens, experts\) with"),
    "aligned top_k": ("route_topk_align", (LOGITS, 17, True, 8), r"top_k: expected 1 <= top_k <= 16, got 17"),
    "aligned blocks": ("route_topk_align", (LOGITS, 2, True, 24), r"block_size: expected one of \(8, .*\), got 24"),
    "x dtype": ("router_topk_softmax", (LOGITS.int(), LOGITS, 1, True), r"x: expected float32, float16 or bfloat16"),
    "x shape": ("router_topk_softmax", (LOGITS[0], LOGITS, 1, True), r"x: expected shape \(tokens, hidden\), got"),
    "x stride": ("router_topk_softmax", (LOGITS[:, ::2], LOGITS, 1, True), r"x: expected a contiguous last dim"),
    "weight dtype": ("router_topk_softmax", (LOGITS, LOGITS.half(), 1, True), r"weight: expected .*[fF]loat"),
    "weight shape": (
        "router_topk_softmax",
        (LOGITS, LOGITS[0], 1, True),
        r"weight: expected shape \(experts, hidden\)",
    ),
    "weight width": ("router_topk_softmax", (LOGITS, LOGITS[:, :9], 1, True), r"weight: expected shape \(.*16\), got"),
    "weight stride": (
        "router_topk_softmax",
        (LOGITS, torch.ones(16, 4).t(), 1, True),
        r"weight: expected a contiguous tensor",
    ),
    "router of 1025": ("router_topk_softmax", (LOGITS, torch.ones(1025, 16), 1, True), r"weight: .*at most 1024 exp"),
    "router top_k": ("router_topk_softmax", (LOGITS, torch.ones(4, 16), 5, True), r"top_k: expected 1 <= top_k <= 4,"),
    "int64 ids": ("moe_build_pairs_by_token", (IDS.long(), 4), r"topk_ids: expected [iI]nt(32)?, got"),
    "flat ids": ("moe_build_pairs_by_token", (IDS[0], 4), r"topk_ids: expected shape \(tokens, top_k\), got \(2,?\)"),
    "ids stride": ("moe_build_pairs_by_token", (IDS.t(), 4), r"topk_ids: expected a contiguous tensor, got"),
    "no experts": ("moe_build_pairs_by_token", (IDS, 0), r"num_experts: expected at least 1, got 0"),
    "block size": ("moe_align_block_size", (IDS, 16, 24, True, None), r"block_size: expected one of \(8, .*\), got 24"),
    "map dtype": ("moe_align_block_size", (IDS, 16, 8, True, MAP.long()), r"expert_map: expected [iI]nt(32)?, got"),
    "map shape": ("moe_align_block_size", (IDS, 16, 8, True, MAP[:9]), r"expert_map: expected shape \(16,?\), got"),
    "map stride": (
        "moe_align_block_size",
        (IDS, 16, 8, True, torch.zeros(32, dtype=torch.int32)[::2]),
        r"expert_map: expected a contiguous tensor, got",
    ),
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
        ferrum_ops.route_topk_softmax(LOGITS.clone().requires_grad_(), 2)
    with pytest.raises(RuntimeError, match=r"\[route_topk_align\] has no backward"):
        ferrum_ops.route_topk_align(LOGITS.clone().requires_grad_(), 2, True, 8)
    for x, weight in ((LOGITS.clone().requires_grad_(), LOGITS), (LOGITS, LOGITS.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match=r"\[router_topk_softmax\] has no backward"):
            ferrum_ops.router_topk_softmax(x, weight, 1)


def test_references_trace_whole():
    ids = random_ids(9, 3, 7)
    for function, args in (
        (moe_routing.route_topk_softmax_ref, (torch.randn(5, 16), 4, True)),
        (moe_routing.route_topk_align_ref, (torch.randn(5, 16), 4, True, 8)),
        (moe_routing.router_topk_softmax_ref, (torch.randn(5, 16), torch.randn(8, 16), 4, True)),
        (moe_routing.moe_build_pairs_by_token_ref, (ids, 7)),
        (moe_routing.moe_align_block_size_ref, (ids, 7, 16, False, torch.arange(7).int())),
        (moe_routing.moe_compute_ids_tpe_ref, (ids, 7, [64, 100])),
    ):
        for got, expected in zip(torch.compile(function, backend="eager", fullgraph=True)(*args), function(*args)):
            assert torch.equal(got, expected)
