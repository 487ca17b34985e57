"""Every op with a CPU kernel at each instruction level, beside its reference in plain torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ferrum_ops
from benchmarks import cpu_ops
from benchmarks.cpu import report
from benchmarks.cpu.rounds import seconds_of
from ferrum_ops.testing.timing import Case, check_case, compare, torch_op

TOKENS = (1, 8, 64)

#: How many times as fast as the reference every level has to be.
GOAL = 3.0

LEVELS = ferrum_ops.CPU_ISA_LEVELS

#: Cases that move more are left out: they would be timed at the memory's speed.
MAX_BYTES = 32 << 20

#: Seconds of one call at every level and of the reference, and how many samples they are worth.
SAMPLES = ((0.05, 15), (0.5, 5), (float("inf"), 1))


def available() -> tuple[str, ...]:
    """Those that this processor has."""
    return LEVELS[: LEVELS.index(ferrum_ops.cpu_isa()) + 1]


def at_level(level: str, call: Callable[[], Any]) -> Any:
    with ferrum_ops.use_cpu_isa(level):
        return call()


def measure(case: Case, levels: Sequence[str]) -> dict[str, Any]:
    """Check the op at the first level, then time every level in turns with the reference."""
    at_level(levels[0], partial(check_case, case))
    op, reference = torch_op(case.op), ferrum_ops.OPS[case.op].ref
    calls = {level: partial(at_level, level, partial(op, *case.arguments)) for level in levels}
    calls["reference"] = partial(reference, *case.arguments)
    seconds = sum(seconds_of(call) for call in calls.values())
    repeats = next(count for limit, count in SAMPLES if seconds < limit)
    timings = compare(calls, repeats=repeats, warmup=0 if repeats == 1 else 1)
    return {
        "op": case.op,
        "sizes": case.label,
        "reference_us": timings["reference"].median * 1e6,
        **{f"{level}_us": timings[level].median * 1e6 for level in levels},
        "threads": torch.get_num_threads(),
        "commit": report.commit(),
    }


def times(row: dict[str, Any], level: str) -> float | None:
    """How many times as fast as the reference."""
    own = row.get(f"{level}_us")
    return row["reference_us"] / own if own else None


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        ratios = [times(row, level) for level in LEVELS]
        shown = ["" if r is None else f"{r:.1f}" if r >= 1.95 else f"{r:.2f}" for r in ratios]
        lines.append([row["op"], row["sizes"], f"{row['reference_us']:.0f}", *shown])
    return report.markdown(["op", "sizes", "reference us", *(f"{level} x" for level in LEVELS)], lines)


def verdict(rows: list[dict[str, Any]], level: str) -> str:
    """How many lines reach the goal at a level, and which do not."""
    found = [(row, ratio) for row in rows if (ratio := times(row, level)) is not None]
    missed = [f"{row['op']} {row['sizes']} ({ratio:.2f})" for row, ratio in found if ratio < GOAL]
    return f"{level}: {len(found) - len(missed)} of {len(found)} lines reach {GOAL:g}x. Others: " + (
        "; ".join(missed) or "none"
    )


def page(result: dict[str, Any]) -> str:
    machine, rows = result["machine"], result["rows"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    head = [
        "# Instruction levels beside the reference",
        "",
        f"{machine['processor']}, {rows[0]['threads']} threads, torch {machine['torch']}, commit {commits}.",
        f"Command: `{result['command']} --save`",
        "",
        'Columns "x": the time of the op\'s reference in plain torch over that of its kernel at the level. At every',
        "level the reference multiplies with the best instructions that the processor has (MKL, oneDNN).",
        "",
    ]
    return "\n".join([*head, *(f"- {verdict(rows, level)}" for level in LEVELS), "", table(rows), ""])


def cases(families: list[str] | None, tokens: Iterable[int]) -> Iterable[Case]:
    """Those of ops that have a kernel, if they fit a last-level cache."""
    backends = ferrum_ops.backends()
    for name, of_family in cpu_ops.sections(tuple(tokens)).items():
        if families is None or name in families:
            for case in of_family:
                if backends[case.op]["cpu"] == "kernel" and case.num_bytes <= MAX_BYTES:
                    yield case


def main(arguments: argparse.Namespace, folder: Path = report.RESULTS) -> None:
    levels = available()
    rows: list[dict[str, Any]] = []
    for case in cases(arguments.families, arguments.tokens or TOKENS):
        rows.append(measure(case, levels))
        print(table(rows).splitlines()[-1], flush=True)
    print("", table(rows), *(verdict(rows, level) for level in levels), sep="\n")
    if arguments.save:
        path = report.save("levels", ("op", "sizes"), rows, folder)
        path.with_name("cpu_levels.md").write_text(page(report.load("levels", folder)))
        print(path)
