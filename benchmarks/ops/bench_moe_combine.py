"""Weighted sums of expert outputs at Qwen3-30B-A3B's sizes.

`python benchmarks/ops/bench_moe_combine.py [--dtype bfloat16] [--compile]`
"""

import argparse
from collections.abc import Iterator

import torch

from ferrum_ops.testing.timing import Case, bytes_of, run_cases

HIDDEN, TOP_K = 2048, 8
TOKENS = (1, 8, 128, 512)


def cases(dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    for tokens in TOKENS:
        slots = torch.randn(tokens, TOP_K, HIDDEN).to(dtype)
        packed = slots.flatten(0, 1)
        pairs = torch.randperm(tokens * TOP_K).int()
        weights = torch.rand(tokens, TOP_K)
        moved = bytes_of(slots, slots[:, 0], weights)
        label = f"T={tokens} K={TOP_K} H={HIDDEN}"

        def combine(packed=packed, pairs=pairs, weights=weights):
            rows = packed[pairs].unflatten(0, weights.shape)
            return (weights.to(dtype)[:, None] @ rows)[:, 0]

        def weigh(slots=slots, weights=weights):
            return (weights.to(dtype)[:, None] @ slots)[:, 0]

        yield Case("moe_combine", label, (packed, pairs, weights), moved + bytes_of(pairs), combine)
        yield Case("weighted_sum", label, (slots, weights), moved, weigh)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="also time the compiled reference")
    args = parser.parse_args()
    run_cases(cases(getattr(torch, args.dtype)), compile_reference=args.compile)
