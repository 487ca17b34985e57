"""GGUF blocks at Qwen3-30B-A3B's widths: dequantisation.

`python benchmarks/ops/bench_gguf.py [--dtype bfloat16]`

Operands are warm.
"""

from collections.abc import Iterator

import torch

from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats.gguf import GGMLType
from ferrum_ops.testing.timing import Case, bytes_of, main

HIDDEN = 2048
EXPERT_WIDTH = 768


def cases(dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    for type in GGMLType:
        blocks = formats.random_blocks(type, EXPERT_WIDTH, HIDDEN)
        moved = bytes_of(blocks) + EXPERT_WIDTH * HIDDEN * dtype.itemsize
        yield Case("gguf_dequantize", f"{type.name} {EXPERT_WIDTH}x{HIDDEN}", (blocks, int(type), dtype), moved)


if __name__ == "__main__":
    main(cases, __doc__)
