"""Dense int4 linear layers, weights cold: enough copies take turns that no cache holds them."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.cpu import report
from benchmarks.cpu.limits import measure_limits
from benchmarks.cpu.report import hold_against, row_of
from benchmarks.cpu.rounds import take_turns
from benchmarks.peers import select
from benchmarks.peers.interface import Linear, Peer, check_linear, random_int4

TOKENS = (1, 4, 16, 64, 512)
PEERS = ("ferrum int8", "onnxruntime", "torch int4 bfloat16", "llama.cpp Q4_K")
GROUP_SIZE = 128

#: (K, N): q, k and v together, o, and the output projection of Qwen3-30B-A3B.
SHAPES = ((2048, 5120), (4096, 2048), (2048, 151936))

#: Of all copies of a matrix, in Ferrum's format.
COLD_BYTES = 192 << 20


def prepare(names: list[str] | None, in_features: int, out_features: int) -> list[tuple[Peer, list[Linear]]]:
    peers, missing = select(names)
    for name, reason in missing.items():
        print(f"{name}: left out, {reason}")
    matrix = random_int4(out_features, in_features, GROUP_SIZE, torch.Generator().manual_seed(0))
    copies = max(2, -(-COLD_BYTES // (matrix.codes.numel() // 2)))
    return [(p, [p.linear(matrix) for _ in range(copies)]) for p in peers if p.linear is not None]


def measure(contenders: list[tuple[Peer, list[Linear]]], tokens: int, budget: float) -> list[dict[str, Any]]:
    out_features, in_features = contenders[0][1][0].dense().shape
    x = torch.randn(tokens, in_features)
    errors = {peer.name: check_linear(peer, copies[0], x) for peer, copies in contenders}
    turns = take_turns({p.name: lambda n, c=copies: c[n % len(c)].bind(x) for p, copies in contenders}, budget)
    operations = 2 * tokens * in_features * out_features
    sizes = {"tokens": tokens, "in_features": in_features, "out_features": out_features}
    return [
        {**sizes, **row_of(p.name, turns, copies[0].nbytes, operations), "error": errors[p.name]}
        for p, copies in contenders
    ]


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """One line per size at which another engine with int8 or int4 arithmetic is ahead."""
    missed = []
    for own in (row for row in rows if row["peer"] == "ferrum int8"):
        same = [
            r for r in rows if r is not own and all(r[k] == own[k] for k in ("tokens", "in_features", "out_features"))
        ]
        missed += report.missed(f"K={own['in_features']} N={own['out_features']} M={own['tokens']}", own, same, 1.0)
    return missed


def main(arguments: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for in_features, out_features in SHAPES:
        contenders = prepare(arguments.peers or list(PEERS), in_features, out_features)
        new: list[dict[str, Any]] = []
        for tokens in arguments.tokens or TOKENS:
            new += measure(contenders, tokens, arguments.budget)
            hold_against(rows + new, measure_limits(torch.get_num_threads()))
        rows += new
        print(f"K={in_features} N={out_features}", report.table(new, "tokens"), "", sep="\n", flush=True)
    print(*verdicts(rows), sep="\n")
    if arguments.save:
        print(report.save("linear", ("threads", "in_features", "out_features", "tokens", "peer"), rows))
