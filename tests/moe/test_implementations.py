"""The three implementations agree at pinned routing, in every layout and at every routing that is easy to get wrong."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import ferrum_ops
from ferrum_models.moe import (
    IMPLEMENTATIONS,
    DenseExpertWeights,
    ExpertWeights,
    FusedConfig,
    GptqExpertWeights,
    Int4ExpertWeights,
    MarlinExpertWeights,
    build_device_plan,
    build_host_plan,
    dequantized,
    pick_fused_config,
    pick_moe_block_size,
    profile,
    run_experts,
)
from ferrum_ops.formats import gptq, int4, marlin
from ferrum_ops.ops.marlin import random_marlin
from ferrum_ops.testing.compare import assert_close, relative_error

E, K, H, I, GROUP = 6, 2, 48, 40, 16


def random_gptq(in_features, out_features):
    groups = -(-in_features // GROUP)
    codes = torch.randint(0, 16, (in_features, out_features), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (groups, out_features), dtype=torch.uint8)
    scales = (torch.rand(groups, out_features) * 0.02 + 0.01).half()
    g_idx = (torch.arange(in_features, dtype=torch.int32) // GROUP)[torch.randperm(in_features)]
    return gptq.pack_rows(codes, 4), gptq.encode_zeros(zeros, 4, "gptq"), scales, g_idx


def make_gptq() -> GptqExpertWeights:
    tensors = {}
    for name, sizes in (("gate", (H, I)), ("up", (H, I)), ("down", (I, H))):
        stacked = zip(*(random_gptq(*sizes) for _ in range(E)))
        for part, values in zip(("qweight", "qzeros", "scales", "g_idx"), stacked):
            tensors[f"{name}_{part}"] = torch.stack(list(values))
    return GptqExpertWeights(**tensors, bits=4, zero_offset=1)


def make_dense(weights: GptqExpertWeights, dtype=torch.float32) -> DenseExpertWeights:
    def stack(name):
        return torch.stack([weights._weight(name, e, dtype).T for e in range(E)])

    return DenseExpertWeights(torch.cat([stack("gate"), stack("up")], dim=1), stack("down").contiguous())


def make_int4(weights: GptqExpertWeights, activation: str) -> Int4ExpertWeights:
    def pack(name, in_features):
        parts = []
        for e in range(E):
            qweight, qzeros, scales, g_idx = (
                getattr(weights, f"{name}_{part}")[e] for part in ("qweight", "qzeros", "scales", "g_idx")
            )
            perm = gptq.sort_groups(g_idx, in_features, GROUP)
            zeros = gptq.decode_zeros(qzeros, 4, scales.shape[1], "gptq")
            packed = ferrum_ops.int4_pack(qweight, perm, in_features)
            parts.append((packed, int4.pack_groups(scales), int4.pack_groups(zeros), perm))
        return [torch.stack(list(values)) for values in zip(*parts)]

    gate, up, down = pack("gate", H), pack("up", H), pack("down", I)
    w13 = [torch.stack([g, u], dim=2).flatten(1, 2) for g, u in zip(gate[:3], up[:3])]
    perm13 = torch.stack([gate[3], up[3]], dim=1)
    return Int4ExpertWeights(
        *w13, perm13, *down, GROUP, GROUP, hidden_size=H, intermediate_size=I, activation=activation
    )


def make_marlin(weights: GptqExpertWeights, **settings) -> MarlinExpertWeights:
    """Groups of 16, which no checkpoint gets in this layout, but the ops have: the sizes of the other layouts."""

    def pack(name, in_features, perm_rows):
        parts = []
        for e in range(E):
            qweight, qzeros, scales, g_idx = (
                getattr(weights, f"{name}_{part}")[e] for part in ("qweight", "qzeros", "scales", "g_idx")
            )
            columns = scales.shape[1]
            pad = (0, 64 - columns)
            perm = gptq.sort_groups(g_idx, in_features, GROUP)
            zeros = gptq.pack_columns(F.pad(gptq.decode_zeros(qzeros, 4, columns, "gptq"), pad), 4)
            parts.append(
                (
                    marlin.repack(F.pad(qweight, pad), perm, in_features, 64, 4),
                    marlin.permute_scales(F.pad(scales, pad), perm_rows, GROUP),
                    marlin.repack_zeros(zeros, 64, 4, 0),
                    perm,
                )
            )
        return [torch.stack(list(values)) for values in zip(*parts)]

    # Orders of their own: gate and up are two matrices. I = 40 rows are three groups of 16.
    halves = zip(pack("gate", H, H), pack("up", H, H))
    w13 = [torch.stack(pair) for pair in halves]
    sizes = {"hidden_size": H, "intermediate_size": I, "top_k": K, "w13_bits": 4, "w2_bits": 4}
    groups = {"w13_group_size": GROUP, "w2_group_size": GROUP}
    defaults = {"block_size": 0, "streams": 1}
    constants = MarlinExpertWeights.make_constants(sizes | defaults | settings, torch.device("cpu"))
    return MarlinExpertWeights(*w13, *pack("down", I, 48), **constants, **sizes, **groups, **settings)


@pytest.fixture(scope="module")
def layouts() -> dict[str, ExpertWeights]:
    torch.manual_seed(1)
    weights = make_gptq()
    return {
        "gptq": weights,
        "dense": make_dense(weights),
        "int4-full": make_int4(weights, "full"),
        "int4-int8": make_int4(weights, "int8"),
        "marlin": make_marlin(weights),
        "marlin-rows": make_marlin(weights, pair_ids=False, block_size=8),
        "marlin-dense": make_marlin(weights, grouped=False),
        "marlin-host": make_marlin(weights, host_route=True, streams=3),
    }


LAYOUTS = ("gptq", "dense", "int4-full", "int4-int8", "marlin", "marlin-rows", "marlin-dense", "marlin-host")
ROUTINGS = {
    "random": lambda: torch.stack([torch.randperm(E)[:K] for _ in range(23)]),
    "one-token": lambda: torch.tensor([[4, 1]]),
    "one-token-off-rank": lambda: torch.tensor([[E, 1]]),
    "no-token": lambda: torch.empty(0, K, dtype=torch.int64),
    "all-on-one-expert": lambda: torch.tensor([[3, 0]]).expand(9, K),
    "more-than-64-rows": lambda: torch.tensor([[5, 2]]).expand(131, K),
    "experts-with-none": lambda: torch.tensor([[0, 5]]).repeat(3, 1),
    "off-rank": lambda: torch.tensor([[-1, 2], [E, 1], [0, E], [-1, E], [3, 4]]),
    "nothing-kept": lambda: torch.tensor([[-1, E], [E, -1]]),
}


def inputs(routing):
    torch.manual_seed(2)
    ids = ROUTINGS[routing]().to(torch.int32).contiguous()
    return torch.randn(ids.shape[0], H), ids, torch.rand(ids.shape) + 0.1


def oracle(hidden, ids, topk_weights, dense):
    """Float64, one pair at a time, dense weights."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for t in range(ids.shape[0]):
        for k, e in enumerate(ids[t].tolist()):
            if 0 <= e < E:
                gate, up = (dense.gate_up_proj[e].double() @ hidden[t].double()).chunk(2)
                activated = torch.nn.functional.silu(gate) * up
                out[t] += topk_weights[t, k].double() * (dense.down_proj[e].double() @ activated)
    return out


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_matches_float64_oracle(name, layout, routing, layouts):
    args = inputs(routing)
    expected = oracle(*args, layouts["dense"])
    got = run_experts(name, *args, layouts[layout])
    assert_close("moe_experts", got, expected, bound=2e-2 if layout == "int4-int8" else 1e-5)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", ("int4-full", "int4-int8", "marlin"))
