"""Weighted sums of expert outputs at Qwen3-30B-A3B's sizes.

`python benchmarks/ops/bench_moe_combine.py [--dtype bfloat16] [--compile]`
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ferrum_ops.testing.timing import Case, bytes_of, main

HIDDEN, TOP_K = 2048, 8
TOKENS = (1, 8, 128, 512)


def cases(dtype: torch.dtype = torch.float32, token_counts: Sequence[int] = TOKENS) -> Iterator[Case]:
    for tokens in token_counts:
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

        # In place and repeated: sums of zeros leave the residual as it is.
        zeros, residual, norm_weight = torch.zeros_like(slots), slots[:, 0].clone(), torch.randn(HIDDEN).to(dtype)
        out = torch.empty_like(residual)

        def add(zeros=zeros, weights=weights, residual=residual):
            residual += (weights.to(dtype)[:, None] @ zeros)[:, 0]

        def add_norm(add=add, residual=residual, norm_weight=norm_weight):
            add()
            return F.rms_norm(residual, (HIDDEN,), norm_weight, 1e-6)

        yield Case("moe_combine", label, (packed, pairs, weights), moved + bytes_of(pairs), combine)
        yield Case("weighted_sum", label, (slots, weights), moved, weigh)
        updated = moved + bytes_of(residual)
        yield Case("weighted_sum_residual_", label, (residual, zeros, weights), updated, add)
        arguments = (residual, zeros, weights, norm_weight, out, 1e-6)
        yield Case("weighted_sum_residual_norm_", label, arguments, updated + bytes_of(out), add_norm)


if __name__ == "__main__":
    main(cases, __doc__)
