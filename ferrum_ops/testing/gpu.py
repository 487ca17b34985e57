"""Timers for an NVIDIA GPU, and its limits measured in the same run.

What is timed is a CUDA graph of several calls, each on operands of its own where that is needed to find them outside
the L2 cache; figures are medians over replays, taken in turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ferrum_ops._graphs import recording
from ferrum_ops._library import _c
from ferrum_ops.testing.timing import Timing, timing_of

DEVICE = "cuda"
#: Calls in one graph, and the least seconds one sample lasts: well above the resolution of an event.
CALLS, SAMPLE_SECONDS = 12, 5e-4


def describe() -> dict[str, Any]:
    """The GPU and the software, for the head of a result."""
    properties = torch.cuda.get_device_properties()
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def has_wgmma() -> bool:
    """Whether this device is of the one kind that has it."""
    return torch.cuda.get_device_capability() == (9, 0)


@contextmanager
def wgmma() -> Iterator[None]:
    """Inside a `with` block `marlin_gemm` and `marlin_moe_gemm` use Hopper's wgmma for all that would have tiles of 64
    tokens (process-wide; for tests and benchmarks). Their calls raise RuntimeError on a device without it.

    Raises RuntimeError where the library was built without CUDA.
    """
    if not hasattr(_c, "ferrum_marlin_wgmma"):
        raise RuntimeError("[wgmma] library: expected one built with CUDA, got one without")
    _c.ferrum_marlin_wgmma(1)
    try:
        yield
    finally:
        _c.ferrum_marlin_wgmma(0)


def copies_outside_cache(num_bytes: int, limit: int = CALLS) -> int:
    """How many sets of operands of `num_bytes` together are twice the L2 cache; at most `limit`."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return max(1, min(limit, math.ceil(2 * cache / max(num_bytes, 1))))


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of the calls, after a warm-up of each on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with recording(graph):
        for call in calls:
            call()
    return graph


def compare(functions: Mapping[str, Sequence[Callable[[], Any]]], *, repeats: int = 20) -> dict[str, Timing]:
    """Seconds per call of every candidate, taking turns.

    Args:
        functions: by name, one callable for each set of operands; a graph holds `CALLS` calls of them in rotation.
        repeats: samples of each.
    """
    graphs = {name: capture([calls[i % len(calls)] for i in range(CALLS)]) for name, calls in functions.items()}
    replays = {name: max(1, math.ceil(SAMPLE_SECONDS / _seconds(graph, 3))) for name, graph in graphs.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, graph in graphs.items():
            samples[name].append(_seconds(graph, replays[name]) / CALLS)
    return {name: timing_of(values) for name, values in samples.items()}


def _seconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()  # the clock is up and the queue is not empty when the first event is reached
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / replays


def copy_bandwidth(num_bytes: int = 1 << 30) -> float:
    """Bytes per second of a copy on the device, counting those read and those written."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE).zero_()
    target = torch.empty_like(source)
    return 2 * num_bytes / compare({"": [lambda: target.copy_(source)]}, repeats=9)[""].median


def matrix_rate(dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """Operations per second of a square product of random matrices."""
    a, b = torch.randn(2, size, size, device=DEVICE).to(dtype).unbind()
    return 2 * size**3 / compare({"": [lambda: a @ b]}, repeats=5)[""].median
