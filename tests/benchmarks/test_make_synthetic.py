"""Synthetic checkpoints load like any other, and say the same as a .gguf file."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.models.make_synthetic import Sizes, make_synthetic
from ferrum_models import Qwen3MoeForCausalLM
from ferrum_ops.formats import gptq

SMALL = Sizes(
    layers=2,
    hidden=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
    experts=8,
    top_k=2,
    intermediate=128,
    vocab=512,
    group_size=64,
)


def tensors(directory):
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
def test_loads_and_keeps_activations_sane(tmp_path, sym):
    make_synthetic(tmp_path, replace(SMALL, sym=sym))
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, SMALL.vocab, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    spreads = [hidden.std().item() for hidden in out.hidden_states]
    assert all(0.5 < spread < 3 for spread in spreads), spreads
    assert 1 < out.logits.std() < 4
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (2, 23)


def test_shards_hold_the_same_tensors_as_one_file(tmp_path):
    total = make_synthetic(tmp_path / "one", SMALL)
    make_synthetic(tmp_path / "many", SMALL, shard_bytes=200_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert total == sum(t.nbytes for t in one.values())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == many.keys()


def test_seeds_give_other_weights_and_the_same_statistics(tmp_path):
    name = "model.layers.1.mlp.experts.5.up_proj"
    weights = []
    for seed in (0, 1):
        make_synthetic(tmp_path / str(seed), replace(SMALL, seed=seed, sym=False))
        disk = tensors(tmp_path / str(seed))
        parts = (disk[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
        weights.append(gptq.dequantize(*parts, 4, gptq.zero_offset_of("gptq")).float())
    assert not torch.equal(*weights)
    for weight in weights:
        assert weight.std() * SMALL.hidden**0.5 == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"intermediate": 96}, "intermediate: expected a multiple of 8 and of group_size 64, got 96"),
        ({"top_k": 9}, r"top_k: expected 1 to 8 \(experts\), got 9"),
    ],
    ids=["group", "top_k"],
)
def test_sizes_that_do_not_fit_raise(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_synthetic(tmp_path, replace(SMALL, **change))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf")),
    reason="llama-cpp-python or gguf is not installed",
)
def test_gguf_says_the_same(tmp_path):
    from benchmarks.models.make_gguf import make_gguf
    from benchmarks.peers.models import LlamaCppModel

    make_synthetic(tmp_path, replace(SMALL, sym=False))
    (path,) = make_gguf(tmp_path, ["Q8_0"])
    ids = torch.randint(0, SMALL.vocab, (1, 20), generator=torch.Generator().manual_seed(0))
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, activation="full")
    with torch.no_grad():
        expected = model(ids).logits[0, -1]
    got = LlamaCppModel(path, repack=False).logits(ids)
    assert torch.cosine_similarity(got, expected, dim=0) > 0.99
