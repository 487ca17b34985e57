"""The thin ops at Qwen3-30B-A3B's sizes: composites, so what is timed beside ATen's line is their checks and dispatch.

`python benchmarks/ops/bench_elementwise.py [--dtype bfloat16] [--compile]`
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ferrum_ops.testing.timing import Case, bytes_of, main

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2048, 32, 4, 128
VOCABULARY = 20000
TOKENS = (1, 8, 512)
EPS = 1e-6


def cases(dtype: torch.dtype = torch.float32, token_counts: Sequence[int] = TOKENS) -> Iterator[Case]:
    weight, table = torch.randn(HIDDEN).to(dtype), torch.randn(VOCABULARY, HIDDEN).to(dtype)
    perm = torch.randperm(HIDDEN).int()
    for tokens in token_counts:
        x = torch.randn(tokens, HIDDEN).to(dtype)
        # In place and repeated, additions of zero leave what they are added to as it is.
        target, zeros = x.clone(), torch.zeros_like(x)
        qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
        heads = qkv.view(tokens, -1, HEAD_DIM)
        ids = torch.randint(0, VOCABULARY, (tokens,))
        label, moved = f"T={tokens} H={HIDDEN}", 2 * bytes_of(x)

        def norm(x=x):
            return F.layer_norm(x, (HIDDEN,), weight, weight, EPS)

        def split(heads=heads):
            return heads.split((HEADS, KV_HEADS, KV_HEADS), 1)

        yield Case("layer_norm", label, (x, weight, weight, EPS), moved, norm)
        yield Case("gelu", label, (x,), moved, lambda x=x: F.gelu(x))
        yield Case("add_bias_", label, (target, zeros[0]), moved, lambda t=target, z=zeros: t.add_(z[0]))
        yield Case("scaled_add_", label, (target, zeros, 0.5), 3 * bytes_of(x), lambda t=target, z=zeros: t.add_(z))
        yield Case("gather_columns", label, (x, perm), moved, lambda x=x: x[:, perm])
        yield Case("embedding_lookup", label, (table, ids), moved, lambda ids=ids: F.embedding(ids, table))
        yield Case("transpose_head_to_token", label, (heads,), 0, lambda h=heads: h.transpose(0, 1))
        yield Case("transpose_token_to_head", label, (heads,), 0, lambda h=heads: h.transpose(0, 1))
        yield Case("split_qkv", label, (qkv, HEADS, KV_HEADS, HEAD_DIM), 0, split)


if __name__ == "__main__":
    main(cases, __doc__)
