"""CUDA graphs of decode steps on a device: replays equal eager steps, failures are told and survived."""

import warnings

import pytest
import torch
from transformers import StaticCache

from ferrum_models import DecodeGraph, Qwen3MoeForCausalLM
from ferrum_models.graphs import CudaGraphs
from ferrum_models.moe import registry
from ferrum_models.qwen3_moe import decode
from ferrum_ops import RuntimeConfig
from tests.models.test_decode_graph import EXAMPLE, greedy, prompts

LAYOUTS = pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])


@pytest.fixture
def model(cuda, monkeypatch):
    monkeypatch.setattr(decode, "LEAST_BUCKET", 16)
    torch.use_deterministic_algorithms(False)
    return Qwen3MoeForCausalLM.from_pretrained(EXAMPLE, dtype=torch.bfloat16, device_map="cuda")


def on(cuda, *args):
    return prompts(*args).to(cuda)


def pair(model, batch, **options):
    """The same, recorded and step by step."""
    recorded, eager = (DecodeGraph(model, batch, 64, **options) for _ in range(2))
    eager.runner.graphs = None
    return recorded, eager


@LAYOUTS
@pytest.mark.parametrize("batch", [1, 8])
def test_replays_equal_eager_steps(model, cuda, batch, paged):
    """Changed tokens, routing, positions and lengths; three prompts of other lengths through the same recordings."""
    recorded, eager = pair(model, batch, paged=paged)
    for seed, length in ((0, 3), (1, 9), (2, 6)):
        for graph in (recorded, eager):
            graph.start(on(cuda, batch, length, seed))
        for steps in (1, 12, 9):
            assert torch.equal(recorded.run(steps), eager.run(steps))
        assert torch.equal(recorded.history, eager.history)
    assert recorded.fallback is None and recorded.runner.eager_steps == 0
    assert recorded.runner.captures == len(recorded.runner.keys) == 2


@LAYOUTS
def test_a_recording_of_the_last_step_there_is_room_for(model, cuda, paged):
    recorded, eager = pair(model, 2, paged=paged)
    for graph in (recorded, eager):
        graph.start(on(cuda, 2, recorded.capacity - 1))
    assert torch.equal(recorded.run(1), eager.run(1)) and recorded.fallback is None


def test_pages_may_be_handed_out_anew(model, cuda):
    recorded, eager = pair(model, 2, paged=True)
    for graph in (recorded, eager):
        graph.start(on(cuda, 2, 6))
        graph.run(3)
    cache = recorded.cache
    order = torch.randperm(cache.block_tables.numel(), device=cuda)
    for pool in (*cache.keys, *cache.values):
        pool[order] = pool.clone()
    cache.block_tables.copy_(order[cache.block_tables.long()])
    assert torch.equal(recorded.run(5), eager.run(5))
    assert recorded.runner.captures == 1


def test_int8_pages(model, cuda):
    model.runtime_config = RuntimeConfig(kv_dtype="int8", paged_block_size=4)
    recorded, eager = pair(model, 2, paged=True)
    for graph in (recorded, eager):
        graph.start(on(cuda, 2, 6))
    assert torch.equal(recorded.run(20), eager.run(20))


def test_one_launch_per_token(model, cuda):
    graph = DecodeGraph(model, 2, 64)
    graph.start(on(cuda, 2, 3))
    graph.run(2)
    with torch.profiler.profile() as profile:
        graph.run(5)
    launches = [e.name for e in profile.events() if "Launch" in e.name and e.name.startswith("cuda")]
    assert launches.count("cudaGraphLaunch") == len(launches) == 5


def test_generate(model, cuda):
    ids = on(cuda, 2, 9)
    expected = greedy(model, ids, 24)
    model.runtime_config = RuntimeConfig(cuda_graph=True)
    for _ in range(2):
        assert torch.equal(greedy(model, ids, 24), expected)
    assert model.decode_graph.runner.replays == 2 * 23 and model.decode_graph.fallback is None


def test_a_step_that_waits_for_the_device_runs_without(model, cuda, monkeypatch):
    fused = registry.IMPLEMENTATIONS["fused"]

    def reads_back(hidden, topk_ids, topk_weights, weights, *blocks):
        assert topk_ids.max().item() < weights.num_experts
        return fused(hidden, topk_ids, topk_weights, weights, *blocks)

    recorded, eager = pair(model, 2)
    for graph in (recorded, eager):
        graph.start(on(cuda, 2, 6))
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "fused", reads_back)
    with pytest.warns(UserWarning, match="capture failed: HostReadError"):
        assert torch.equal(recorded.run(3), eager.run(3))
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "fused", fused)
    recorded.runner.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"\[DecodeGraph\]")
        assert torch.equal(recorded.run(3), eager.run(3))
    assert recorded.runner.replays == 3


def test_an_operation_that_no_capture_permits(cuda):
    """What the warm-up's look at operators does not see: the capture fails, and the device is as before."""
    x, graphs, stream = torch.zeros(4, device=cuda), CudaGraphs(cuda), torch.cuda.current_stream()

    def waits():
        x.add_(1)
        torch.cuda.synchronize()
        return x

    with pytest.raises(Exception, match=r"captur|not permitted"):
        graphs.capture(waits)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(4, device=cuda).max() < 1  # the generator, as sampling uses it
    large = torch.empty(1 << 26, dtype=torch.uint8, device=cuda)
    reserved = torch.cuda.memory_reserved()
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved
    x.zero_()
    replay, result = graphs.capture(lambda: x + 1)
    x.fill_(2)
    replay()
    assert result.tolist() == [3] * 4


def test_a_recording_after_all_were_dropped(cuda):
    """What is left of the memory they shared is in use: a result, and cuBLAS's workspace."""
    x, graphs, results = torch.ones(64, 64, device=cuda), CudaGraphs(cuda), []
    for value in (1, 2):
        replay, result = graphs.capture(lambda: x @ x)
        results.append(result)
        x.fill_(value)
        replay()
        assert (result == 64 * value**2).all()
        del replay
    assert (results[0] == 64).all()


def test_reduce_overhead(model, cuda):
    """torch.compile's own CUDA graphs over a static cache."""
    torch.compiler.reset()
    ids, steps = on(cuda, 2, 5), 6

    def tokens(forward):
        cache, chosen, positions = StaticCache(config=model.config, max_cache_len=32), ids, torch.arange(5, device=cuda)
        out = []
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            logits = forward(
                input_ids=chosen, position_ids=positions[None], past_key_values=cache, use_cache=True
            ).logits
            chosen = logits[:, -1].argmax(-1, keepdim=True).clone()
            positions = positions[-1:] + 1
            out.append(chosen)
        return torch.cat(out, 1)

    with torch.no_grad():
        expected = tokens(model)
        torch._dynamo.utils.counters.clear()
        got = tokens(torch.compile(model, mode="reduce-overhead", fullgraph=True))
    assert (got == expected).float().mean() > 0.8  # bfloat16: fused kernels round elsewhere, and a near tie may turn
    assert not torch._dynamo.utils.counters["graph_break"]
