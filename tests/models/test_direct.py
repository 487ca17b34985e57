"""The direct forward pass: the bits of transformers' path, and that path whenever more is asked for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from ferrum_models import Qwen3MoeForCausalLM
from ferrum_models.moe import profile
from ferrum_models.qwen3_moe import direct
from ferrum_models.qwen3_moe.bound_model import BoundModel
from tests.models.example import EXAMPLE, hooked, ids


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request):
    return Qwen3MoeForCausalLM.from_pretrained(EXAMPLE, dtype=request.param)


@pytest.fixture
def taken(monkeypatch):
    """How many forward passes went the direct way."""
    calls = []
    own = direct.forward
    monkeypatch.setattr(direct, "forward", lambda *args: calls.append(1) or own(*args))
    return calls


def by_modules(model, *args, **kwargs):
    with hooked(model):
        return model(*args, **kwargs)


@pytest.mark.parametrize("implementation", ["fused", "bucketed", "per_pair"])
def test_the_same_bits(model, taken, implementation):
    model.set_moe_implementation(implementation)
    caches = DynamicCache(), DynamicCache()
    for part in ids(2, 12).split((7, 1, 3, 1), 1):
        got = model(part, past_key_values=caches[0])
        expected = by_modules(model, part, past_key_values=caches[1])
        assert torch.equal(got.logits, expected.logits)
    assert len(taken) == 4
    for own, other in zip(caches[0].layers, caches[1].layers):
        assert torch.equal(own.keys, other.keys) and torch.equal(own.values, other.values)
    model.set_moe_implementation("fused")


def test_without_a_cache(model, taken):
    out = model(ids(2, 9), use_cache=False)
    assert out.past_key_values is None and taken
    assert torch.equal(out.logits, by_modules(model, ids(2, 9), use_cache=False).logits)


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 4])], ids=str)
def test_logits_to_keep(model, taken, keep):
    out = model(ids(2, 9), logits_to_keep=keep)
    assert taken and torch.equal(out.logits, by_modules(model, ids(2, 9), logits_to_keep=keep).logits)


def test_generate_takes_it_for_every_token(model, monkeypatch):
    calls = []
    own = direct.hidden_states
    monkeypatch.setattr(direct, "hidden_states", lambda *args: calls.append(1) or own(*args))
    monkeypatch.setattr(BoundModel, "bind", lambda *args: None)  # layers without halves
    for options in ({}, {"output_scores": True, "return_dict_in_generate": True}):  # our loop and transformers'
        model.generate(ids(1, 5), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options)
        assert len(calls) == 6
        calls.clear()


def test_int4_halves_are_one_op(model):
    with torch.no_grad(), Ops(model.config.hidden_size) as ops:
        model(ids(2, 3))
    assert {"ferrum::decoder_attention_int4_", "ferrum::decoder_experts_int4"} <= ops.names
    assert not {"ferrum::int4_linear", "ferrum::moe_experts_int4"} & ops.names
    with torch.no_grad(), Ops(model.config.hidden_size) as ops, profile():
        model(ids(2, 3))
    assert {"ferrum::decoder_attention_int4_", "ferrum::moe_experts_int4"} <= ops.names
    model.model.layers[0].self_attn.o_proj.set_activation("full")
    with torch.no_grad(), Ops(model.config.hidden_size) as ops:
        model(ids(2, 3))
    model.set_activation("int8")
    assert {"ferrum::decoder_attention_int4_", "ferrum::int4_linear"} <= ops.names


def test_a_model_without_int4_takes_the_parts(taken):
    dense = Qwen3MoeForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32, layout="dense")
    with torch.no_grad(), Ops(dense.config.hidden_size) as ops:
        got = dense(ids(2, 3))
    assert taken and not any("decoder" in name for name in ops.names)
    assert torch.equal(got.logits, by_modules(dense, ids(2, 3)).logits)


def test_positions_are_honoured(model, taken):
    positions = torch.arange(9)[None] + 30
    mask = torch.ones(1, 9, dtype=torch.long)
    got = model(ids(1, 9), attention_mask=mask, position_ids=positions)
    expected = by_modules(model, ids(1, 9), attention_mask=mask, position_ids=positions)
    assert taken and torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_hidden_states": True},
        {"output_router_logits": True},
        {"labels": ids(2, 9)},
        {"attention_mask": torch.ones(2, 9).tril(6)},
        {"position_ids": torch.arange(9)[None] % 5, "use_cache": False},  # packed sequences
        {"return_dict": False},
    ],
    ids=lambda a: next(iter(a)),
)
def test_other_wishes_go_to_transformers(model, taken, arguments):
    model(ids(2, 9), **arguments)
    assert not taken


def test_other_caches_go_to_transformers(model, taken):
    model(ids(1, 9), past_key_values=StaticCache(config=model.config, max_cache_len=16))
    assert not taken


def test_hooks_are_called(model, taken):
    seen = []
    handle = model.model.layers[1].self_attn.register_forward_hook(lambda *_: seen.append(1))
    model(ids(1, 4))
    handle.remove()
    assert seen and not taken
    model(ids(1, 4))
    assert taken


class Ops(TorchDispatchMode):
    """Names of the ops that get a tensor of which a dimension has this size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(a, torch.Tensor) and self.size in a.shape for a in args):
            self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", [Qwen3MoeForCausalLM.__call__, by_modules], ids=["direct", "modules"])
def test_the_output_projection_is_not_copied_per_sequence(model, way):
    with torch.no_grad(), Ops(model.config.vocab_size) as ops:
        way(model, ids(3, 5), logits_to_keep=1)
    assert "aten::mm" in ops.names and "aten::bmm" not in ops.names
