"""Whole models: prompts, greedy decoding at several batch sizes, and the time from loading to the first token."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import report
from benchmarks.peers.models import MODELS, Model, ModelPeer, timed_load

PEERS = ("ferrum float32", "ferrum bfloat16", "llama.cpp Q4_K_M", "llama.cpp Q4_0", "transformers")
WORKLOADS = ("first", "prompt 128", "prompt 512", "decode 1", "decode 8", "decode 16")

#: Of every decoded sequence.
PROMPT, STEPS = 32, {1: 32, 8: 16, 16: 16}

#: A different quantisation of the same weights gives about the same logits; another model does not.
MIN_COSINE = 0.9

#: Times llama.cpp's better setting that Ferrum's better one has to reach.
GOALS = {"decode 1": 2.0, "decode 8": 2.5, "decode 16": 2.7, "prompt 128": 3.0, "prompt 512": 2.3}


@dataclass
class Loaded:
    peer: ModelPeer
    model: Model
    load_seconds: float
    first_seconds: float  # of a prompt of 128 tokens and one token, right after loading
    cosine: float = 1.0
    samples: dict[str, list[float]] = field(default_factory=dict)


def random_ids(vocab: int, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length))


def prepare(checkpoint: Path, names: Sequence[str], vocab: int) -> list[Loaded]:
    """Load every peer that runs here. Raises AssertionError for one whose logits are not those of the first."""
    ids, reference = random_ids(vocab, 1, 128), None
    loaded = []
    for peer in (p for p in MODELS if any(p.name.startswith(name) for name in names)):
        if reason := peer.available(checkpoint):
            print(f"{peer.name}: left out, {reason}")
            continue
        model, load_seconds = timed_load(peer, checkpoint)
        start = time.perf_counter()
        model.generate(ids, 1)
        first_seconds = time.perf_counter() - start
        logits = model.logits(ids)
        reference = logits if reference is None else reference
        cosine = float(torch.cosine_similarity(logits, reference, dim=0))
        if not cosine >= MIN_COSINE:
            raise AssertionError(f"{peer.name}: cosine of the logits {cosine:.3f}, expected at least {MIN_COSINE}")
        print(f"{peer.name}: loaded in {load_seconds:.2f} s, first token {first_seconds:.2f} s, cosine {cosine:.4f}")
        loaded.append(Loaded(peer, model, load_seconds, first_seconds, cosine))
    return loaded


def workload(name: str, vocab: int) -> tuple[int, Callable[[Model], float]]:
    """Tokens that count, and what gives the seconds they take."""
    kind, _, size = name.partition(" ")
    if kind == "prompt":
        ids = random_ids(vocab, 1, int(size))
        return int(size), lambda model: _prompt_seconds(model, ids)
    batch = int(size)
    ids, steps = random_ids(vocab, batch, PROMPT), STEPS[batch]
    return batch * steps, lambda model: _decode_seconds(model, ids, steps)


def _prompt_seconds(model: Model, ids: torch.Tensor) -> float:
    """Until the first token."""
    start = time.perf_counter()
    return model.generate(ids, 1)[0] - start


def _decode_seconds(model: Model, ids: torch.Tensor, steps: int) -> float:
    """From the first token on."""
    times = model.generate(ids, steps + 1)
    return times[-1] - times[0]


def measure(
    loaded: list[Loaded], name: str, vocab: int, rounds: int, beside: Callable[[], float] | None = None
) -> list[dict[str, Any]]:
    """Contenders take turns; the first round is not counted. `beside` is called after every turn, and a contender's row
    has the median of what it gave after its own.
    """
    if name == "first":
        return [row_of(name, c, [c.load_seconds + c.first_seconds], 1) for c in loaded]
    tokens, run = workload(name, vocab)
    samples: dict[str, list[float]] = {c.peer.name: [] for c in loaded}
    others: dict[str, list[float]] = {c.peer.name: [] for c in loaded}
    for r in range(rounds + 1):
        for contender in loaded:
            seconds = run(contender.model)
            other = beside() if beside else 0.0
            if r:
                samples[contender.peer.name].append(seconds)
                others[contender.peer.name].append(other)
    rows = [row_of(name, c, samples[c.peer.name], tokens) for c in loaded]
    for row in rows if beside else ():
        row["beside"] = statistics.median(others[row["peer"]])
    return rows


def row_of(name: str, contender: Loaded, seconds: list[float], tokens: int) -> dict[str, Any]:
    return {
        "workload": name,
        "peer": contender.peer.name,
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "tokens_per_second": tokens / statistics.median(seconds),
        "load_seconds": contender.load_seconds,
        "cosine": contender.cosine,
        "threads": torch.get_num_threads(),
        "commit": report.commit(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Tokens per second (seconds for "first"), and how many times a peer's Ferrum's best is."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["workload"] for row in rows):
        mine = {row["peer"]: row for row in rows if row["workload"] == name}
        own = min((r["seconds"] for p, r in mine.items() if p.startswith("ferrum")), default=None)
        line = [name]
        for peer in peers:
            row = mine.get(peer)
            if row is None:
                line.append("")
                continue
            value = f"{row['seconds']:.2f} s" if name == "first" else f"{row['tokens_per_second']:.1f}"
            ratio = f" ({row['seconds'] / own:.2f}x)" if own and not peer.startswith("ferrum") else ""
            line.append(value + ratio)
        lines.append(line)
    return report.markdown(["tokens/s", *peers], lines)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    missed = []
    for name, goal in GOALS.items():
        best: dict[str, dict[str, Any]] = {}
        for row in (row for row in rows if row["workload"] == name):
            engine = row["peer"].split()[0]
            if engine not in best or row["seconds"] < best[engine]["seconds"]:
                best[engine] = row
        if "ferrum" in best and "llama.cpp" in best:
            ratio = best["llama.cpp"]["seconds"] / best["ferrum"]["seconds"]
            if ratio < goal:
                missed.append(f"{name}: {ratio:.2f}x {best['llama.cpp']['peer']}, goal {goal}x")
    return missed


def main(arguments: argparse.Namespace) -> None:
    from benchmarks.models.make_gguf import make_gguf
    from benchmarks.models.make_synthetic import Sizes, make_synthetic

    sizes = Sizes(layers=arguments.layers, vocab=arguments.vocab)
    checkpoint = arguments.checkpoint or report.ROOT / "build" / f"synthetic-{sizes.layers}-{sizes.vocab}"
    if not (checkpoint / "config.json").exists():
        make_synthetic(checkpoint, sizes)
    names = arguments.peers or list(PEERS)
    wanted = {p.file.removesuffix(".gguf"): p for p in MODELS if p.file.endswith(".gguf")}
    if any(name.startswith("llama.cpp") for name in names):
        kinds = [k for k, p in wanted.items() if any(p.name.startswith(name) for name in names)]
        if kinds and any("not installed" not in (p.available(checkpoint) or "") for p in wanted.values()):
            missing = [kind for kind in kinds if not (checkpoint / f"{kind}.gguf").exists()]
            if missing:
                make_gguf(checkpoint, missing)
    rows: list[dict[str, Any]] = []
    loaded = prepare(checkpoint, names, sizes.vocab)
    for name in arguments.workloads or WORKLOADS:
        rows += measure(loaded, name, sizes.vocab, arguments.rounds)
        print(table(rows[-len(loaded) :]), flush=True)
    print(table(rows), *verdicts(rows), sep="\n")
    if arguments.save:
        print(report.save("model", ("threads", "workload", "peer"), rows))
