"""The machine's limits, measured by a few lines of C compiled on the spot: floors under every time in the tables."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ferrum_ops.testing.timing import read_bandwidth

#: Says whether a process can have huge pages by asking for them: "always", "madvise" or "never".
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

#: Several times the largest last-level cache in mind.
BUFFER_BYTES = 1 << 30


@dataclass(frozen=True)
class Limits:
    threads: int
    read: float  # bytes per second from memory, on whichever pages it is faster
    int8: float  # 8-bit multiplications and additions per second; 0: no such instruction, or no compiler

    def or_better(self, other: Limits) -> Limits:
        """The higher of two measurements: a disturbance only ever lowers one."""
        return Limits(self.threads, max(self.read, other.read), max(self.int8, other.int8))

    def floor(self, num_bytes: float, operations: float) -> float:
        """Seconds that reading the bytes or multiplying takes at least, whichever is longer."""
        return max(num_bytes / self.read, operations / self.int8 if self.int8 else 0.0)


def huge_pages_offered(setting: Path = HUGE_PAGES) -> bool:
    return setting.exists() and "[never]" not in setting.read_text()


@contextmanager
def compiled() -> Iterator[ctypes.CDLL | None]:
    """The functions of limits.c, or None without a compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        source = Path(__file__).with_name("limits.c")
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        functions = ctypes.CDLL(str(library))
        functions.filled.restype = ctypes.c_void_p
        functions.freed.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        functions.read_bytes_per_second.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        functions.read_bytes_per_second.restype = ctypes.c_double
        functions.int8_ops_per_second.restype = ctypes.c_double
        yield functions


@contextmanager
def reads(functions: ctypes.CDLL, threads: int, num_bytes: int, huge: bool) -> Iterator[Callable[[], float] | None]:
    """What reads a buffer on pages of one kind once and gives the bytes per second; None without such pages."""
    buffer = functions.filled(ctypes.c_size_t(num_bytes), threads, int(huge))
    try:
        yield (lambda: functions.read_bytes_per_second(buffer, num_bytes, threads)) if buffer else None
    finally:
        if buffer:
            functions.freed(buffer, num_bytes)


def read_rates(functions: ctypes.CDLL, threads: int, num_bytes: int = BUFFER_BYTES) -> tuple[float, float]:
    """Bytes per second from ordinary and from huge pages, the most of some turns; 0 where there are none."""
    offered = reads(functions, threads, num_bytes, True) if huge_pages_offered() else nullcontext()
    with reads(functions, threads, num_bytes, False) as ordinary, offered as huge:
        kinds = [read or (lambda: 0.0) for read in (ordinary, huge)]
        turns = [[read() for read in kinds] for _ in range(5)]
    return max(turn[0] for turn in turns), max(turn[1] for turn in turns)


def measure_limits(threads: int) -> Limits:
    return measure_both_pages(threads)[0]


def measure_both_pages(threads: int) -> tuple[Limits, dict[str, float]]:
    """The limits, and bytes per second by the kind of pages; of ordinary ones only without a compiler."""
    with compiled() as functions:
        if functions is None:
            read = read_bandwidth(BUFFER_BYTES)
            return Limits(threads, read, 0.0), {"ordinary": read}
        ordinary, huge = read_rates(functions, threads)
        limits = Limits(threads, max(ordinary, huge), functions.int8_ops_per_second(threads, 5))
        return limits, {"ordinary": ordinary, "huge": huge}


def main() -> None:
    limits, rates = measure_both_pages(torch.get_num_threads())
    of_pages = ", ".join(f"{rate / 1e9:.1f} from {kind} pages" for kind, rate in rates.items())
    print(f"{limits.threads} threads: GB/s read {of_pages}; {limits.int8 / 1e9:.0f} Gop/s int8")


if __name__ == "__main__":
    main()
