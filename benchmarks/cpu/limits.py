"""The machine's limits, measured by a few lines of C compiled on the spot: floors under every time in the tables."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ferrum_ops.testing.timing import read_bandwidth

#: Several times the largest last-level cache in mind.
BUFFER_BYTES = 1 << 30


@dataclass(frozen=True)
class Limits:
    threads: int
    read: float  # bytes per second from memory
    int8: float  # 8-bit multiplications and additions per second; 0: no such instruction, or no compiler

    def or_better(self, other: Limits) -> Limits:
        """The higher of two measurements: a disturbance only ever lowers one."""
        return Limits(self.threads, max(self.read, other.read), max(self.int8, other.int8))

    def floor(self, num_bytes: float, operations: float) -> float:
        """Seconds that reading the bytes or multiplying takes at least, whichever is longer."""
        return max(num_bytes / self.read, operations / self.int8 if self.int8 else 0.0)


def measure_limits(threads: int) -> Limits:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return Limits(threads, read_bandwidth(BUFFER_BYTES), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        source = Path(__file__).with_name("limits.c")
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        functions = ctypes.CDLL(str(library))
        functions.read_bytes_per_second.restype = functions.int8_ops_per_second.restype = ctypes.c_double
        read = functions.read_bytes_per_second(ctypes.c_size_t(BUFFER_BYTES), threads, 5)
        return Limits(threads, read, functions.int8_ops_per_second(threads, 5))


if __name__ == "__main__":
    limits = measure_limits(torch.get_num_threads())
    print(f"{limits.threads} threads: {limits.read / 1e9:.1f} GB/s read, {limits.int8 / 1e9:.0f} Gop/s int8")
