"""Whole models from the same GGUF file as llama.cpp: decoding, a prompt, loading time and memory."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import report
from benchmarks.cpu.limits import BUFFER_BYTES, compiled, huge_pages_offered, reads
from benchmarks.cpu.model import measure, prepare, random_ids, table
from benchmarks.peers.models import MODELS, timed_load

FILES = ("Q4_K_M", "Q8_0")
WORKLOADS = ("decode 1", "decode 8", "decode 16", "prompt 512")

#: Times the better of llama.cpp's settings that Ferrum's best has to reach.
GOALS = {"decode 1": 1.6, "decode 8": 1.6, "decode 16": 1.6, "prompt 512": 2.0}


def peers_of(file: str) -> list[str]:
    return [p.name for p in MODELS if p.file == f"{file}.gguf"]


def bytes_per_step(path: Path, batch: int) -> float:
    """Bytes of weights in the file that a step of decoding reads, with uniform routing."""
    from ferrum_models.qwen3_moe.gguf_file import GgufCheckpoint

    checkpoint = GgufCheckpoint(path)
    experts = checkpoint.metadata["qwen3moe.expert_count"]
    chosen = checkpoint.metadata["qwen3moe.expert_used_count"]
    active = 1 - (1 - chosen / experts) ** batch
    total = 0.0
    for name, tensor in checkpoint.tensors.items():
        if name != "token_embd.weight":
            total += tensor.nbytes * (active if "_exps" in name else 1)
    return total


def memory_of(name: str, checkpoint: Path, threads: int) -> dict[str, float]:
    """Seconds to load and bytes in memory after a prompt and a few tokens, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu.gguf", name, str(checkpoint), str(threads)]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def print_memory(name: str, checkpoint: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    peer = next(p for p in MODELS if p.name == name)
    keys = {"peak_bytes": "VmHWM", "anonymous_bytes": "RssAnon", "mapped_bytes": "RssFile"}
    before = {label: status(key) for label, key in keys.items()}
    with torch.inference_mode():
        model, seconds = timed_load(peer, checkpoint)
        model.generate(random_ids(32000, 1, 128), 8)
    print(json.dumps({"load_seconds": seconds, **{k: status(key) - before[k] for k, key in keys.items()}}))


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    missed = []
    for file in dict.fromkeys(row["file"] for row in rows):
        for name, goal in GOALS.items():
            mine = [row for row in rows if (row["file"], row["workload"]) == (file, name)]
            own = min((r for r in mine if r["peer"].startswith("ferrum")), key=lambda r: r["seconds"], default=None)
            best = min((r for r in mine if r["peer"].startswith("llama")), key=lambda r: r["seconds"], default=None)
            if own is None or best is None or best["seconds"] / own["seconds"] >= goal:
                continue
            floor = own.get("floor_seconds")
            wanted = best["seconds"] / goal
            below = f", reading takes {floor * 1e3:.1f}" if floor else ""
            missed.append(
                f"{file} {name}: {best['seconds'] / own['seconds']:.2f}x {best['peer']}, goal {goal}x "
                f"({wanted * 1e3:.1f} ms in all{below})"
            )
    return missed


def memory_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["peer"],
            f"{row['load_seconds']:.2f}",
            *(f"{row[key] / 1e6:.0f}" for key in ("peak_bytes", "anonymous_bytes", "mapped_bytes")),
        ]
        for row in rows
        if "peak_bytes" in row
    ]
    return report.markdown(["model", "load, s", "peak MB", "anonymous MB", "mapped MB"], lines)


def of_read_table(rows: list[dict[str, Any]]) -> str:
    """The time that reading a step's weights takes as a part of the step, and in brackets the GB/s meanwhile."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    cells = {
        (row["workload"], row["peer"]): f"{row['floor_seconds'] / row['seconds']:.2f} ({row['read_gb_per_s']:.0f})"
        for row in rows
        if row.get("floor_seconds")
    }
    names = dict.fromkeys(name for name, _ in cells)
    return report.markdown(["of read", *peers], [[n, *(cells.get((n, p), "") for p in peers)] for n in names])


def tables(rows: list[dict[str, Any]]) -> str:
    """For each file tokens per second and how near decoding is to the read bandwidth; a table of memory."""
    parts = []
    for file in dict.fromkeys(row["file"] for row in rows):
        mine = [row for row in rows if row["file"] == file and row["workload"] in WORKLOADS]
        mine.sort(key=lambda row: WORKLOADS.index(row["workload"]))
        parts += [f"{file}.", table(mine), of_read_table(mine)]
    return "\n\n".join([*parts, memory_table(rows)])


def main(arguments: argparse.Namespace) -> None:
    from benchmarks.models.make_gguf import make_gguf
    from benchmarks.models.make_synthetic import Sizes, make_synthetic

    sizes = Sizes(layers=arguments.layers, vocab=arguments.vocab)
    checkpoint = arguments.checkpoint or report.ROOT / "build" / f"synthetic-{sizes.layers}-{sizes.vocab}"
    if not (checkpoint / "config.json").exists():
        make_synthetic(checkpoint, sizes)
    if missing := [file for file in FILES if not (checkpoint / f"{file}.gguf").exists()]:
        make_gguf(checkpoint, missing)
    with compiled() as functions, ExitStack() as stack:
        read = None
        if functions is not None:
            pages = reads(functions, torch.get_num_threads(), BUFFER_BYTES, huge=huge_pages_offered())
            read = stack.enter_context(pages)
        rows = measure_files(checkpoint, arguments, sizes.vocab, read)
    print(*verdicts(rows), sep="\n")
    if arguments.save:
        print(report.save("gguf", ("threads", "file", "workload", "peer"), rows))


def measure_files(
    checkpoint: Path, arguments: argparse.Namespace, vocab: int, read: Callable[[], float] | None
) -> list[dict[str, Any]]:
    """`read` gives the bytes per second of a pass over memory, which bounds decoding at that moment."""
    rows: list[dict[str, Any]] = []
    for file in FILES:
        names = arguments.peers or peers_of(file)
        loaded = [c for c in prepare(checkpoint, names, vocab) if c.peer.file == f"{file}.gguf"]
        for name in arguments.workloads or WORKLOADS:
            kind, _, batch = name.partition(" ")
            for row in measure(loaded, name, vocab, arguments.rounds, read if kind == "decode" else None):
                row |= {"file": file, "tokens": row["tokens_per_second"] * row["seconds"]}
                if (rate := row.pop("beside", None)) is not None:
                    steps = row["tokens"] / int(batch)
                    row["floor_seconds"] = steps * bytes_per_step(checkpoint / f"{file}.gguf", int(batch)) / rate
                    row["read_gb_per_s"] = rate / 1e9
                rows.append(row)
        peers = [c.peer.name for c in loaded]
        del loaded
        for name in peers:
            memory = memory_of(name, checkpoint, torch.get_num_threads())
            about = {"workload": "load", "peer": name, "file": file, "threads": torch.get_num_threads()}
            rows.append(about | memory | {"commit": report.commit()})
        print(tables([row for row in rows if row["file"] == file]), flush=True)
    return rows


if __name__ == "__main__":
    print_memory(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