@pytest.mark.parametrize("name", ("bucketed", "fused"))
def test_packed_implementations_agree_closely(name, layout, routing, layouts):
    args = inputs(routing)
    expected = run_experts("per_pair", *args, layouts[layout])
    # Between the projections fused keeps float32 as the others do, so only the order of the last sum may differ.
    assert relative_error(run_experts(name, *args, layouts[layout]), expected) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ("int4-full", "dense", "marlin"))
def test_low_precision_activations(name, layout, dtype, layouts):
    hidden, ids, topk_weights = inputs("random")
    hidden = hidden.to(dtype)
    weights = layouts[layout]
    if layout == "dense":
        weights = DenseExpertWeights(weights.gate_up_proj.to(dtype), weights.down_proj.to(dtype))
    got = run_experts(name, hidden, ids, topk_weights, weights)
    assert got.dtype == dtype
    # Two intermediate roundings to the dtype, and for the dense layout rounded weights.
    bound = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert_close("moe_experts", got, oracle(hidden, ids, topk_weights, layouts["dense"]), bound=bound)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_compiles_without_a_graph_break(name, layout, layouts):
    torch.compiler.reset()
    args = inputs("off-rank")
    weights = layouts[layout]

    def block(hidden, ids, topk_weights):
        return run_experts(name, hidden, ids, topk_weights, weights) * 1.0

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_close("moe_experts", compiled(*args), block(*args))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_rebuild_from_tensors_and_spec(layout, layouts):
    weights = layouts[layout]
    again = ExpertWeights.rebuild(weights.tensors(), weights.spec())
    assert type(again) is type(weights)
    assert again.spec() == weights.spec()
    assert all(a is b for a, b in zip(again.tensors(), weights.tensors()))


