"""The routed expert block of one layer, weights cold: time against the number of tokens."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cpu import report
from benchmarks.cpu.limits import Limits, measure_limits
from benchmarks.cpu.rounds import Spread, take_turns
from benchmarks.peers import select
from benchmarks.peers.interface import Call, MoeBlock, MoeShape, Peer, check_block, random_experts

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
PEERS = ("ferrum int8", "onnxruntime", "llama.cpp Q4_K", "transformers")

#: Layers that take turns: together they exceed any last-level cache.
LAYERS = 3

#: How much faster than a peer the block has to be, by number of tokens; 0 stands for all others.
GOALS = {"onnxruntime": {0: 1.5, 512: 2.8}, "llama.cpp": {0: 2.0}}

#: The share of the memory's read bandwidth that one token has to reach.
BANDWIDTH_GOAL = 0.85

Routing = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Contender:
    peer: Peer
    layers: list[MoeBlock]

    def calls(self, inputs: Sequence[tuple[torch.Tensor, Routing]]) -> Callable[[int], Call]:
        """The n-th call: its own routing, on the layer after the last call's."""
        return lambda n: self.layers[n % len(self.layers)].bind(inputs[n % len(inputs)][0], *inputs[n % len(inputs)][1])


def uniform_routing(tokens: int, shape: MoeShape) -> Routing:
    """ids int32 and weights `[M, K]` that add up to 1; every expert equally likely."""
    weights, ids = torch.rand(tokens, shape.experts).topk(shape.top_k)
    return ids.to(torch.int32), weights / weights.sum(-1, keepdim=True)


def prepare(names: Sequence[str] | None, shape: MoeShape, layers: int = LAYERS) -> list[Contender]:
    """Every peer that runs here, holding `layers` layers; prints why others do not."""
    peers, missing = select(names)
    for name, reason in missing.items():
        print(f"{name}: left out, {reason}")
    weights = random_experts(shape)
    return [Contender(p, [p.moe_block(weights) for _ in range(layers)]) for p in peers if p.moe_block is not None]


def draw(tokens: int, shape: MoeShape, count: int, route: Callable[[int, MoeShape], Routing]) -> list[Any]:
    return [(torch.randn(tokens, shape.hidden), route(tokens, shape)) for _ in range(count)]


def measure(
    contenders: list[Contender],
    tokens: int,
    shape: MoeShape,
    limits: Limits,
    budget: float,
    route: Callable[[int, MoeShape], Routing] = uniform_routing,
) -> list[dict[str, Any]]:
    """Check every contender, time them in turns, one row for each. Raises WrongResult before any is timed."""
    inputs = draw(tokens, shape, 64 if tokens <= 64 else 8, route)
    errors = {c.peer.name: check_block(c.peer, c.layers[0], inputs[0][0], *inputs[0][1]) for c in contenders}
    timings = take_turns({c.peer.name: c.calls(inputs) for c in contenders}, budget)
    active = sum(ids.unique().numel() for _, (ids, _) in inputs) / len(inputs)
    operations = 2 * tokens * shape.top_k * 3 * shape.hidden * shape.width
    rows = []
    for contender in contenders:
        name, num_bytes = contender.peer.name, active * contender.layers[0].expert_nbytes
        row = row_of(name, timings[name], num_bytes, operations, limits)
        rows.append({"tokens": tokens, "active_experts": active, "error": errors[name], **row})
    return rows


def row_of(peer: str, timing: Spread, num_bytes: float, operations: float, limits: Limits) -> dict[str, Any]:
    """What every section says of a timing. Seconds are those of one call."""
    return {
        "peer": peer,
        "us": timing.median * 1e6,
        "us_lower": timing.lower * 1e6,
        "us_upper": timing.upper * 1e6,
        "bytes": num_bytes,
        "of_read_bandwidth": num_bytes / timing.median / limits.read,
        "of_int8_peak": operations / timing.median / limits.int8 if limits.int8 else None,
        "floor_us": limits.floor(num_bytes, operations) * 1e6,
        "threads": limits.threads,
        "read_gb_per_s": limits.read / 1e9,
        "int8_gop_per_s": limits.int8 / 1e9,
        "commit": report.commit(),
    }


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """One line per goal that these rows, of one number of tokens, miss."""
    own = next((row for row in rows if row["peer"] == "ferrum int8"), None)
    if own is None:
        return []
    missed = []
    tokens = own["tokens"]
    if tokens == 1 and own["of_read_bandwidth"] < BANDWIDTH_GOAL:
        missed.append(f"M=1: {own['of_read_bandwidth']:.2f} of the read bandwidth, goal {BANDWIDTH_GOAL}")
    for peer, goals in GOALS.items():
        goal = goals.get(tokens, goals[0])
        times = {row["peer"]: row["us"] for row in rows if row["peer"].startswith(peer)}
        if times:
            best = min(times, key=lambda name: times[name])
            ratio = times[best] / own["us"]
            if ratio < goal:
                missed.append(f"M={tokens}: {ratio:.2f}x {best}, goal {goal}x ({times[best] / goal:.0f} us)")
    return missed


def table(rows: list[dict[str, Any]], key: str = "tokens") -> str:
    """One line per value of `key`: medians in microseconds and how many times Ferrum's they are."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines = []
    for value in sorted({row[key] for row in rows}):
        mine = {row["peer"]: row for row in rows if row[key] == value}
        base = mine.get("ferrum int8")
        line = [str(value), f"{base['floor_us']:.0f}" if base else ""]
        for peer in peers:
            row = mine.get(peer)
            ratio = f" ({row['us'] / base['us']:.2f}x)" if row and base and row is not base else ""
            line.append(f"{row['us']:.0f}{ratio}" if row else "")
        if base:
            spread = (base["us_upper"] - base["us_lower"]) / base["us"]
            line += [f"{spread:.0%}", f"{base['of_read_bandwidth']:.2f}"]
            line += [f"{base['of_int8_peak']:.2f}" if base["of_int8_peak"] else ""]
        lines.append(line)
    return report.markdown([key, "floor", *peers, "spread", "of read", "of int8"], lines)


def main(arguments: argparse.Namespace) -> None:
    shape = MoeShape()
    limits = measure_limits(torch.get_num_threads())
    contenders = prepare(arguments.peers or PEERS, shape)
    print(f"{limits.read / 1e9:.1f} GB/s read, {limits.int8 / 1e9:.0f} Gop/s int8, {limits.threads} threads; us, cold")
    rows = []
    for tokens in arguments.tokens or TOKENS:
        new = measure(contenders, tokens, shape, limits, arguments.budget)
        print(table(new), *verdicts(new), "", sep="\n", flush=True)
        rows += new
    print(table(rows))
    if arguments.save:
        print(report.save("experts", ("threads", "tokens", "peer"), rows))
