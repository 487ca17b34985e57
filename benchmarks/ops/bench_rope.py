"""Head norm and rotary embedding at Qwen3-30B-A3B's sizes.

`python benchmarks/ops/bench_rope.py [--dtype bfloat16] [--compile]`
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ferrum_ops.ops.rope import rotary_tables
from ferrum_ops.testing.timing import Case, bytes_of, main

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 4, 128, 16
MAX_POSITIONS = 4096
TOKENS = (1, 8, 128, 512)
EPS = 1e-6


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * torch.cat((cos, cos), -1) + rotated * torch.cat((sin, sin), -1)


def cases(dtype: torch.dtype = torch.float32, token_counts: Sequence[int] = TOKENS) -> Iterator[Case]:
    cos, sin = rotary_tables(MAX_POSITIONS, HEAD_DIM)
    weight = torch.randn(HEAD_DIM).to(dtype)
    for tokens in token_counts:
        positions = torch.randint(0, MAX_POSITIONS, (tokens,)).int()
        x = torch.randn(tokens, HEADS, HEAD_DIM).to(dtype)
        qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
        tables = bytes_of(cos[:tokens], sin[:tokens])

        def norm_rotate(x, positions=positions):
            c, s = (table[positions][:, None].to(dtype) for table in (cos, sin))
            return rotate(F.rms_norm(x, (HEAD_DIM,), weight, EPS), c, s)

        def heads(x=x, norm_rotate=norm_rotate):
            return norm_rotate(x)

        def split(qkv=qkv, norm_rotate=norm_rotate):
            q, k, v = qkv.unflatten(1, (-1, HEAD_DIM)).split((HEADS, KV_HEADS, KV_HEADS), 1)
            return norm_rotate(q), norm_rotate(k), v.contiguous()

        label = f"T={tokens} heads={HEADS} D={HEAD_DIM}"
        yield Case("qk_norm_rope", label, (x, weight, cos, sin, positions, EPS, False), 2 * bytes_of(x) + tables, heads)
        yield Case(
            "split_qkv_norm_rope",
            f"T={tokens} heads={HEADS}/{KV_HEADS} D={HEAD_DIM}",
            (qkv, weight, weight, cos, sin, positions, HEADS, KV_HEADS, HEAD_DIM, EPS),
            2 * bytes_of(qkv) + tables,
            split,
        )
        pools = torch.zeros(2, tokens // BLOCK_SIZE + 1, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype).unbind()
        slots = torch.randperm(pools[0].shape[0] * BLOCK_SIZE)[:tokens]

        def split_write(split=split, pools=pools, slots=slots):
            q, *rows = split()
            for pool, new in zip(pools, rows):
                pool.flatten(0, 1)[slots] = new
            return q

        yield Case(
            "split_qkv_norm_rope_paged_",
            f"T={tokens} heads={HEADS}/{KV_HEADS} D={HEAD_DIM}",
            (qkv, weight, weight, cos, sin, positions, HEADS, KV_HEADS, HEAD_DIM, EPS, *pools, slots),
            2 * bytes_of(qkv) + tables,
            split_write,
        )


if __name__ == "__main__":
    main(cases, __doc__)
