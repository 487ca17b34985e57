"""torch.compile without graph breaks or recompiles, static caches, and torch.export."""

import pytest
import torch
import torch._dynamo.testing
from transformers import StaticCache

import ferrum_ops
from ferrum_models import Qwen3MoeForCausalLM
from ferrum_models.qwen3_moe import direct
from ferrum_models.qwen3_moe.step_cache import ContiguousCache
from ferrum_ops.testing.compare import assert_close
from tests.models.make_checkpoint import Recipe, make_checkpoint

IDS = torch.arange(10).view(1, 10) * 7 % 95 + 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, Recipe(act_order="shared", sym=False))
    return path


@pytest.fixture
def model(directory):
    torch.compiler.reset()
    # Inductor's own warnings about determinism are not what is tested here.
    torch.use_deterministic_algorithms(False)
    return Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32)


def greedy_with_static_cache(model, forward, steps):
    """Token ids of `steps` greedy steps after IDS, and the logits of each."""
    cache = StaticCache(config=model.config, max_cache_len=64)
    ids, logits = IDS, []
    positions = torch.arange(IDS.shape[1])
    for _ in range(steps):
        out = forward(
            input_ids=ids,
            position_ids=positions.unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
        ids = logits[-1].argmax(-1, keepdim=True)
        positions = positions[-1:] + 1
    return torch.stack(logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation, backend",
    [
        ("fused", "aot_eager"),
        ("bucketed", "aot_eager"),
        ("per_pair", "aot_eager"),
        ("fused", "inductor"),
        ("bucketed", "inductor"),  # to inductor per_pair is the same single op
    ],
)
def test_compiled_equals_eager(model, implementation, backend):
    model.set_moe_implementation(implementation)
    with torch.no_grad():
        expected = greedy_with_static_cache(model, model, 6)
        counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
        # fullgraph: a graph break raises.
        got = greedy_with_static_cache(model, torch.compile(model, fullgraph=True, backend=counter), 6)
    assert counter.frame_count == 2  # one graph for the prompt, one for all steps
    assert_close("compiled model", got, expected, bound=1e-4)


def test_generate_with_a_static_cache(model):
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), model.generate(IDS, **options))


def test_export_of_a_moe_block(model):
    block = model.model.layers[0].mlp
    hidden = torch.randn(1, 7, model.config.hidden_size)
    with torch.no_grad():
        tokens = torch.export.Dim("tokens", min=2, max=512)
        program = torch.export.export(block, (hidden,), dynamic_shapes=({1: tokens},))
        longer = torch.randn(1, 19, model.config.hidden_size)
        for x in (hidden, longer):
            assert torch.equal(program.module()(x), block(x))
    names = {str(node.target) for node in program.graph.nodes}
    assert "ferrum.moe_experts_int4.default" in names


def test_export_of_the_model(model, tmp_path):
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=False)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        assert_close("exported model", loaded(input_ids=IDS, use_cache=False).logits, model(IDS).logits, bound=1e-5)


# The decode step by itself, in buffers that never move (see ferrum_models/qwen3_moe/decode.py).


class Step(torch.nn.Module):
    """The greedy tokens after `ids` int64 [B], whose sequences grow from lengths[0] to lengths[1]; int32 [2, B]."""

    def __init__(self, model, batch, capacity):
        super().__init__()
        self.model = model
        config = model.config
        cache = ContiguousCache.allocate(
            config.num_hidden_layers,
            batch,
            capacity,
            config.num_key_value_heads,
            config.head_dim,
            torch.float32,
            torch.device("cpu"),
        )
        for i, (keys, values) in enumerate(zip(cache.keys, cache.values)):
            self.register_buffer(f"keys{i}", keys)
            self.register_buffer(f"values{i}", values)

    def forward(self, ids, lengths):
        layers = range(self.model.config.num_hidden_layers)
        cache = ContiguousCache(*([getattr(self, f"{name}{i}") for i in layers] for name in ("keys", "values")))
        cache.begin(lengths, cache.capacity)
        positions = lengths[0].long()[:, None]
        hidden = direct.hidden_states(self.model, ids[:, None], positions, cache, lengths)
        return ferrum_ops.argmax_rows(self.model.lm_head(hidden[:, -1]))


def decode(step, steps):
    """Tokens [B, steps] of two sequences that start with one token each, the second at a later position."""
    ids, lengths = torch.tensor([3, 11]), torch.tensor([[0, 0], [1, 1]], dtype=torch.int32)
    tokens = []
    for _ in range(steps):
        ids = step(ids, lengths)
        lengths = lengths + 1
        tokens.append(ids)
    return torch.stack(tokens, 1)


def test_compiled_step_has_one_graph(model):
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        expected = decode(Step(model, 2, 32), 8)
        got = decode(torch.compile(Step(model, 2, 32), backend="aot_eager", fullgraph=True), 8)
    counters = torch._dynamo.utils.counters
    assert torch.equal(got, expected)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_reduce_overhead_has_no_break_and_no_recompile(model):
    """The mode for CUDA graphs; on a CPU inductor compiles the same graph and replays nothing."""
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        expected = decode(Step(model, 2, 32), 8)
        got = decode(torch.compile(Step(model, 2, 32), mode="reduce-overhead"), 8)
    counters = torch._dynamo.utils.counters
    assert torch.equal(got, expected)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_exported_step_by_aotinductor(model, tmp_path):
    with torch.no_grad():
        expected = decode(Step(model, 2, 32), 8)
        arguments = (torch.tensor([3, 11]), torch.tensor([[0, 0], [1, 1]], dtype=torch.int32))
        program = torch.export.export(Step(model, 2, 32), arguments)
        assert torch.equal(decode(program.module(), 8), expected)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
        assert torch.equal(decode(torch._inductor.aoti_load_package(package), 8), expected)
