"""Puts the saved results into one page of tables with the goals that are missed, and one figure."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from benchmarks.cpu import experts, gguf, linear, model, report, scaling
from benchmarks.cpu.figure import draw_all


def experts_part(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## Routed experts",
        "One layer of Qwen3-30B-A3B: hidden 2048, expert width 768, 128 experts, top-8, groups of 128, uniform "
        "routing, weights cold. Microseconds; in brackets how many times Ferrum's.",
        report.table(rows, "tokens"),
        *_goals(experts.verdicts(rows)),
    ]


def linear_part(rows: list[dict[str, Any]]) -> list[str]:
    parts = ["## Linear layers", "int4, groups of 128, weights cold. Microseconds."]
    for k, n in dict.fromkeys((row["in_features"], row["out_features"]) for row in rows):
        same = [row for row in rows if (row["in_features"], row["out_features"]) == (k, n)]
        parts += [f"K = {k}, N = {n}:", report.table(same, "tokens")]
    return [*parts, *_goals(linear.verdicts(rows))]


def model_part(rows: list[dict[str, Any]]) -> list[str]:
    rows = sorted(rows, key=lambda row: model.WORKLOADS.index(row["workload"]))
    return [
        "## Whole model",
        "4 layers of that shape, vocabulary 32000, synthetic weights; greedy. Tokens per second; in brackets how many "
        "times Ferrum's best. `first`: seconds from the call that loads to the first token behind a prompt of 128.",
        model.table(rows),
        *_goals(model.verdicts(rows)),
    ]


def gguf_part(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## GGUF files",
        "The same files in both engines, 4 layers of that shape. Tokens per second; in brackets how many times "
        "Ferrum's best. Ferrum's default copies the matrices into tiles; `mapped` leaves them in the file. `of read`: "
        "a step's weights at the rate of a bare pass over memory right after the turn (in brackets, GB/s), as a part "
        "of the step.",
        gguf.tables(rows),
        *_goals(gguf.verdicts(rows)),
    ]


def scaling_part(rows: list[dict[str, Any]]) -> list[str]:
    parts = ["## Scaling of the routed experts", "Ferrum, int8 activations."]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        parts.append(scaling.table([row for row in rows if row["kind"] == kind]))
    return parts


def _goals(missed: list[str]) -> list[str]:
    return ["Goals missed:", "\n".join(f"- {line}" for line in missed)] if missed else ["Every goal is met."]


#: Written by hand: what the tables do not say of themselves.
NOTES = report.RESULTS / "cpu_peers_notes.md"

PARTS: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "experts": experts_part,
    "linear": linear_part,
    "model": model_part,
    "gguf": gguf_part,
    "scaling": scaling_part,
}


def main(arguments: argparse.Namespace) -> None:
    page = ["# Ferrum next to other engines on a CPU"]
    saved: dict[str, list[dict[str, Any]]] = {}
    for section, part in PARTS.items():
        path = report.RESULTS / f"cpu_peers_{section}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        saved[section] = result["rows"]
        if len(page) == 1:
            machine = result["machine"]
            page.append(
                f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, "
                f"{machine['kernels']} kernels; `make bench-cpu`. "
                "Medians of turns; `floor` is the larger of the weights' bytes at the read bandwidth "
                "and the products at the int8 peak, both measured in the same run, reads from ordinary and from huge "
                "pages, of which the faster count; `foreign CPU` is the share of the "
                "processor that other processes had meanwhile."
            )
        commits = ", ".join(dict.fromkeys(row["commit"] for row in result["rows"]))
        threads = ", ".join(str(t) for t in dict.fromkeys(row["threads"] for row in result["rows"]))
        page += [*part(result["rows"]), f"`{result['command']}`, commit {commits}, threads {threads}."]
    if NOTES.exists():
        page.append(NOTES.read_text().strip())
    path = report.RESULTS / "cpu_peers.md"
    path.write_text("\n\n".join(page) + "\n")
    print(path)
    print(draw_all(saved.get("experts", []), saved.get("linear", [])))
