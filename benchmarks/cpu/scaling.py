"""How the routed expert block's time grows: with threads, experts, top-k, and routing that prefers some experts.

Ferrum alone. What it should show: time follows the bytes of the experts in use, not their number.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cpu import report
from benchmarks.cpu.experts import Routing, measure, prepare, uniform_routing
from benchmarks.cpu.limits import measure_limits
from benchmarks.cpu.report import hold_against
from benchmarks.peers.interface import MoeShape

TOKENS = (1, 16, 64)
EXPERTS = (8, 16, 32, 64, 128, 256, 512)
TOP_K = (1, 2, 4, 8, 16)
EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)
THREADS = (1, 2)
PEER = "ferrum int8"


def zipf_routing(exponent: float) -> Callable[[int, MoeShape], Routing]:
    """Expert r is wanted in proportion to `(r + 1) ** -exponent`; the K of a token are drawn without repetition."""

    def route(tokens: int, shape: MoeShape) -> Routing:
        wanted = -exponent * torch.arange(1, shape.experts + 1).log()
        noise = -(-torch.rand(tokens, shape.experts).log()).log()  # Gumbel: the largest sums are such a draw
        scores, ids = (wanted + noise).topk(shape.top_k)
        return ids.to(torch.int32), scores.softmax(-1)

    return route


def layers(shape: MoeShape) -> int:
    """As many as exceed a last-level cache of 256 MB, at least two."""
    per_layer = shape.experts * 3 * shape.hidden * shape.width // 2
    return max(2, -(-(256 << 20) // per_layer))


def vary(kind: str, budget: float, tokens: list[int]) -> list[dict[str, Any]]:
    base = MoeShape()
    variants: list[tuple[float, MoeShape, Callable[[int, MoeShape], Routing], int]] = {
        "experts": [(e, replace(base, experts=e), uniform_routing, 0) for e in EXPERTS],
        "top_k": [(k, replace(base, top_k=k), uniform_routing, 0) for k in TOP_K],
        "zipf": [(s, base, zipf_routing(s), 0) for s in EXPONENTS],
        "threads": [(t, base, uniform_routing, t) for t in THREADS],
    }[kind]
    rows: list[dict[str, Any]] = []
    before, held, contenders = torch.get_num_threads(), 0, []
    for value, shape, route, threads in variants:
        torch.set_num_threads(threads or before)
        new: list[dict[str, Any]] = []
        if shape.experts != held:  # the weights do not depend on the rest
            contenders, held = prepare([PEER], shape, layers(shape)), shape.experts
        for count in tokens:
            new += measure(contenders, count, shape, budget, route)
        hold_against(new, measure_limits(torch.get_num_threads()))
        rows += [{"kind": kind, "value": value, **row} for row in new]
    torch.set_num_threads(before)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            f"{row['value']:g}",
            str(row["tokens"]),
            f"{row['active_experts']:.1f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['us']:.0f}",
            f"{row['us'] / (row['bytes'] / 1e6):.1f}",
            f"{row['of_read_bandwidth']:.2f}",
            f"{row['us'] / row['floor_us']:.2f}",
        ]
        for row in rows
    ]
    kind = rows[0]["kind"]
    return report.markdown([kind, "tokens", "experts in use", "MB", "us", "us/MB", "of read", "times the floor"], lines)


def main(arguments: argparse.Namespace) -> None:
    for kind in arguments.kinds or ("threads", "experts", "top_k", "zipf"):
        rows = vary(kind, arguments.budget / 4, arguments.tokens or list(TOKENS))
        print(table(rows), "", sep="\n", flush=True)
        if arguments.save:
            print(report.save("scaling", ("kind", "value", "tokens", "peer"), rows))
