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

    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


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


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["--:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
