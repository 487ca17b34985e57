"""Routing and the orders of pairs at Qwen3-30B-A3B's sizes: 128 experts, top 8, uniform routing.

`python benchmarks/ops/bench_moe_routing.py [--dtype bfloat16] [--compile]`
"""

from collections.abc import Iterator, Sequence

import torch

from ferrum_ops.ops.moe_routing import align_capacity
from ferrum_ops.testing.timing import Case, bytes_of, main

HIDDEN, EXPERTS, TOP_K = 2048, 128, 8
BLOCK_SIZE = 16
OUT_FEATURES = (1536, 2048)
TOKENS = (1, 8, 128, 512)


def cases(dtype: torch.dtype = torch.float32, token_counts: Sequence[int] = TOKENS) -> Iterator[Case]:
    for tokens in token_counts:
        logits = torch.randn(tokens, EXPERTS).to(dtype)
        ids = logits.float().topk(TOP_K, -1).indices.int()
        pairs = ids.numel()
        # Integers, whose logits every dtype holds: rounding decides no choice of experts.
        x, weight = (torch.randint(-1, 2, (rows, HIDDEN)).to(dtype) for rows in (tokens, EXPERTS))
        label = f"T={tokens} E={EXPERTS} K={TOP_K}"

        def route(logits=logits):
            weights, selected = logits.softmax(-1, dtype=torch.float32).topk(TOP_K, -1)
            return selected.int(), weights / weights.sum(-1, keepdim=True)

        def router(x=x, weight=weight, route=route):
            logits = torch.nn.functional.linear(x, weight)
            return logits, *route(logits)

        def build(ids=ids):
            flat = ids.flatten()
            order = flat.argsort(stable=True)
            offsets = torch.bincount(flat, minlength=EXPERTS).cumsum(0)
            return order.argsort().int(), (order // TOP_K).int(), offsets.int()

        yield Case("route_topk_softmax", label, (logits, TOP_K, True), bytes_of(logits) + 8 * pairs, route)
        yield Case(
            "router_topk_softmax",
            f"{label} H={HIDDEN}",
            (x, weight, TOP_K, True),
            bytes_of(x, weight, logits) + 8 * pairs,
            router,
        )
        yield Case(
            "route_topk_align",
            label,
            (logits, TOP_K, True, BLOCK_SIZE),
            bytes_of(logits)
            + 4 * (2 * pairs + align_capacity(pairs, EXPERTS, BLOCK_SIZE) * (BLOCK_SIZE + 1) // BLOCK_SIZE),
        )
        yield Case("moe_build_pairs_by_token", label, (ids, EXPERTS), 4 * (3 * pairs + EXPERTS + 1), build)
        yield Case("moe_compute_ids_tpe", label, (ids, EXPERTS, OUT_FEATURES), 4 * (pairs * (1 + EXPERTS) + EXPERTS))
        yield Case(
            "moe_align_block_size",
            label,
            (ids, EXPERTS, BLOCK_SIZE, True, None),
            4 * (pairs + align_capacity(pairs, EXPERTS, BLOCK_SIZE) * (BLOCK_SIZE + 1) // BLOCK_SIZE),
        )


if __name__ == "__main__":
    main(cases, __doc__)
