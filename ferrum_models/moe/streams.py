"""Lanes: what the launches for single buckets take turns on. On CUDA, streams that fork from the current one and join.

An event of the current stream is what every lane waits for first, and an event of every lane is what the current stream
waits for last: a CUDA graph that is captured on the current stream then captures the lanes with it. Tensors that a lane
allocates must be used up on that lane; what outlives the join is allocated outside and written to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch


class Lanes(Protocol):
    count: int

    def forked(self) -> AbstractContextManager[None]:
        """Lanes may be used inside, and are done with when work that follows it on the current stream starts."""
        ...

    def on(self, index: int) -> AbstractContextManager[Any]:
        """What is launched inside runs on lane `index % count`."""
        ...


class InOrder:
    """One lane: launches follow each other where they are."""

    count = 1

    def forked(self) -> AbstractContextManager[None]:
        return nullcontext()

    def on(self, index: int) -> AbstractContextManager[Any]:
        return nullcontext()


class CudaLanes:
    """Streams of one device. `cuda` is `torch.cuda`, or what stands in for it in a test."""

    def __init__(self, device: torch.device, count: int, cuda: Any = torch.cuda) -> None:
        self.device, self.count, self.cuda = device, count, cuda
        self.streams = [cuda.Stream(device=device) for _ in range(count)]

    @contextmanager
    def forked(self) -> Iterator[None]:
        current = self.cuda.current_stream(self.device)
        fork = self.cuda.Event()
        fork.record(current)
        for stream in self.streams:
            stream.wait_event(fork)
        try:
            yield
        finally:  # a capture that fails must not leave lanes behind
            for stream in self.streams:
                join = self.cuda.Event()
                join.record(stream)
                current.wait_event(join)

    def on(self, index: int) -> AbstractContextManager[Any]:
        return self.cuda.stream(self.streams[index % self.count])


@cache
def lanes_of(device: torch.device, count: int) -> Lanes:
    """The lanes of a device. They hold no data, so that everybody who asks for as many can share them."""
    return CudaLanes(device, count) if device.type == "cuda" and count > 1 else InOrder()
