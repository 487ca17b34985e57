"""The expert benchmark for a GPU, dry on the CPU: which peers are timed, on what, and what is said of the others."""

import time

import torch

from benchmarks import gpu_experts
from benchmarks.peers.ferrum_marlin import FerrumMarlin
from benchmarks.peers.interface import MoeShape
from benchmarks.peers.torch_grouped import TorchGrouped
from ferrum_ops.testing.timing import timing_of

SHAPE = MoeShape(hidden=128, width=64, experts=9, top_k=3, group_size=64)


class Wrong(TorchGrouped):
    name = "wrong"

    def moe_block(self, weights):
        block = super().moe_block(weights)
        expert = block.expert
        block.expert = lambda index: expert((index + 1) % SHAPE.experts)
        return block


def timed(functions, **_):
    """As `gpu.compare`: every layer's call once."""
    timings = {}
    for name, calls in functions.items():
        assert len(calls) == gpu_experts.LAYERS
        start = time.perf_counter()
        shapes = {tuple(call().shape) for call in calls}
        assert shapes == {(shapes.copy().pop()[0], SHAPE.hidden)}
        timings[name] = timing_of([time.perf_counter() - start])
    return timings


def test_dry_run(monkeypatch):
    peers = [FerrumMarlin("cpu"), TorchGrouped("cpu"), Wrong("cpu")]
    monkeypatch.setattr(gpu_experts, "select", lambda names, known: (peers, {"other": "not installed: other"}))
    monkeypatch.setattr(gpu_experts.gpu, "compare", timed)
    rows, notes = gpu_experts.measure(SHAPE, None, [1, 4])
    assert [(r["tokens"], r["peer"]) for r in rows] == [
        (tokens, name) for tokens in (1, 4) for name in ("ferrum marlin", "torch bf16 grouped_mm")
    ]
    assert notes[0] == "other: not installed: other" and notes[1].startswith(
        "wrong: WrongResult: wrong: relative error"
    )
    words = 128 * 2 * 64 + 64 * 128  # of one expert, a nibble each
    assert rows[0]["bytes"] == 3 * (words / 2 + 2 * words / 64) and rows[1]["bytes"] == 3 * 2 * words
    head = {"device": "none", "torch": torch.__version__, "commit": "x", "copy_bandwidth": 1e12}
    assert "| 4 | torch bf16 grouped_mm |" in gpu_experts.markdown(head, rows, notes)
