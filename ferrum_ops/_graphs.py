"""Capturing a CUDA graph so that a capture that fails leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Graphs of broken captures: torch's allocator of pinned memory goes on asking them which streams are theirs.
_broken: list[torch.cuda.CUDAGraph] = []


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """`torch.cuda.graph(graph, pool)` that also leaves the capture when it breaks.

    torch then stays on the stream of the capture, its allocator gives no memory back to the driver any more, and the
    generator's next number may raise. Raises the error that broke the capture: ending it raises another, which says
    less.
    """
    current = torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    first: Exception | None = None
    try:
        with torch.cuda.graph(graph, pool=pool):
            try:
                yield
            except Exception as error:
                first = error
                raise
    except Exception as error:
        torch.cuda.set_stream(current)
        torch.cuda.synchronize()
        _leave(graph, pool)
        raise (error if first is None else first) from None
    finally:
        first = None  # its traceback holds this frame


def _leave(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # the capture came to its end all the same
        return
    torch._C._cuda_releasePool(device, pool)
    _broken.append(graph)
    # The end of a capture that succeeds is what takes the generator out of capturing.
    something = torch.zeros(1, device=device)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        something.zero_()
