"""The table of ops by device, as Markdown.

python -m ferrum_ops.table                    # print it
python -m ferrum_ops.table --write README.md  # between <!-- ops:begin --> and <!-- ops:end -->
python -m ferrum_ops.table --check README.md  # exit status 1 when the file has another table
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ferrum_ops import OPS, backends, triton

BEGIN, END = "<!-- ops:begin -->", "<!-- ops:end -->"
DEVICES = ("cpu", "cuda", "mps")


def table(cuda_kernels: frozenset[str] = frozenset()) -> str:
    """One row per op, ordered by family and name; what `ferrum_ops.backends()` says of each device.

    `cuda_kernels` are ops that a build with CUDA has kernels of, for a table that does not depend on this build.
    """
    served_by = backends()
    rows = [("family", "op", *DEVICES), ("---",) * (2 + len(DEVICES))]
    for name, op in sorted(OPS.items(), key=lambda item: (item[1].family, item[0])):
        served = served_by[name] | ({"cuda": "kernel"} if name in cuda_kernels else {})
        rows.append((op.family, f"`{name}`", *(served[device] for device in DEVICES)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cuda_kernels_of(sources: Path) -> frozenset[str]:
    """The ops that the .cu files of a folder register."""
    files = sorted(sources.glob("*.cu"))
    return frozenset(name for file in files for name in re.findall(r'm\.impl\(\s*"([\w.]+)"', file.read_text("utf-8")))


def with_table(text: str, file: str) -> str:
    """`text` with the table between its markers replaced; ValueError when the markers are not there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"[table] {file}: expected {BEGIN} and then {END}, once each")
    before, rest = text.split(BEGIN)
    kernels = cuda_kernels_of(Path(file).parent / "csrc" / "cuda") | triton.KERNELS.keys()
    return f"{before}{BEGIN}\n{table(kernels)}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ferrum_ops.table", description="The table of ops by device.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", metavar="FILE", help="replace the table in FILE")
    action.add_argument("--check", metavar="FILE", help="fail when FILE has another table")
    options = parser.parse_args(arguments)
    file = options.write or options.check
    if file is None:
        print(table())
        return 0
    text = Path(file).read_text(encoding="utf-8")
    try:
        expected = with_table(text, file)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if options.write and expected != text:
        Path(file).write_text(expected, encoding="utf-8")
    if options.check and expected != text:
        print(f"[table] {file} is out of step: run `make table`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
