"""The halves of a decoder layer of Qwen3-30B-A3B over int4 weights, `decoder_attention_int4_` and
`decoder_experts_int4`, as one op each and as calls of their parts ("eager").

`python benchmarks/ops/bench_decoder.py [--dtype bfloat16]`

Weights are wherever the call before left them: at few tokens the difference is what calling every part costs.
"""

from collections.abc import Iterator, Sequence

import torch

from benchmarks.ops.bench_int4 import GROUP_SIZE, random_packed
from ferrum_ops.ops.rope import rotary_tables
from ferrum_ops.testing.timing import Case, bytes_of, main

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 2048, 32, 4, 128, 768
EXPERTS, TOP_K = 8, 2  # few, so that they stay in the cache
HELD, CAPACITY = 64, 1024
TOKENS = (1, 8)
OPS = torch.ops.ferrum


def attention_case(tokens: int, dtype: torch.dtype) -> Case:
    """A token for each of so many sequences."""
    columns = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    qkv, o = random_packed(columns, HIDDEN), random_packed(HIDDEN, HEADS * HEAD_DIM)
    hidden, ones = torch.randn(tokens, HIDDEN).to(dtype), torch.ones(HIDDEN).to(dtype)
    head = torch.ones(HEAD_DIM).to(dtype)
    tables = rotary_tables(tokens, HEAD_DIM)
    caches = [torch.randn(tokens, KV_HEADS, CAPACITY, HEAD_DIM).to(dtype) for _ in range(2)]
    lens, scale, none = torch.full((tokens,), HELD, dtype=torch.int32), HEAD_DIM**-0.5, (None, None, None)
    arguments = (hidden, ones, 1e-6, *qkv, *none, GROUP_SIZE, head, head, *tables, None, *caches, lens, scale)
    arguments = (*arguments, *o, *none, GROUP_SIZE, HEADS, "int8")

    def parts() -> torch.Tensor:
        normed = OPS.rms_norm(hidden, ones, 1e-6)
        rows = OPS.int4_linear(normed, *qkv, *none, columns, GROUP_SIZE, "int8")
        split = OPS.split_qkv_norm_rope(rows, head, head, *tables, None, HEADS, KV_HEADS, HEAD_DIM, 1e-6)
        q, k, v = (t.view(tokens, 1, -1, HEAD_DIM) for t in split)
        OPS.kv_append_(*caches, k, v, lens)
        attended = OPS.attention(q, *caches, lens + 1, scale).view(tokens, -1)
        return OPS.int4_linear(attended, *o, *none, HIDDEN, GROUP_SIZE, "int8")

    keys = 2 * tokens * KV_HEADS * (HELD + 1) * HEAD_DIM * hidden.element_size()
    moved = bytes_of(*qkv, *o) + keys
    # What attention gives is rounded to int8, where the oracle's last bits may choose another step.
    return Case("decoder_attention_int4_", f"T={tokens} kv={HELD}", arguments, moved, parts, bound=3e-2)


def experts_case(tokens: int, dtype: torch.dtype) -> Case:
    w13, w13_scales = (t.unflatten(0, (EXPERTS, -1)) for t in random_packed(EXPERTS * 2 * WIDTH))
    w2, w2_scales = (t.unflatten(0, (EXPERTS, -1)) for t in random_packed(EXPERTS * HIDDEN, WIDTH))
    experts = (w13, w13_scales, None, None, GROUP_SIZE, w2, w2_scales, None, None, GROUP_SIZE, WIDTH, "int8")
    attended, residual = (torch.randn(tokens, HIDDEN).to(dtype) for _ in range(2))
    ones, router = torch.ones(HIDDEN).to(dtype), torch.randn(EXPERTS, HIDDEN).to(dtype)
    arguments = (attended, residual, ones, 1e-6, router, TOP_K, True, *experts)

    def parts() -> torch.Tensor:
        normed, total = OPS.fused_add_rms_norm(attended, residual, ones, 1e-6)
        _, ids, weights = OPS.router_topk_softmax(normed, router, TOP_K, True)
        return total + OPS.moe_experts_int4(normed, ids, weights, *experts)

    moved = bytes_of(w13, w13_scales, w2, w2_scales, router)
    # The experts' intermediate is rounded to int8, and in 16 bits so is the norm before the router.
    return Case("decoder_experts_int4", f"T={tokens} E={EXPERTS}", arguments, moved, parts, bound=3e-2)


def cases(dtype: torch.dtype = torch.float32, token_counts: Sequence[int] = TOKENS) -> Iterator[Case]:
    for tokens in token_counts:
        yield attention_case(tokens, dtype)
        yield experts_case(tokens, dtype)


if __name__ == "__main__":
    main(cases, __doc__)
