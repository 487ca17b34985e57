"""Products with GGUF blocks at Qwen3-30B-A3B's widths, and dequantisation.

`python benchmarks/ops/bench_gguf.py [--dtype bfloat16]`

The head-sized matrix does not fit a last-level cache: its GB/s are the memory's. The other operands are warm.
"""

from collections.abc import Iterator, Sequence

import torch

import ferrum_ops
from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats.gguf import GGMLType
from ferrum_ops.formats.gguf_tiles import TILED
from ferrum_ops.ops.gguf import random_stack
from ferrum_ops.testing.timing import Case, bytes_of, main

HIDDEN = 2048
EXPERT_WIDTH = 768
ATTENTION_WIDTH = 4096 + 2 * 512
HEAD_WIDTH = 65536
EXPERTS, TOP_K = 8, 8
TOKENS = (1, 2, 4, 8, 16, 64, 512)
TYPES = (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.Q4_0)


def linear_case(type: GGMLType, blocks: torch.Tensor, tokens: int, dtype: torch.dtype, activation: str) -> Case:
    x = torch.randn(tokens, HIDDEN).to(dtype)
    moved = bytes_of(x, blocks) + tokens * blocks.shape[0] * dtype.itemsize
    label = f"{type.name} T={tokens} N={blocks.shape[0]} {activation}"
    return Case("gguf_linear", label, (x, [blocks], [int(type)], None, activation), moved)


def tile_cases(type: GGMLType, blocks: torch.Tensor, dtype: torch.dtype, token_counts: Sequence[int]) -> Iterator[Case]:
    tiles = ferrum_ops.gguf_pack(blocks, type)
    yield Case("gguf_pack", f"{type.name} {blocks.shape[0]}x{HIDDEN}", (blocks, int(type)), bytes_of(blocks, tiles))
    for tokens in token_counts:
        x = torch.randn(tokens, HIDDEN).to(dtype)
        moved = bytes_of(x, tiles) + tokens * blocks.shape[0] * dtype.itemsize
        label = f"{type.name} tiles T={tokens} N={blocks.shape[0]} int8"
        yield Case("gguf_linear", label, (x, [tiles], [type + TILED], None, "int8"), moved)


def expert_cases(type: GGMLType, dtype: torch.dtype) -> Iterator[Case]:
    """Every expert of a few in use: operands warm."""
    gate, up = (random_stack(type, EXPERTS, EXPERT_WIDTH, HIDDEN, seed) for seed in (0, 1))
    down = random_stack(type, EXPERTS, HIDDEN, EXPERT_WIDTH, 2)
    for tokens in (1, 64):
        hidden = torch.randn(tokens, HIDDEN).to(dtype)
        ids = torch.arange(TOP_K, dtype=torch.int32).repeat(tokens, 1)
        label = f"{type.name} T={tokens} E={EXPERTS}"
        arguments = (hidden, gate, int(type), ids, "int8")
        yield Case("gguf_moe_linear", label, arguments, bytes_of(gate))
        arguments = (hidden, ids, torch.rand(tokens, TOP_K), gate, up, down, [int(type)] * 3, "int8")
        # Of the thousands of int8 codes between the products, the few that lie on a rounding boundary may fall to the
        # other side of the float64 reference's; each moves its row by about 3e-4.
        bound = 3e-3 if dtype == torch.float32 else None
        yield Case("moe_experts_gguf", label, arguments, bytes_of(gate, up, down), bound=bound)


def cases(
    dtype: torch.dtype = torch.float32,
    types: Sequence[GGMLType] = TYPES,
    token_counts: Sequence[int] = TOKENS,
) -> Iterator[Case]:
    for type in types:
        blocks = formats.random_blocks(type, ATTENTION_WIDTH, HIDDEN)
        for tokens in token_counts:
            yield linear_case(type, blocks, tokens, dtype, "int8")
        yield linear_case(type, blocks, 1, dtype, "full")
        yield from tile_cases(type, blocks, dtype, token_counts)
        yield linear_case(type, formats.random_blocks(type, HEAD_WIDTH, HIDDEN), 1, dtype, "int8")
        yield from expert_cases(type, dtype)
    for type in GGMLType if types == TYPES else types:
        blocks = formats.random_blocks(type, EXPERT_WIDTH, HIDDEN)
        moved = bytes_of(blocks) + EXPERT_WIDTH * HIDDEN * dtype.itemsize
        yield Case("gguf_dequantize", f"{type.name} {EXPERT_WIDTH}x{HIDDEN}", (blocks, int(type), dtype), moved)


if __name__ == "__main__":
    main(cases, __doc__)
