"""The expert block on the kernels it is made of: what they hand to one another, on every path that packs nothing out."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3MoeConfig

import ferrum_ops
from benchmarks.gpu_moe import check, random_inputs, random_layer
from benchmarks.peers.interface import MoeShape
from ferrum_models.moe import CudaLanes, pick_fused_config
from ferrum_models.moe.bucketed import bucketed
from ferrum_models.moe.registry import route_and_run
from ferrum_models.qwen3_moe.modeling import Router
from tests.moe.test_streams import RecordingCuda

BLOCK = MoeShape(hidden=128, width=64, experts=6, top_k=2)
OPS = ("marlin_gemm", "marlin_moe_gemm", "moe_combine", "weighted_sum")


@pytest.fixture
def block(emulated, monkeypatch):
    """Weights whose ops are the emulated kernels, in any order of threads."""
    for name in OPS:
        monkeypatch.setattr(ferrum_ops, name, emulated.op(name))
    align, pairs = emulated.op("moe_align_block_size"), emulated.op("moe_build_pairs_by_token")
    monkeypatch.setattr(
        ferrum_ops,
        "moe_align_block_size",
        lambda ids, experts, size, pair_ids=True: align(ids, experts, size, pair_ids, None),
    )
    monkeypatch.setattr(ferrum_ops, "moe_build_pairs_by_token", pairs)
    torch.manual_seed(0)
    return replace(random_layer(BLOCK, "cpu"), workspace=torch.zeros(3, 64, dtype=torch.int32))


@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("settings", [{}, {"pair_ids": False}, {"block_size": 48}], ids=str)
def test_fused(block, settings, tokens):
    if settings.get("block_size"):
        settings = settings | {"token_blocks": block.make_constants(
            {"block_size": 48, "top_k": BLOCK.top_k, "streams": 1}, torch.device("cpu")
        )["token_blocks"]}  # fmt: skip
    weights, inputs = replace(block, **settings), random_inputs(BLOCK, tokens, "cpu")
    inputs[1][tokens // 2, 0], inputs[1][-1, 1 if tokens > 1 else 0] = BLOCK.experts, -1  # of no expert here
    check("fused", weights, inputs)
    assert not weights.workspace.any()
    config = pick_fused_config(tokens, BLOCK.top_k, BLOCK.experts, torch.bfloat16)
    assert config.path == ("pairs" if tokens == 1 else "blocks")


@pytest.mark.parametrize("tokens, launches", [(1, 2), (2, 3), (16, 3), (17, 4)])
def test_launches_after_the_router(block, emulated, tokens, launches):
    """Sorting, but for one token; gate and up; down, which sums the slots of few tokens."""
    inputs, before = random_inputs(BLOCK, tokens, "cpu"), emulated.launches()
    block.fused(*inputs)
    assert emulated.launches() - before == launches


@pytest.mark.parametrize("tokens, launches", [(1, 3), (2, 3), (16, 3), (17, 5)])
def test_launches_with_the_router(block, emulated, monkeypatch, tokens, launches):
    """Behind the router's product: its choice, which sorts as well; gate and up; down. The bits are those of sorting
    afterwards."""

    def router_topk_softmax(x, weight, top_k, renormalize):
        logits = torch.nn.functional.linear(x, weight)
        return logits, *emulated.op("route_topk_softmax")(logits, top_k, renormalize)

    monkeypatch.setattr(ferrum_ops, "route_topk_align", emulated.op("route_topk_align"))
    monkeypatch.setattr(ferrum_ops, "router_topk_softmax", router_topk_softmax)
    router = Router(Qwen3MoeConfig(hidden_size=BLOCK.hidden, num_experts=BLOCK.experts, num_experts_per_tok=2))
    router.weight.data = torch.randn(BLOCK.experts, BLOCK.hidden).bfloat16()
    hidden, before = random_inputs(BLOCK, tokens, "cpu")[0], emulated.launches()
    with torch.no_grad():
        out = route_and_run("fused", hidden, router, BLOCK.top_k, block)
        assert emulated.launches() - before == launches
        _, topk_weights, topk_ids = router(hidden)
    assert torch.equal(out, block.fused(hidden, topk_ids, topk_weights))
    by_rows = replace(block, pair_ids=False)  # another order of rows than the router gives
    assert by_rows.routed_block_size(hidden, 2) == replace(block, one_launch=False).routed_block_size(hidden, 2) == 0


@pytest.mark.parametrize("host_route", [False, True])
def test_bucketed_on_lanes(block, host_route):
    weights, inputs = replace(block, host_route=host_route), random_inputs(BLOCK, 21, "cpu")
    check("bucketed", weights, inputs)
    lanes = CudaLanes(torch.device("cpu"), 3, RecordingCuda())
    assert torch.equal(bucketed(*inputs, weights, lanes), bucketed(*inputs, weights))
    assert not weights.workspace.any()
