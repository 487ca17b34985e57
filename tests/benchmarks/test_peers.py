"""The engines behind `benchmarks/peers`: each computes what its own weights say, and one that does not is refused."""

import pytest
import torch

from benchmarks.peers import GPU_PEERS, PEERS, select
from benchmarks.peers.ferrum_marlin import FerrumMarlin
from benchmarks.peers.interface import MoeShape, WrongResult, check_block, check_linear, random_experts, random_int4
from benchmarks.peers.torch_grouped import TorchGrouped

SHAPE = MoeShape(hidden=256, width=256, experts=9, top_k=3, group_size=128)


def peer_params(method):
    def param(peer):
        reason = peer.available()
        return pytest.param(peer, id=peer.name, marks=pytest.mark.skipif(reason is not None, reason=reason or ""))

    # Of those for a GPU, the ones that have references can be checked anywhere.
    peers = [*PEERS, *GPU_PEERS, FerrumMarlin("cpu"), TorchGrouped("cpu")]
    return [param(peer) for peer in peers if getattr(peer, method, None) is not None]


def routed(tokens):
    torch.manual_seed(0)
    weights, ids = torch.rand(tokens, SHAPE.experts).topk(SHAPE.top_k)
    return torch.randn(tokens, SHAPE.hidden), ids.to(torch.int32), weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("peer", peer_params("moe_block"))
def test_moe_block(peer, tokens):
    with torch.inference_mode():
        check_block(peer, peer.moe_block(random_experts(SHAPE)), *routed(tokens))


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("peer", peer_params("linear"))
def test_linear(peer, tokens):
    torch.manual_seed(0)
    matrix = random_int4(96, 256, 128, torch.Generator().manual_seed(1))
    check_linear(peer, peer.linear(matrix), torch.randn(tokens, 256))


@pytest.mark.parametrize("peer", peer_params("moe_block"))
def test_experts_in_another_order_are_refused(peer):
    block = peer.moe_block(random_experts(SHAPE))
    hidden, ids, weights = routed(5)
    expert = block.expert
    block.expert = lambda index: expert((index + 1) % SHAPE.experts)
    with torch.inference_mode(), pytest.raises(WrongResult, match="relative error"):
        check_block(peer, block, hidden, ids, weights)


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="no peer begins with 'llamacpp': there are ferrum int8"):
        select(["llamacpp"])


def test_a_peer_that_is_not_installed_is_left_out_by_name(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    peers, missing = select()
    assert missing["onnxruntime"] == "not installed: onnxruntime, onnx"
    assert missing["llama.cpp Q4_K"] == "not installed: llama_cpp, gguf"
    gpu = select(peers=GPU_PEERS)[1]
    assert (gpu["humming"], gpu["vllm marlin"]) == ("not installed: humming", "not installed: vllm")
    assert [p.name for p in peers][:2] == ["ferrum int8", "ferrum full"]
