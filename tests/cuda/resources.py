"""What ptxas said of every CUDA kernel when the library was built: `python -m tests.cuda.resources` prints the table."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

BUILD = Path(__file__).parents[2] / "build" / "cuda"
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    source: str
    name: str
    arch: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int  # static


def reports() -> dict[str, str]:
    """By the stem of a .cu file, what its last compilation printed; empty for a library built without CUDA."""
    return {path.name.removesuffix(".o.log"): path.read_text() for path in sorted(BUILD.glob("*.o.log"))}


def kernels() -> list[Kernel]:
    found = []
    for source, text in reports().items():
        for match in ENTRY.finditer(text):
            shared = re.search(r"(\d+) bytes smem", match["rest"])
            found.append(
                Kernel(
                    source,
                    match["name"],
                    match["arch"],
                    int(match["registers"]),
                    int(match["stack"]),
                    int(match["stores"]) + int(match["loads"]),
                    int(shared[1]) if shared else 0,
                )
            )
    return found


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces and parameters, where c++filt is installed."""
    if shutil.which("c++filt") is None:
        return names
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = re.sub(r"\(anonymous namespace\)::|ferrum::cuda::|void ", "", lines)
    return [re.sub(r"\(.*\)$", "", line) for line in plain.splitlines()]


def table() -> str:
    """One row per kernel; registers and static shared bytes for each architecture."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    every = kernels()
    for kernel, name in zip(every, readable([k.name for k in every])):
        cell = f"{kernel.registers} / {kernel.shared_bytes}"
        rows.setdefault((kernel.source, name), {})[kernel.arch] = cell
    archs = sorted({k.arch for k in every}, key=lambda a: int(re.sub(r"\D", "", a)))
    lines = [f"| file | kernel | {' | '.join(archs)} |", "|---|---|" + "--:|" * len(archs)]
    for (source, name), cells in rows.items():
        lines.append(f"| {source} | `{name}` | {' | '.join(cells.get(a, '') for a in archs)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("Registers / static shared bytes, by ptxas.\n")
    print(table())
