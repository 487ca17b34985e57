"""Every op with a CUDA kernel on this machine's GPU, beside eager torch and inductor's code for the same formula.

`python -m benchmarks.gpu [--out FOLDER] [--dtype bfloat16] [--family norm ...] [--tokens 1 8 ...] [--seconds 200]`

Writes FOLDER/ops.json and FOLDER/ops.md. Operands rotate through twice the L2 cache where a dozen sets of them are that
large; smaller ones are read from it, as they are in a model. An op that differs from its reference is not timed.
Beside each op a plain copy of as many bytes is timed: where that reaches 85 % of the copy bandwidth, so should the op.
Inductor compiles an op for its first number of tokens, and for any number at the second.
"""

import argparse
import importlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import ferrum_ops
from ferrum_ops.testing import gpu
from ferrum_ops.testing.timing import Case, check_case, torch_op

FAMILIES = (
    "attention",
    "norm",
    "activation",
    "rope",
    "kv_cache",
    "moe_routing",
    "moe_combine",
    "sampling",
    "elementwise",
    "marlin",
)
TOKENS = (1, 8, 32, 128, 512, 4096)
#: Part of the copy bandwidth that an op should reach where its size allows it.
GOAL = 0.85
#: Logits of more rows than a server samples at once would only fill the memory.
MOST_TOKENS = {"sampling": 512}
#: Decoding sequences and one prefill, instead of tokens; weights have none.
SIZES = {"attention": (1, 8, 32, 2048), "marlin": (1,)}
#: References that walk over sequences or experts on the host, or are not what one would write: inductor is not asked.
NOT_COMPILED = ("attention", "paged_attention", "marlin_dequantize_out", "marlin_gemm", "marlin_repack")


def has_kernel(op: str) -> bool:
    return ferrum_ops.backends()[op]["cuda"] == "kernel"


def case_sets(family: str, dtype: torch.dtype, tokens: int) -> Iterator[list[Case]]:
    """For each case of a family that has a kernel: the case on as many sets of operands as the cache calls for."""
    module = importlib.import_module(f"benchmarks.ops.bench_{family}")
    cases = getattr(module, "cases_on_gpu", module.cases)

    def fresh() -> list[Case]:
        with torch.device(gpu.DEVICE):
            return [case for case in cases(dtype, (tokens,)) if has_kernel(case.op)]

    first = fresh()
    copies = gpu.copies_outside_cache(min((case.num_bytes for case in first), default=1))
    yield from map(list, zip(first, *(fresh() for _ in range(copies - 1))))


class Compiled:
    """Inductor's code for each formula, kept from one number of tokens to the next."""

    def __init__(self) -> None:
        self.functions: dict[Any, Callable[..., Any]] = {}

    def __call__(self, formula: Callable[..., Any]) -> Callable[..., Any]:
        if formula not in self.functions:
            self.functions[formula] = torch.compile(formula)
        return self.functions[formula]


