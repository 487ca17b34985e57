"""Timers for CPU code, the bandwidth to hold them against, and the one table all op benchmarks print.

Runs alternate between the candidates, so that a disturbance of the machine meets all of them, and medians come with
quartiles, so that it is seen.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

import ferrum_ops
from ferrum_ops.testing.compare import assert_close, tolerance

#: Larger than the last-level cache of the machines in mind: reading it leaves nothing else cached.
EVICTION_BYTES = 256 << 20

#: One sample repeats a short function until it lasts this long, well above the clock's resolution.
SAMPLE_SECONDS = 2e-4

#: A function that takes longer is warm after one call.
SLOW_SECONDS = 0.1


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles over the samples."""

    median: float
    lower: float
    upper: float


def _sample(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _calls_per_sample(function: Callable[[], Any], warmup: int) -> int:
    """Calls it `warmup` times, or once if it is slow, and then to see how long it takes."""
    for _ in range(warmup):
        if _sample(function, 1) > SLOW_SECONDS:
            return 1
    return max(1, int(SAMPLE_SECONDS / max(min(_sample(function, 1) for _ in range(3)), 1e-9)))


def compare(
    functions: dict[str, Callable[[], Any]],
    *,
    repeats: int = 30,
    warmup: int = 3,
    cold: bool = False,
    calls: dict[str, int] | None = None,
) -> dict[str, Timing]:
    """Time every function, taking turns.

    Args:
        functions: by name; called without arguments.
        repeats: samples of each. A sample is one call, or as many as fill `SAMPLE_SECONDS`.
        warmup: calls of each before the first sample.
        cold: evict the caches before every sample, which is then a single call. Otherwise operands are wherever the
            calls before left them.
        calls: by name, of a sample, instead of those that fill `SAMPLE_SECONDS`.
    """
    calls = {name: _calls_per_sample(function, warmup) for name, function in functions.items()} | (calls or {})
    eviction = torch.zeros(EVICTION_BYTES // 4) if cold else None
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if eviction is not None:
                eviction.sum()
            samples[name].append(_sample(function, 1 if cold else calls[name]))
    return {name: timing_of(values) for name, values in samples.items()}


def timing_of(samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0])
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, lower, upper)


def median_seconds(function: Callable[[], Any], *, repeats: int = 30, warmup: int = 3, cold: bool = False) -> float:
    """Median seconds of one call; arguments as in `compare`."""
    return compare({"": function}, repeats=repeats, warmup=warmup, cold=cold)[""].median


def read_bandwidth(num_bytes: int = EVICTION_BYTES, *, repeats: int = 7) -> float:
    """Bytes per second that a sum over `num_bytes` of memory reads with the current number of threads.

    With more bytes than the last-level cache holds it is the memory's bandwidth.
    """
    buffer = torch.zeros(num_bytes // 4)
    return num_bytes / median_seconds(buffer.sum, repeats=repeats, warmup=1)


@dataclass(frozen=True)
class Case:
    """One line of an op's benchmark."""

    op: str  # name in `ferrum_ops.OPS`
    label: str  # the sizes
    arguments: tuple[Any, ...]
    num_bytes: int  # read and written once: the least that any implementation moves
    eager: Callable[[], Any] | None = None  # what one would write in plain torch
    formula: Callable[[], Any] | None = None  # what inductor compiles, where that is not the op's reference
    bound: float | None = None  # relative error allowed instead of the tolerance table's, with a reason beside it
    others: tuple[tuple[Any, ...], ...] = ()  # more arguments, with which calls take turns: more than a cache holds


def torch_op(name: str) -> Callable[..., Any]:
    """The overload `torch.ops.ferrum.<name>`; "silu_mul.gate_up" names its overload."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.ferrum, packet), overload or "default")


def check_case(case: Case) -> None:
    """Raise AssertionError when the op differs from its reference in float64 on the case's arguments."""

    def copy(a: Any, dtype: torch.dtype | None = None) -> Any:
        if not isinstance(a, torch.Tensor):
            return a
        return a.to(dtype) if dtype is not None and a.is_floating_point() else a.clone()

    def tensors(result: Any, arguments: list[Any]) -> list[torch.Tensor]:
        if result is None:
            schema = torch_op(case.op)._schema.arguments  # type: ignore[attr-defined]
            return [a for a, s in zip(arguments, schema) if s.alias_info is not None and s.alias_info.is_write]
        return [result] if isinstance(result, torch.Tensor) else list(result)

    floating = [a.dtype for a in case.arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]
    bound = tolerance(case.op, floating[0] if floating else torch.float32) if case.bound is None else case.bound
    own, oracle = [copy(a) for a in case.arguments], [copy(a, torch.float64) for a in case.arguments]
    got = tensors(torch_op(case.op)(*own), own)
    expected = tensors(ferrum_ops.OPS[case.op].ref(*oracle), oracle)
    for g, e in zip(got, expected):
        assert_close(case.op, g, e, bound)


def run_cases(cases: Iterable[Case], *, compile_reference: bool = False, repeats: int = 30) -> list[dict[str, Any]]:
    """Check and time the cases, print a table, return its rows.

    Columns: microseconds per call (quartiles in brackets), GB/s, fraction of the measured read bandwidth of memory
    (see `_time_case`; above 1 where the operands stay in cache), and how many times longer plain torch and, with
    `compile_reference`, inductor's code take, and what that was compiled from: see `_compiled`. A case whose check
    fails is not timed: the failure is raised.
    """
    bandwidth = read_bandwidth()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU level {ferrum_ops.cpu_isa()}, "
        f"memory reads at {bandwidth / 1e9:.1f} GB/s; operands warm"
    )
    header = f"{'op':<28}{'sizes':<26}{'us':>9}{'quartiles':>20}{'GB/s':>8}{'of read':>9}{'eager/op':>10}"
    print(header + (f"{'compiled/op':>13} compiled from" if compile_reference else ""))
    rows = []
    for case in cases:
        check_case(case)
        row = _time_case(case, bandwidth, compile_reference, repeats)
        rows.append(row)
        quartiles = f"[{row['us_lower']:.1f}, {row['us_upper']:.1f}]"
        line = f"{case.op:<28}{case.label:<26}{row['us']:>9.1f}{quartiles:>20}{row['gb_per_s']:>8.1f}"
        line += f"{row['of_read_bandwidth']:>9.2f}"
        for peer, width in (("eager", 10), ("compiled", 13)):
            if peer in row:
                line += f"{row[peer]:>{width}.2f}"
            elif peer == "eager" or compile_reference:
                line += f"{'-':>{width}}"
        print(f"{line} {row.get('compiled_from', '')}".rstrip(), flush=True)
    return rows


