"""Cache writes at Qwen3-30B-A3B's sizes. `python benchmarks/ops/bench_kv_cache.py [--dtype float16] [--compile]`"""

from collections.abc import Iterator, Sequence

import torch

from ferrum_ops.ops.kv_cache import quantize_heads
from ferrum_ops.testing.timing import Case, bytes_of, main

KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 128, 16
CAPACITY = 1024
TOKENS = (1, 8, 128, 512)


def cases(dtype: torch.dtype = torch.bfloat16, token_counts: Sequence[int] = TOKENS) -> Iterator[Case]:
    for tokens in token_counts:
        k, v = torch.randn(2, tokens, KV_HEADS, HEAD_DIM).to(dtype).unbind()
        label = f"T={tokens} heads={KV_HEADS} D={HEAD_DIM}"

        capacity = max(CAPACITY, 2 * tokens)
        caches = torch.zeros(2, 1, KV_HEADS, capacity, HEAD_DIM, dtype=dtype).unbind()
        lens = torch.tensor([100], dtype=torch.int32)

        def append(k=k, v=v, caches=caches, tokens=tokens):
            for cache, new in zip(caches, (k, v)):
                cache[:, :, 100 : 100 + tokens] = new.transpose(0, 1)

        yield Case("kv_append_", label, (*caches, k[None], v[None], lens), 2 * bytes_of(k, v), append)

        pools = torch.zeros(2, capacity // BLOCK_SIZE, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype).unbind()
        slots = torch.randperm(capacity)[:tokens]

        def write(k=k, v=v, pools=pools, slots=slots):
            for pool, new in zip(pools, (k, v)):
                pool.flatten(0, 1)[slots] = new

        yield Case("paged_kv_write_", label, (*pools, k, v, slots), 2 * bytes_of(k, v), write)

        codes = torch.zeros(2, *pools[0].shape, dtype=torch.int8).unbind()
        scales = torch.zeros(2, *pools[0].shape[:3]).unbind()

        def write_int8(k=k, v=v, codes=codes, scales=scales, slots=slots):
            for pool, scale, new in zip(codes, scales, (k, v)):
                pool.flatten(0, 1)[slots], scale.flatten(0, 1)[slots] = quantize_heads(new)

        moved = bytes_of(k, v) + 2 * tokens * KV_HEADS * (HEAD_DIM + 4)
        yield Case("paged_kv_write_int8_", label, (*codes, *scales, k, v, slots), moved, write_int8)


if __name__ == "__main__":
    main(cases, __doc__)