def test_unknown_implementation():
    from ferrum_models.moe.registry import check_implementation

    with pytest.raises(ValueError, match=r"expected one of \['bucketed', 'fused', 'per_pair'\], got 'magic'"):
        check_implementation("magic")


@pytest.mark.parametrize("routing", ROUTINGS)
def test_host_and_device_plans_agree(routing):
    _, ids, _ = inputs(routing)
    device, host = build_device_plan(ids, E), build_host_plan(ids, E)
    assert torch.equal(device.expert_offsets, host.expert_offsets)
    assert torch.equal(device.pairs_by_token, host.pairs_by_token)
    kept = int(host.expert_offsets[-1])
    assert torch.equal(device.packed_token_idx[:kept], host.packed_token_idx[:kept])


class TestBlockSize:
    def test_device_plan(self):
        assert pick_moe_block_size(8) == 16
        assert pick_moe_block_size(5000) == 16
        assert pick_moe_block_size(1023, large_m=64) == 16
        assert pick_moe_block_size(1024, large_m=64) == 64

    def test_host_plan_takes_the_largest_within_30_percent(self):
        assert pick_moe_block_size(256, [64, 64, 128]) == 64
        assert pick_moe_block_size(100, [50, 50]) == 64  # 28 % padding
        assert pick_moe_block_size(98, [49, 49]) == 16  # 64 pads 30.6 %, 32 as much
        assert pick_moe_block_size(60, [30, 30, 0]) == 32
        assert pick_moe_block_size(3, [1, 1, 1]) == 16

    @pytest.mark.parametrize("block", [8, 16, 32, 48, 64])
    def test_override(self, block):
        assert pick_moe_block_size(5000, [1, 2], override=block, large_m=64) == block

    def test_bad_sizes(self):
        with pytest.raises(ValueError, match=r"\[pick_moe_block_size\] override: expected one of .* got 24"):
            pick_moe_block_size(10, override=24)
        with pytest.raises(ValueError, match=r"\[pick_moe_block_size\] large_m: expected one of .* got 7"):
            pick_moe_block_size(10, large_m=7)


