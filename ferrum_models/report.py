"""What loading a model did: time, bytes, layouts, peak memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


def peak_resident_bytes() -> int:
    """The most memory this process has held since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def traced(path: str, build: Callable[[], dict[str, torch.Tensor]]) -> Callable[[], dict[str, torch.Tensor]]:
    """`build`, with a line to stderr when it has packed the module `path`."""

    def build_and_tell() -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        tensors = build()
        nbytes = sum(t.nbytes for t in tensors.values())
        milliseconds = 1e3 * (time.perf_counter() - start)
        # In one piece: transformers builds modules in several threads, beside the one of its progress bar.
        sys.stderr.write(f"[load] {path}: {nbytes:,} bytes in {milliseconds:.1f} ms\n")
        return tensors

    return build_and_tell


@dataclass
class ModuleReport:
    """One replaced module: its layout, its bytes, and what it would take dense in the activation dtype."""

    name: str
    layout: str
    nbytes: int
    dense_nbytes: int


@dataclass
class LoadReport:
    """Printed by the demo; `modules` lists every module that holds packed or dequantised weights."""

    modules: list[ModuleReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    model_nbytes: int = 0
    peak_nbytes: int = 0  # resident memory of the process at its highest while loading
    baseline_nbytes: int = 0  # resident memory before loading

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the whole model if nothing were packed."""
        return self.model_nbytes + sum(m.dense_nbytes - m.nbytes for m in self.modules)

    def layouts(self) -> str:
        """One line per layout: how many modules, how many bytes."""
        counts = Counter(m.layout for m in self.modules)
        lines = []
        for layout in sorted(counts):
            mine = [m for m in self.modules if m.layout == layout]
            packed, dense = sum(m.nbytes for m in mine), sum(m.dense_nbytes for m in mine)
            lines.append(f"{layout}: {counts[layout]} modules, {packed:,} bytes (dense {dense:,})")
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"loaded in {self.seconds:.2f} s, {self.model_nbytes:,} bytes (dense {self.dense_nbytes:,}), "
                f"peak resident {self.peak_nbytes:,} bytes",
                self.layouts(),
                *self.warnings,
            ]
        )


class PeakMemory:
    """The highest resident memory between entering and leaving the block, bytes.

    On Linux the kernel's high-water mark is reset first; elsewhere it is the process's peak so far. Never below the
    baseline, which is read after that reset.
    """

    baseline = 0
    peak = 0

    def __enter__(self) -> PeakMemory:
        if sys.platform == "linux":
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as clear:
                clear.write("5")  # reset VmHWM (proc(5))
            self.baseline = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        highest = _status_bytes("VmHWM") if sys.platform == "linux" else peak_resident_bytes()
        self.peak = max(highest, self.baseline)


def _status_bytes(field_name: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field_name + ":"):
                return int(line.split()[1]) * 1024
    return 0