def copies(cases: list[Case]) -> list[Callable[[], Any]]:
    """A copy that moves as many bytes as the op, on as many sets of operands."""

    def copy(num_bytes: int) -> Callable[[], Any]:
        source = torch.zeros(max(num_bytes // 2, 1), dtype=torch.uint8, device=gpu.DEVICE)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return [copy(case.num_bytes) for case in cases]


def candidates(cases: list[Case], compiled: Compiled) -> tuple[dict[str, list[Callable[[], Any]]], list[str]]:
    """What to time, one callable per set of operands, and notes on what could not be captured or compiled."""
    op, notes = torch_op(cases[0].op), list[str]()
    found: dict[str, list[Callable[[], Any]]] = {
        "op": [lambda c=c: op(*c.arguments) for c in cases],
        "copy": copies(cases),
    }
    eager = [c.eager for c in cases if c.eager is not None]
    reference = compiled(ferrum_ops.OPS[cases[0].op].ref)
    # Inductor compiles the reference, or the plain formula where it fails on the reference.
    tries = [("eager", eager)]
    if cases[0].op not in NOT_COMPILED:
        tries += [("inductor", [lambda c=c: reference(*c.arguments) for c in cases])]
        tries += [("inductor", [torch.compile(formula, dynamic=False) for formula in eager])]
    for peer, calls in tries:
        if peer in found or not calls:
            continue
        try:
            gpu.capture(calls[:1])
            found[peer] = calls
        except Exception as error:
            notes.append(f"{cases[0].op} {cases[0].label}: {peer}: {(str(error).splitlines() or [repr(error)])[0]}")
            torch.cuda.synchronize()
    return found, notes


def measure(cases: list[Case], bandwidth: float, compiled: Compiled) -> tuple[dict[str, Any], list[str]]:
    case = cases[0]
    check_case(case)
    functions, notes = candidates(cases, compiled)
    timings = gpu.compare(functions)
    own = timings["op"]
    row = {
        "op": case.op,
        "sizes": case.label,
        "sets": len(cases),
        "us": own.median * 1e6,
        "us_quartiles": [own.lower * 1e6, own.upper * 1e6],
        "gb_per_s": case.num_bytes / own.median / 1e9,
        "of_copy_bandwidth": case.num_bytes / own.median / bandwidth,
        "copy_of_copy_bandwidth": case.num_bytes / timings["copy"].median / bandwidth,
        **{peer: timing.median / own.median for peer, timing in timings.items() if peer != "op"},
    }
    return row, notes


def size_allows(row: dict[str, Any]) -> bool:
    return row["copy_of_copy_bandwidth"] >= GOAL


def verdict(rows: list[dict[str, Any]]) -> str:
    """How many of the rows whose size allows it reach the goal, and which do not."""
    allowed = [row for row in rows if size_allows(row)]
    missed = [row for row in allowed if row["of_copy_bandwidth"] < GOAL]
    names = ", ".join(f"{row['op']} {row['sizes']} ({row['of_copy_bandwidth']:.2f})" for row in missed)
    reached = (
        f"{len(allowed) - len(missed)} of the {len(allowed)} sizes that allow it reach {GOAL:.0%} of the copy bandwidth"
    )
    return f"{reached}; below: {names}." if missed else f"{reached}."


def markdown(head: dict[str, Any], rows: list[dict[str, Any]], notes: list[str]) -> str:
    lines = [
        f"{head['device']}, torch {head['torch']}, CUDA {head['cuda']}, commit {head['commit']}, {head['dtype']}: copy "
        f"{head['copy_bandwidth'] / 1e12:.2f} TB/s, bf16 matrix product {head['matrix_rate'] / 1e12:.0f} TFLOP/s. "
        "Columns peer/op: the peer's time over the op's; copy is a copy of as many bytes. Goal: at least "
        f"{GOAL:.0%} of the copy bandwidth, where the copy of as many bytes reaches it.",
        "",
        verdict(rows),
        "",
        "| op | sizes | us | GB/s | of copy bandwidth | goal | copy/op | eager/op | inductor/op |",
        "|---|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        goal = ("reached" if row["of_copy_bandwidth"] >= GOAL else "missed") if size_allows(row) else ""
        peers = (f"{row[peer]:.2f}" if peer in row else "" for peer in ("copy", "eager", "inductor"))
        lines.append(
            f"| {row['op']} | {row['sizes']} | {row['us']:.2f} | {row['gb_per_s']:.0f} | "
            f"{row['of_copy_bandwidth']:.2f} | {goal} | {' | '.join(peers)} |"
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def commit() -> str:
    """Of the sources: what GPU_COMMIT says, for where git does not know it, or git."""
    if os.environ.get("GPU_COMMIT"):
        return os.environ["GPU_COMMIT"]
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--family", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=200, help="start no further op after this time")
    parser.add_argument("--commit", default="", help="of the sources, for where git does not know it")
    args = parser.parse_args()
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    head = gpu.describe() | {"commit": args.commit or commit(), "dtype": args.dtype}
    head |= {"copy_bandwidth": gpu.copy_bandwidth(), "matrix_rate": gpu.matrix_rate()}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for family in args.family:
        torch._dynamo.reset()
        compiled = Compiled()
        for tokens in SIZES.get(family, args.tokens):
            if tokens > MOST_TOKENS.get(family, tokens):
                continue
            for cases in case_sets(family, getattr(torch, args.dtype), tokens):
                if time.monotonic() - started > args.seconds:
                    notes.append(f"{cases[0].op} {cases[0].label}: not reached in {args.seconds:.0f} s")
                    continue
                try:
                    row, said = measure(cases, head["copy_bandwidth"], compiled)
                except Exception as error:  # the other ops are timed all the same
                    kind = "wrong" if isinstance(error, AssertionError) else type(error).__name__
                    notes.append(f"{cases[0].op} {cases[0].label}: {kind}, not timed: {error}")
                    continue
                rows.append(row)
                notes += said
            # What is finished is on disk, should the machine be taken away.
            (args.out / "ops.json").write_text(json.dumps(head | {"rows": rows, "notes": notes}, indent=1))
            (args.out / "ops.md").write_text(markdown(head, rows, notes))
    print(markdown(head, rows, notes))
    if any(", not timed: " in note for note in notes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
