"""`generate` on a CPU: the tokens of transformers' loop, and that loop where more than tokens is asked for."""

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria

from ferrum_models import Qwen3MoeForCausalLM
from ferrum_models.quantization.modules import Int4Linear, RoundedLinear
from ferrum_models.qwen3_moe import cache as cache_module
from ferrum_models.qwen3_moe import generation
from ferrum_models.qwen3_moe.bound_model import BoundModel
from tests.models.example import EXAMPLE, assert_steps_are_forward, hooked, ids
from tests.models.make_checkpoint import Recipe, make_checkpoint


@pytest.fixture(scope="module")
def model():
    return Qwen3MoeForCausalLM.from_pretrained(EXAMPLE, dtype=torch.bfloat16)


@pytest.fixture
def own(monkeypatch):
    """How many calls had the loop of their own."""
    calls = []
    generate = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *args: calls.append(1) or generate(*args))
    return calls


def by_transformers(model, *args, **kwargs):
    with hooked(model):
        return model.generate(*args, **kwargs)


class Streamer:
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.append(value.clone())

    def end(self):
        self.ended += 1


class AfterFour(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 13)


GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
ASKED = {
    "greedy": {},
    "one token": {"max_new_tokens": 1},
    "penalty": {"repetition_penalty": 1.3},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "sampled with a penalty": {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2},
    "criteria": {"stopping_criteria": [AfterFour()]},
    "float mask": {"attention_mask": torch.ones(2, 9)},
}


@pytest.mark.parametrize("case", ASKED)
def test_the_tokens_of_transformers(model, own, case):
    options, streamers = GREEDY | ASKED[case], (Streamer(), Streamer())
    batch = 2 if "attention_mask" in options else 1
    for prompts in (ids(batch, 9), ids(2, 9)):
        torch.manual_seed(5)
        got = model.generate(prompts, **options)
        torch.manual_seed(5)
        assert torch.equal(got, by_transformers(model, prompts, **options))
    assert len(own) == 2
    prompts, options = ids(1, 9), {k: v for k, v in options.items() if k != "attention_mask"}
    torch.manual_seed(5)
    model.generate(prompts, streamer=streamers[0], **options)
    torch.manual_seed(5)
    by_transformers(model, prompts, streamer=streamers[1], **options)
    assert streamers[0].ended == streamers[1].ended == 1
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(streamers[0].tokens, streamers[1].tokens))
    assert len(streamers[0].tokens) == len(streamers[1].tokens)


def test_an_end_stops_a_sequence_and_pads_it(model, own):
    prompts = ids(3, 9)
    free = model.generate(prompts, **GREEDY)
    options = GREEDY | {"eos_token_id": [int(free[0, 12]), int(free[1, 15])], "pad_token_id": 7}
    got = model.generate(prompts, **options)
    assert torch.equal(got, by_transformers(model, prompts, **options)) and len(own) == 2
    assert (got[0, 13:] == 7).all()


@pytest.mark.parametrize(
    "options",
    [
        {"return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"past_key_values": DynamicCache()},
        {"attention_mask": torch.ones(2, 9).tril(6).flip(-1)},
        {"num_beams": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_wishes_go_to_transformers(model, own, options):
    got = model.generate(ids(2, 9), **GREEDY | options)
    assert not own and got is not None


@pytest.mark.parametrize("bound", [True, False], ids=["bound layers", "any layers"])
def test_caches_may_change_hands(model, monkeypatch, bound):
    """The prompt's and every later token's keys are those of transformers' loop, when buffers grow as well."""
    monkeypatch.setattr(cache_module, "LEAST_GROWTH", 2)
    binds = []
    bind = BoundModel.bind
    monkeypatch.setattr(BoundModel, "bind", lambda *args: binds.append(bind(*args)) or (binds[-1] if bound else None))
    assert_steps_are_forward(model, ids(2, 9), ids(2, 14))
    assert len(binds) == (3 if bound else 1) and None not in binds


@pytest.mark.parametrize("rounded, kind", [(None, Int4Linear), ("int4", RoundedLinear), ("int8", RoundedLinear)])
def test_a_packed_head_is_bound_too(tmp_path, rounded, kind):
    make_checkpoint(tmp_path, Recipe(lm_head=rounded is None))
    packed = Qwen3MoeForCausalLM.from_pretrained(tmp_path, lm_head=rounded)
    vocabulary = packed.config.vocab_size
    steps = assert_steps_are_forward(packed, ids(2, 9) % vocabulary, ids(2, 3) % vocabulary)
    assert isinstance(packed.lm_head, kind) and steps._bound is not None
