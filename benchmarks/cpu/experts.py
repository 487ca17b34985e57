"""The routed expert block of one layer, weights cold: time against the number of tokens."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cpu import report
from benchmarks.cpu.limits import measure_limits
from benchmarks.cpu.report import hold_against, row_of
from benchmarks.cpu.rounds import take_turns
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
    budget: float,
    route: Callable[[int, MoeShape], Routing] = uniform_routing,
) -> list[dict[str, Any]]:
    """Check every contender, time them in turns, one row for each. Raises WrongResult before any is timed."""
    inputs = draw(tokens, shape, 64 if tokens <= 64 else 8, route)
    errors = {c.peer.name: check_block(c.peer, c.layers[0], inputs[0][0], *inputs[0][1]) for c in contenders}
    result = take_turns({c.peer.name: c.calls(inputs) for c in contenders}, budget)
    active = sum(ids.unique().numel() for _, (ids, _) in inputs) / len(inputs)
    operations = 2 * tokens * shape.top_k * 3 * shape.hidden * shape.width
    sizes = {"tokens": tokens, "experts": shape.experts, "top_k": shape.top_k, "active_experts": active}
    return [
        {
            **sizes,
            **row_of(c.peer.name, result, active * c.layers[0].expert_nbytes, operations),
            "error": errors[c.peer.name],
        }
        for c in contenders
    ]


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """One line per goal that is missed."""
    missed = []
    for own in (row for row in rows if row["peer"] == "ferrum int8"):
        tokens = own["tokens"]
        if tokens == 1 and own["of_read_bandwidth"] < BANDWIDTH_GOAL:
            missed.append(f"M=1: {own['of_read_bandwidth']:.2f} of the read bandwidth, goal {BANDWIDTH_GOAL}")
        for peer, goals in GOALS.items():
            same = [r for r in rows if r["tokens"] == tokens and r["peer"].startswith(peer)]
            goal = goals.get(tokens, goals[0])
            missed += report.missed(f"M={tokens}", own, same, goal)
    return missed


def main(arguments: argparse.Namespace) -> None:
    shape = MoeShape()
    contenders = prepare(arguments.peers or PEERS, shape)
    rows: list[dict[str, Any]] = []
    for tokens in arguments.tokens or TOKENS:
        new = measure(contenders, tokens, shape, arguments.budget)
        rows += new
        hold_against(rows, measure_limits(torch.get_num_threads()))
        print(report.table(new, "tokens"), flush=True)
    print("", report.table(rows, "tokens"), *verdicts(rows), sep="\n")
    if arguments.save:
        print(report.save("experts", ("threads", "tokens", "peer"), rows))
