"""Rows of results: printed as they come, kept as JSON, shown as a Markdown table."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ferrum_ops
from benchmarks.cpu.limits import Limits
from benchmarks.cpu.rounds import Turns

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def describe_machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names) or None,
        "torch": torch.__version__,
        "kernels": ferrum_ops.cpu_isa(),
    }


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    # Results that an earlier section saved change nothing that is measured.
    changes = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changes else "")


def save(section: str, keys: Sequence[str], rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Add the rows to the section's file; one with the same values of `keys` replaces that of an earlier run."""
    path = folder / f"cpu_peers_{section}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    taken = {tuple(row[key] for key in keys) for row in rows}
    rows = [row for row in old if tuple(row[key] for key in keys) not in taken] + rows
    rows.sort(key=lambda row: [row[key] for key in keys])
    folder.mkdir(parents=True, exist_ok=True)
    result = {"machine": describe_machine(), "command": f"python -m benchmarks.cpu {section}", "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def load(section: str, folder: Path = RESULTS) -> dict[str, Any]:
    return json.loads((folder / f"cpu_peers_{section}.json").read_text())


def row_of(peer: str, turns: Turns, num_bytes: float, operations: float) -> dict[str, Any]:
    """What every section says of a timing: microseconds of one call, and what it reads and computes at least."""
    timing = turns.spreads[peer]
    return {
        "peer": peer,
        "us": timing.median * 1e6,
        "us_lower": timing.lower * 1e6,
        "us_upper": timing.upper * 1e6,
        "bytes": num_bytes,
        "operations": operations,
        "foreign_cpu": turns.foreign,
        "commit": commit(),
    }


def hold_against(rows: list[dict[str, Any]], limits: Limits) -> None:
    """Add to rows of one run how near they come to the machine's limits, as measured so far in that run."""
    for row in rows:
        if "read_gb_per_s" in row:
            before = Limits(row["threads"], row["read_gb_per_s"] * 1e9, row["int8_gop_per_s"] * 1e9)
            limits = limits.or_better(before)
    for row in rows:
        seconds = row["us"] / 1e6
        row["threads"] = limits.threads
        row["read_gb_per_s"], row["int8_gop_per_s"] = limits.read / 1e9, limits.int8 / 1e9
        row["floor_us"] = limits.floor(row["bytes"], row["operations"]) * 1e6
        row["of_read_bandwidth"] = row["bytes"] / seconds / limits.read
        row["of_int8_peak"] = row["operations"] / seconds / limits.int8 if limits.int8 else None


def table(rows: list[dict[str, Any]], key: str) -> str:
    """One line per value of `key`: medians in microseconds, and how many times Ferrum's those of the peers are."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines = []
    for value in dict.fromkeys(row[key] for row in rows):
        mine = {row["peer"]: row for row in rows if row[key] == value}
        own = mine.get("ferrum int8", next(iter(mine.values())))
        line = [str(value), f"{own['floor_us']:.0f}"]
        for peer in peers:
            row = mine.get(peer)
            ratio = f" ({row['us'] / own['us']:.2f}x)" if row and row is not own else ""
            line.append(f"{row['us']:.0f}{ratio}" if row else "")
        line += [f"{(own['us_upper'] - own['us_lower']) / own['us']:.0%}", f"{own['of_read_bandwidth']:.2f}"]
        line += [f"{own['of_int8_peak']:.2f}" if own["of_int8_peak"] else ""]
        line += [f"{own['foreign_cpu']:.0%}" if own["foreign_cpu"] is not None else ""]
        lines.append(line)
    return markdown([key, "floor", *peers, "quartiles", "of read", "of int8", "foreign CPU"], lines)


def missed(label: str, own: dict[str, Any], peers: list[dict[str, Any]], goal: float) -> list[str]:
    """A line when the fastest of `peers` does not take `goal` times as long as Ferrum."""
    if not peers:
        return []
    best = min(peers, key=lambda row: row["us"])
    ratio = best["us"] / own["us"]
    if ratio >= goal:
        return []
    wanted = best["us"] / goal
    reach = "below the floor of" if wanted < own["floor_us"] else "floor"
    return [f"{label}: {ratio:.2f}x {best['peer']}, goal {goal}x ({wanted:.0f} us, {reach} {own['floor_us']:.0f} us)"]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["--:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
