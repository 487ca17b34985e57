"""Every op family on the CPU, beside eager torch and inductor's code for the same formula, into one file.

    python -m benchmarks.cpu_ops [--out build/cpu_ops.txt] [--family norm ...] [--tokens 1 8 512]

Sizes are those of benchmarks/ops. An op that differs from its reference is not timed: the run
ends with its error. The last lines name the ops with a kernel that are slower than inductor's code, and those that it
was not held against. Nothing else should run meanwhile. Half of the time is inductor's: its cache makes a second run
shorter.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import ferrum_ops
from benchmarks.gpu import commit
from ferrum_ops.testing.timing import Case, run_cases

TOKENS = (1, 8, 512)
BITS = (4,)
#: Families whose calls take milliseconds.
SLOW = ("int4", "gptq", "gguf", "marlin", "moe_gemm", "decoder", "attention")


def sections(token_counts: Sequence[int] = TOKENS) -> dict[str, Iterator[Case]]:
    """The cases of every family. Attention, in bfloat16, has sizes of its own and a prefill of the last count."""

    def family(name: str) -> Any:
        return importlib.import_module(f"benchmarks.ops.bench_{name}")

    plain = ("norm", "activation", "elementwise", "rope", "kv_cache", "moe_routing", "moe_combine", "sampling", "int4")
    found = {name: family(name).cases(token_counts=token_counts) for name in plain}
    found["gptq"] = family("gptq").cases(widths=BITS, row_counts=token_counts)
    found["gguf"] = family("gguf").cases(types=family("gguf").TYPES[:1], token_counts=token_counts)
    found["marlin"] = family("marlin").cases(row_counts=token_counts)
    found["moe_gemm"] = family("moe_gemm").cases(token_counts=token_counts)
    # A sequence for each token: what 512 of them keep would not fit the memory of many machines.
    found["decoder"] = family("decoder").cases(token_counts=[t for t in token_counts if t <= 8])
    found["attention"] = family("attention").cases(prefill_sizes=tuple(token_counts[-1:]))
    return found


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Which ops with a kernel are slower than inductor's code, and which were not held against it."""
    own = [row for row in rows if ferrum_ops.backends()[row["op"]]["cpu"] == "kernel"]

    def named(rows: list[dict[str, Any]]) -> str:
        return "; ".join(f"{row['op']} {row['sizes']}" for row in rows) or "none"

    slower = [row for row in own if row.get("compiled", 1.0) < 1.0]
    timed = [row for row in own if "compiled" in row]
    return [
        f"Slower than inductor's code, of {len(timed)} lines of ops with a kernel: "
        + ("; ".join(f"{row['op']} {row['sizes']} ({row['compiled']:.2f})" for row in slower) or "none"),
        f"Not held against it: {named([row for row in own if 'compiled' not in row])}",
    ]


class Both(io.TextIOBase):
    """Writes to the terminal and to a file."""

    def __init__(self, file: io.TextIOBase) -> None:
        self.targets = (sys.stdout, file)

    def write(self, text: str) -> int:
        for target in self.targets:
            target.write(text)
            target.flush()
        return len(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/cpu_ops.txt"))
    parser.add_argument("--family", nargs="+", choices=sections(), help="only these")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    args = parser.parse_args(arguments)
    started = time.monotonic()
    torch.manual_seed(0)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # references in several graphs are in the table
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with args.out.open("w") as file, contextlib.redirect_stdout(Both(file)):
        print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit()}.")
        print("Command: python -m benchmarks.cpu_ops (make bench-ops)")
        print(
            '"eager/op", "compiled/op": time of plain torch, and of inductor\'s code for the formula, over the op\'s.'
        )
        for name, cases in sections(args.tokens).items():
            if args.family is None or name in args.family:
                print(f"\n== {name}")
                rows += run_cases(cases, compile_reference=True, repeats=7 if name in SLOW else 20)
        print("\n== in all")
        print("\n".join(verdict(rows)))
        print(f"{time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
