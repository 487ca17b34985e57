"""The machine's limits, measured by a few lines of C compiled on the spot: floors under every time in the tables."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
        functions.int8_ops_per_second.restype = ctypes.c_double
        yield functions


def read_rates(functions: ctypes.CDLL, threads: int, num_bytes: int = BUFFER_BYTES) -> tuple[float, float]:
    """Bytes per second from ordinary and from huge pages, measured in turns; 0 for huge ones that the system lacks."""
    rates = (ctypes.c_double * 2)()
    functions.read_bytes_per_second(ctypes.c_size_t(num_bytes), threads, 5, int(huge_pages_offered()), rates)
    return rates[0], rates[1]


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
