"""The whole-model benchmark for a GPU, dry on the CPU at tiny sizes."""

import json
import sys
from math import isfinite

import pytest
import torch

from benchmarks import gpu_model
from benchmarks.models.make_synthetic import Sizes
from ferrum_models.qwen3_moe import decode
from tests.models.recording import RecordedGraphs

SIZES = Sizes(
    layers=3, hidden=64, heads=2, kv_heads=1, head_dim=32, experts=5, top_k=2, intermediate=32, vocab=300, group_size=32
)


@pytest.fixture(scope="module")
def model():
    return gpu_model.build(SIZES, torch.device("cpu"), torch.bfloat16)


def test_layers_are_the_same_size_and_not_the_same(model):
    layers = model.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
    assert len({gpu_model.nbytes(layer) for layer in layers}) == 1
    first, second = (layer.mlp.experts.weights for layer in layers[:2])
    assert torch.equal(second.w13, first.w13.roll(1, 0)) and not torch.equal(second.w13, first.w13)
    assert torch.equal(second.w2_scales, first.w2_scales.roll(1, 0))
    addresses = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    assert len(addresses) == len(set(addresses))
    logits = model(torch.arange(1, 9)[None]).logits
    assert logits.shape == (1, 8, 300) and logits.isfinite().all() and len(logits[0].argmax(-1).unique()) > 1


def test_bytes_of_a_step(model):
    layer = model.model.layers[0]
    experts, rest = gpu_model.nbytes(layer.mlp.experts), gpu_model.nbytes(layer) - gpu_model.nbytes(layer.mlp.experts)
    head = (
        gpu_model.nbytes(model.lm_head) + gpu_model.nbytes(model.model.norm) + gpu_model.nbytes(model.model.rotary_emb)
    )
    cache = 3 * 2 * 32 * 2 * 100
    assert gpu_model.step_bytes(model, 1, 100) == pytest.approx(3 * (rest + experts * 2 / 5) + head + cache)
    assert gpu_model.step_bytes(model, 1000, 0) == pytest.approx(3 * (rest + experts) + head)


def run(monkeypatch, tmp_path, *options):
    monkeypatch.setattr(gpu_model, "build", lambda *_: MODEL[0])
    sizes = [f"--{k.replace('_', '-')}={v}" for k, v in vars(SIZES).items() if k != "sym"]
    argv = ["gpu_model", "--out", str(tmp_path), "--device", "cpu", "--prompt", "8", "--prefill", "16", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--samples", "2", *sizes, *options])
    gpu_model.main()
    return json.loads((tmp_path / "model.json").read_text()), (tmp_path / "model.md").read_text()


MODEL = []


@pytest.fixture
def built(model):
    MODEL[:] = [model]


def test_dry_run(monkeypatch, tmp_path, built):
    monkeypatch.setattr(decode, "graphs_for", lambda device: RecordedGraphs())
    result, table = run(monkeypatch, tmp_path, "--batch", "1", "3", "--candidates", "generate", "eager", "graph")
    assert [(r["candidate"], r["batch"]) for r in result["rows"]] == [
        (name, batch) for name in ("graph", "eager", "generate") for batch in (1, 3)
    ]
    assert result["notes"] == []
    # Differences of two times, which on a busy machine have either sign.
    assert all(isfinite(r["seconds"]) and isfinite(r["of_ceiling"]) for r in result["rows"])
    assert result["layouts"] == ["dense", "int4_cpu"] and "| 3 | graph |" in table


def test_what_fails_or_is_not_reached_is_told(monkeypatch, tmp_path, built):
    with pytest.raises(SystemExit):  # nothing records steps on a CPU
        run(monkeypatch, tmp_path, "--batch", "1", "--candidates", "graph")
    assert "graph, batch 1: RuntimeError: nothing records steps on cpu" in (tmp_path / "model.md").read_text()
    result, _ = run(monkeypatch, tmp_path, "--batch", "1", "--candidates", "eager", "--seconds", "-1")
    assert result["notes"] == ["eager, batch 1: not reached in -1 s"] and not result["rows"]


def test_a_replay_that_differs_is_not_timed(monkeypatch, tmp_path, built):
    class Wrong(RecordedGraphs):
        def capture(self, step, rewind):
            replay, result = super().capture(step, rewind)
            return lambda: (replay(), result.add_(1)), result

    monkeypatch.setattr(decode, "graphs_for", lambda device: Wrong())
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--batch", "1", "--candidates", "graph")
    assert "AssertionError: a replay's logits differ" in (tmp_path / "model.md").read_text()