class TestFusedConfig:
    """128 experts, top 8, bfloat16 unless said."""

    def pick(self, tokens, dtype=torch.bfloat16, **settings):
        return pick_fused_config(tokens, 8, 128, dtype, **settings)

    @pytest.mark.parametrize(
        "tokens, block", [(0, 8), (2, 8), (8, 8), (64, 8), (65, 16), (128, 16), (193, 32), (512, 32), (769, 64)]
    )
    def test_blocks_hold_the_rows_of_an_expert(self, tokens, block):
        assert self.pick(tokens) == FusedConfig("blocks", block, sum_in_down=0 < tokens <= 16)

    @pytest.mark.parametrize("tokens", [1, 2, 16, 17])
    def test_down_sums_the_slots_of_few_tokens(self, tokens):
        assert self.pick(tokens).sum_in_down == self.pick(tokens, override=16).sum_in_down == (tokens < 17)
        assert not pick_fused_config(tokens, 1025, 2048, torch.bfloat16).sum_in_down

    def test_one_token_needs_no_sorting(self):
        assert self.pick(1) == FusedConfig("pairs", 8, sum_in_down=True)
        assert self.pick(1, override=16) == FusedConfig("pairs", 16, sum_in_down=True)

    def test_block_sizes_are_those_of_the_policy(self):
        assert self.pick(512, override=48) == FusedConfig("blocks", 48)
        assert self.pick(127, large_m=64) == FusedConfig("blocks", 16)
        with pytest.raises(ValueError, match="got 24"):
            self.pick(512, override=24)
        assert self.pick(128, large_m=64) == FusedConfig("blocks", 64)
        assert self.pick(64, large_m=48, large_m_min_pairs=512) == FusedConfig("blocks", 48)

    def test_many_rows_of_every_expert_are_worth_dequantising(self):
        assert self.pick(6399) == FusedConfig("blocks", 64)
        assert self.pick(6400) == FusedConfig("dense")
        assert self.pick(6400, torch.float16) == FusedConfig("blocks", 64)
        assert self.pick(6400, grouped_product=False) == FusedConfig("blocks", 64)
        assert self.pick(16, dequantize_min_rows=1) == FusedConfig("dense")
        assert self.pick(10**6, dequantize_min_rows=0) == FusedConfig("blocks", 64)

    def test_without_grouped_products(self):
        assert self.pick(1, torch.float32, grouped=False) == FusedConfig("dense")


def test_dequantised_path_in_bfloat16(layouts):
    hidden, ids, topk_weights = inputs("random")
    weights = replace(layouts["marlin"], dequantize_min_rows=1)
    got = weights.fused(hidden.bfloat16(), ids, topk_weights)
    assert_close("moe_experts", got, oracle(hidden.bfloat16(), ids, topk_weights, layouts["dense"]), bound=3e-2)


@pytest.mark.parametrize("width, interleaved", [(40, False), (37, True), (160, True), (200, False)])
@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_dequantised_parts_of_columns(width, interleaved, limit, monkeypatch):
    """Of gate and up in one matrix and in two, sizes that grouped_mm does not take as they are, experts without rows."""
    monkeypatch.setattr(dequantized, "DENSE_BYTES", limit)
    weights = random_experts(width, hidden_size=102, interleaved=interleaved)
    hidden, ids = torch.randn(30, 102), torch.randint(1, 4, (30, 2)).int()
    topk_weights = torch.rand(30, 2)
    got = weights.fused(hidden, ids, topk_weights)
    dense = DenseExpertWeights(*weights.dense(torch.float32))
    assert_close("moe_experts", got, oracle(hidden, ids, topk_weights, dense), bound=1e-5)


