"""Memory for packed weights, keys and values: on huge pages where the system has them."""

from __future__ import annotations

import contextlib
import mmap
from math import prod

import torch

#: Of x86-64 and of ARM with pages of 4 KiB.
HUGE_PAGE_BYTES = 2 << 20


def _map(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """Zeros that take no memory until they are touched; None where they fill no huge page or the system has none."""
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    # Room to start on a huge page's boundary. What lies around the tensor is never touched and costs no memory.
    region = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % HUGE_PAGE_BYTES
    with contextlib.suppress(OSError):  # a kernel built without them
        region.madvise(mmap.MADV_HUGEPAGE, start, nbytes)
    return torch.frombuffer(region, dtype=dtype, count=prod(shape), offset=start).view(shape)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty(shape, dtype=dtype)` on the CPU, asking for huge pages where it fills some.

    A decode step reads a thousand times more pages than address translation remembers. Linux takes the wish where
    /sys/kernel/mm/transparent_hugepage/enabled says "madvise" or "always"; elsewhere the pages are ordinary ones.
    """
    mapped = _map(shape, dtype)
    return torch.empty(shape, dtype=dtype) if mapped is None else mapped


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.zeros(shape, dtype=dtype, device=device)`, on the CPU as `empty`."""
    mapped = _map(shape, dtype) if device.type == "cpu" else None
    return torch.zeros(shape, dtype=dtype, device=device) if mapped is None else mapped


def cat(parts: list[torch.Tensor]) -> torch.Tensor:
    """`torch.cat(parts)` into `empty`."""
    out = empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts[0].dtype)
    return torch.cat(parts, out=out)
