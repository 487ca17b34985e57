"""The committed example: what `make demo` shows, checked."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from examples.demo import HERE, dense_twin, generate, perplexity
from ferrum_models import Qwen3MoeForCausalLM
from ferrum_models.moe import IMPLEMENTATIONS
from tests.models.make_checkpoint import read_tensors

CHECKPOINT = HERE / "tiny-qwen3-moe"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def heldout(tokenizer):
    text = (CHECKPOINT / "heldout.txt").read_text()
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :2048]


@pytest.fixture(scope="module")
def model():
    return Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


def test_every_expert_is_packed_and_act_ordered(model):
    experts = [m for m in model.load_report.modules if m.name.endswith(".experts")]
    assert len(experts) == model.config.num_hidden_layers
    assert {m.layout for m in model.load_report.modules} == {"int4_cpu"}
    assert all(layer.mlp.experts.w13_perm is not None for layer in model.model.layers)


@pytest.mark.parametrize("prompt", ["Once upon a time", "The king said", "One day the fox"])
def test_implementations_continue_the_same_way(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    texts = set()
    for name in IMPLEMENTATIONS:
        model.set_moe_implementation(name)
        texts.add(tokenizer.decode(generate(model, ids, 24)[0]))
    assert len(texts) == 1
    assert len(texts.pop().split()) > 15  # words, not noise


def test_full_activations_equal_transformers(model, heldout):
    twin = dense_twin(model, torch.float32)
    model.set_activation("full")
    with torch.no_grad():
        got, expected = model(heldout[:, :128]).logits, twin(heldout[:, :128]).logits
    model.set_activation("int8")
    worst = ((got - expected).abs().amax(-1) / expected.abs().amax(-1)).max().item()
    assert worst <= 1e-4


@pytest.mark.slow
def test_int8_activations_cost_at_most_half_a_percent_of_perplexity(model, heldout):
    values = {}
    for activation in ("full", "int8"):
        model.set_activation(activation)
        values[activation] = perplexity(model, heldout, 256)
    assert values["int8"] <= 1.005 * values["full"]


@pytest.mark.slow
def test_perplexity_is_near_the_recorded_one_of_the_dense_model(model, tokenizer):
    record = json.loads((CHECKPOINT / "training.json").read_text())
    ids = tokenizer((CHECKPOINT / "heldout.txt").read_text(), return_tensors="pt", verbose=False).input_ids
    value = perplexity(model, ids, record["perplexity_context"])
    assert value == pytest.approx(record["ppl_int4_dequantised"], rel=5e-3)
    assert value <= 1.02 * record["ppl_dense"]


def test_saving_writes_the_original_bits(tmp_path):
    Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    original, saved = read_tensors(CHECKPOINT), read_tensors(tmp_path)
    assert original.keys() == saved.keys()
    assert all(saved[k].dtype == v.dtype and torch.equal(saved[k], v) for k, v in original.items())
