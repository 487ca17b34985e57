"""Every op with a CUDA kernel on this machine's GPU, beside eager torch and inductor's code for the same formula.

`python -m benchmarks.gpu [--out FOLDER] [--dtype bfloat16] [--family norm ...] [--tokens 1 8 ...] [--seconds 200]`

Writes FOLDER/ops.json and FOLDER/ops.md. Operands rotate through twice the L2 cache where a dozen sets of them are that
large; smaller ones are read from it, as they are in a model. An op that differs from its reference is not timed.
"""

import argparse
import importlib
import json
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
)
TOKENS = (1, 8, 32, 128, 512, 4096)
#: Logits of more rows than a server samples at once would only fill the memory.
MOST_TOKENS = {"sampling": 512}
#: Decoding sequences and one prefill, instead of tokens.
SIZES = {"attention": (1, 8, 32, 2048)}
#: References that walk over sequences on the host: inductor is not asked. Their peer is torch's own attention.
NOT_COMPILED = ("attention", "paged_attention")


def has_kernel(op: str) -> bool:
    return ferrum_ops.backends()[op]["cuda"] == "kernel"


def case_sets(family: str, dtype: torch.dtype, tokens: int) -> Iterator[list[Case]]:
    """For each case of a family that has a kernel: the case on as many sets of operands as the cache calls for."""
    module = importlib.import_module(f"benchmarks.ops.bench_{family}")
    cases = getattr(module, "cases_on_gpu", module.cases)

    def fresh() -> list[Case]:
        with torch.device("cuda"):
            return [case for case in cases(dtype, (tokens,)) if has_kernel(case.op)]

    first = fresh()
    copies = gpu.copies_outside_cache(min((case.num_bytes for case in first), default=1))
    yield from map(list, zip(first, *(fresh() for _ in range(copies - 1))))


def candidates(cases: list[Case]) -> tuple[dict[str, list[Callable[[], Any]]], list[str]]:
    """What to time, one callable per set of operands, and notes on what could not be captured or compiled."""
    op, notes = torch_op(cases[0].op), list[str]()
    found: dict[str, list[Callable[[], Any]]] = {"op": [lambda c=c: op(*c.arguments) for c in cases]}
    eager = [c.eager for c in cases if c.eager is not None]
    torch._dynamo.reset()
    compiled = torch.compile(ferrum_ops.OPS[cases[0].op].ref, dynamic=False)
    # Inductor compiles the reference, or the plain formula where it fails on the reference.
    tries = [("eager", eager)]
    if cases[0].op not in NOT_COMPILED:
        tries += [("inductor", [lambda c=c: compiled(*c.arguments) for c in cases])]
        tries += [("inductor", [torch.compile(formula, dynamic=False) for formula in eager])]
    for peer, calls in tries:
        if peer in found or not calls:
            continue
        try:
            gpu.capture(calls[:1])
            found[peer] = calls
        except Exception as error:
            notes.append(f"{cases[0].op} {cases[0].label}: {peer}: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
    return found, notes


def measure(cases: list[Case], bandwidth: float) -> tuple[dict[str, Any], list[str]]:
    case = cases[0]
    check_case(case)
    functions, notes = candidates(cases)
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
        **{peer: timing.median / own.median for peer, timing in timings.items() if peer != "op"},
    }
    return row, notes


def markdown(head: dict[str, Any], rows: list[dict[str, Any]], notes: list[str]) -> str:
    lines = [
        f"{head['device']}, torch {head['torch']}, CUDA {head['cuda']}, commit {head['commit']}, {head['dtype']}: copy "
        f"{head['copy_bandwidth'] / 1e12:.2f} TB/s, bf16 matrix product {head['matrix_rate'] / 1e12:.0f} TFLOP/s. "
        "eager/op and inductor/op: their time over the op's.",
        "",
        "| op | sizes | us | GB/s | of copy | eager/op | inductor/op |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        peers = (f"{row[peer]:.2f}" if peer in row else "" for peer in ("eager", "inductor"))
        lines.append(
            f"| {row['op']} | {row['sizes']} | {row['us']:.2f} | {row['gb_per_s']:.0f} | "
            f"{row['of_copy_bandwidth']:.2f} | {' | '.join(peers)} |"
        )
    return "\n".join([*lines, "", *notes, ""])


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--family", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=200, help="start no further op after this time")
    args = parser.parse_args()
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    head = gpu.describe() | {"commit": commit(), "dtype": args.dtype}
    head |= {"copy_bandwidth": gpu.copy_bandwidth(), "matrix_rate": gpu.matrix_rate()}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for family in args.family:
        for tokens in SIZES.get(family, args.tokens):
            if tokens > MOST_TOKENS.get(family, tokens):
                continue
            for cases in case_sets(family, getattr(torch, args.dtype), tokens):
                if time.monotonic() - started > args.seconds:
                    notes.append(f"{cases[0].op} {cases[0].label}: not reached in {args.seconds:.0f} s")
                    continue
                try:
                    row, said = measure(cases, head["copy_bandwidth"])
                except AssertionError as error:
                    notes.append(f"{cases[0].op} {cases[0].label}: wrong, not timed: {error}")
                    continue
                rows.append(row)
                notes += said
            # What is finished is on disk, should the machine be taken away.
            (args.out / "ops.json").write_text(json.dumps(head | {"rows": rows, "notes": notes}, indent=1))
            (args.out / "ops.md").write_text(markdown(head, rows, notes))
    print(markdown(head, rows, notes))
    if any("wrong, not timed" in note for note in notes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