def random_experts(width, hidden_size, interleaved):
    """Four experts, act-ordered, whose dense path is the only one; padding columns have no scale, as the loader has it."""

    def stack(in_features, out_features, parts, *lead):
        rows, columns = -(-in_features // 64) * 64, -(-out_features * parts // 64) * 64
        tensors = random_marlin(rows, columns * math.prod(lead), 32, 4, "cpu", asymmetric=True)[:3]
        packed, scales, zeros = (t.unflatten(1, (*lead, -1)).movedim(0, -2).contiguous() for t in tensors)
        natural = marlin.unpermute_scales(scales.flatten(0, -3), rows, 32).view(scales.shape)
        natural[..., out_features * parts :] = 0
        scales = marlin.permute_scales(natural.flatten(0, -3), rows, 32).view(scales.shape)
        order = [
            torch.cat((torch.randperm(in_features), torch.full((rows - in_features,), -1)))[torch.randperm(rows)]
            for _ in range(math.prod(lead))
        ]
        return packed, scales, zeros, torch.stack(order).int().view(*lead, rows)

    w13 = stack(hidden_size, -(-width // 8) * 8 if interleaved else width, 2 if interleaved else 1, 2 - interleaved, 4)
    sizes = {"hidden_size": hidden_size, "intermediate_size": width, "top_k": 2, "w13_bits": 4, "w2_bits": 4}
    constants = MarlinExpertWeights.make_constants(sizes | {"block_size": 0, "streams": 1}, torch.device("cpu"))
    groups = {"w13_group_size": 32, "w2_group_size": 32}
    return MarlinExpertWeights(*w13, *stack(width, hidden_size, 1, 4), **constants, **sizes, **groups, grouped=False)


def test_column_chunks():
    """Qwen3-30B-A3B's gate and up in two parts, down in one; never less than a unit."""
    assert dequantized.column_chunks(768, 2 * 128 * 2048 * 2) == [slice(0, 384), slice(384, 768)]
    assert dequantized.column_chunks(2048, 128 * 768 * 2) == [slice(0, 2048)]
    assert dequantized.column_chunks(200, 1 << 40) == [slice(i, min(i + 64, 200)) for i in range(0, 200, 64)]
    assert dequantized.column_chunks(0, 8) == []


@pytest.mark.parametrize("layout", ["marlin", "marlin-rows", "marlin-dense"])
def test_fused_reads_nothing_back(layout, layouts):
    """Traced with tensors that have no values: reading one would raise."""
    with FakeTensorMode() as mode:
        weights = layouts[layout]
        tensors = [t if t is None else mode.from_tensor(t) for t in weights.tensors()]
        fake = ExpertWeights.rebuild(tensors, weights.spec())
        for tokens in (1, 7):
            hidden = torch.empty(tokens, H, dtype=torch.bfloat16)
            ids = torch.empty(tokens, K, dtype=torch.int32)
            assert fake.fused(hidden, ids, torch.empty(tokens, K)).shape == hidden.shape


@pytest.mark.parametrize(
    "name, phases",
    [
        ("per_pair", {"gate_up", "activation", "down", "combine"}),
        ("bucketed", {"plan", "gather", "gate_up", "activation", "down", "combine"}),
        ("fused", {"fused"}),
    ],
)
def test_profile_names_the_phases(name, phases, layouts):
    args = inputs("random")
    with profile() as times:
        run_experts(name, *args, layouts["int4-full"])
    assert {phase for phase, calls in times.calls.items() if calls} == phases
    assert all(times.seconds[phase] > 0 for phase in phases)
    assert all(phase in str(times) for phase in phases)
    run_experts(name, *args, layouts["int4-full"])  # outside the block nothing is counted
    calls = dict(times.calls)
    assert calls == times.calls


def test_the_dequantised_path_compiles_whole(layouts):
    """Memory that an op fills in parts, and a question about the device."""
    hidden, ids, topk_weights = inputs("random")
    weights = replace(layouts["marlin"], dequantize_min_rows=1)
    hidden = hidden.bfloat16()
    compiled = torch.compile(weights.fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, ids, topk_weights), weights.fused(hidden, ids, topk_weights))