def _time_case(case: Case, bandwidth: float, compile_reference: bool, repeats: int) -> dict[str, Any]:
    """Where more arguments than a cache holds take turns, so does reading memory, as the bandwidth of a shared machine
    changes by the second. Elsewhere that would evict the operands: the fraction is of the run's `bandwidth`."""
    op = torch_op(case.op)
    turns = itertools.cycle((case.arguments, *case.others))
    functions: dict[str, Callable[[], Any]] = {"op": lambda: op(*next(turns))}
    # All of them in a sample: one call alone would also bring the code back into the caches.
    calls = {"op": 1 + len(case.others), "read": 1} if case.others else None
    if case.others:
        functions["read"] = torch.zeros(EVICTION_BYTES // 4).sum
    if case.eager is not None:
        functions["eager"] = case.eager
    compiled_from = {}
    with torch.no_grad():
        if compile_reference and (found := _compiled(case)) is not None:
            functions["compiled"], compiled_from = found[0], {"compiled_from": found[1]}
        timings = compare(functions, repeats=repeats, calls=calls)
    own = timings["op"]
    if "read" in timings:
        bandwidth = EVICTION_BYTES / timings.pop("read").median
    row: dict[str, Any] = {
        "op": case.op,
        "sizes": case.label,
        "us": own.median * 1e6,
        "us_lower": own.lower * 1e6,
        "us_upper": own.upper * 1e6,
        "gb_per_s": case.num_bytes / own.median / 1e9,
        "of_read_bandwidth": case.num_bytes / own.median / bandwidth,
    }
    row.update({peer: t.median / own.median for peer, t in timings.items() if peer != "op"})
    return row | compiled_from


def _compiled(case: Case) -> tuple[Callable[[], Any], str] | None:
    """Inductor's code for the op's formula, and what it was compiled from.

    The case's own formula; without one, the reference in one graph; where that checks values on the host or inductor
    fails, plain torch in one graph; failing that too, the reference in several.
    """
    reference = ferrum_ops.OPS[case.op].ref
    forms: list[tuple[Callable[[], Any] | None, str, bool]] = [
        (case.formula, "formula", True),
        (lambda: reference(*case.arguments), "reference", True),
        (case.eager, "plain torch", True),
        (lambda: reference(*case.arguments), "reference, in parts", False),
    ]
    for formula, name, whole in forms:
        if formula is None:
            continue
        torch._dynamo.reset()
        compiled = torch.compile(formula, dynamic=False, fullgraph=whole)
        try:
            compiled()
            return compiled, name
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            if isinstance(error, torch._inductor.exc.InductorError):
                print(f"{case.op} {case.label}: inductor fails on {name}: {str(error).splitlines()[0]}")
    return None


def main(cases: Callable[[torch.dtype], Iterable[Case]], description: str | None) -> None:
    """The command line of an op's benchmark: `[--dtype float16] [--compile]`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = inspect.signature(cases).parameters["dtype"].default
    names = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtype", default=str(default).removeprefix("torch."), choices=names)
    parser.add_argument("--compile", action="store_true", help="also time inductor's code for the same formula")
    args = parser.parse_args()
    run_cases(cases(getattr(torch, args.dtype)), compile_reference=args.compile)


def bytes_of(*tensors: torch.Tensor) -> int:
    """Bytes of the elements of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)
