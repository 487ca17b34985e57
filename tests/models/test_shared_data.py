"""Checkpoints written by GPTQModel, against transformers' reference in float32 on the dequantised weights.

The data is not part of the repository; without it these tests skip by name.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ferrum_models import Qwen3MoeForCausalLM
from tests.models.make_checkpoint import read_tensors

DATA = Path(__file__).parents[3] / "shared" / "data" / "gptq"
NAMES = ("gptq-b4-g128-sym-act0", "gptq-b4-g128-sym-act1")


@pytest.fixture(params=NAMES)
def directory(request):
    path = DATA / request.param
    if not path.exists():
        pytest.skip(f"no shared data: {request.param}")
    return path


@pytest.fixture
def reference(directory):
    return load_file(directory / "reference" / "reference.safetensors")


@pytest.mark.parametrize("implementation", ["fused", "bucketed", "per_pair"])
def test_full_activations_equal_the_reference(directory, reference, implementation):
    model = Qwen3MoeForCausalLM.from_pretrained(
        directory, dtype=torch.float32, moe_implementation=implementation, activation="full"
    )
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    expected = reference["logits"]
    worst = ((logits - expected).abs().amax(-1) / expected.abs().amax(-1)).max().item()
    assert worst <= 1e-4
    greedy = reference["greedy_ids"].view(-1, reference["greedy_ids"].shape[-1])
    generated = model.generate(greedy[:, :8], max_new_tokens=greedy.shape[1] - 8, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, greedy)


def test_int8_activations_at_the_reference_s_routing(directory, reference):
    model = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32, activation="int8")
    for i, layer in enumerate(model.model.layers):
        # int8 moves a few tokens to other experts, which is not an error of the experts: pin the routing.
        logits = reference[f"router_logits_{i}"].view(-1, model.config.num_experts)
        weight, ids = logits.softmax(-1).topk(model.config.num_experts_per_tok)
        weight = weight / weight.sum(-1, keepdim=True)
        routed = (logits, weight, ids.to(torch.int32))
        layer.mlp.gate.register_forward_hook(lambda *_, routed=routed: routed)
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    cosine = torch.cosine_similarity(logits, reference["logits"], dim=-1)
    assert cosine.min() >= 0.999


def test_save_round_trip_is_bit_exact(directory, tmp_path):
    Qwen3MoeForCausalLM.from_pretrained(directory).save_pretrained(tmp_path)
    original, saved = read_tensors(directory), read_tensors(tmp_path)
    assert original.keys() == saved.keys()
    assert all(saved[k].dtype == v.dtype and torch.equal(saved[k], v) for k, v in original.items())
