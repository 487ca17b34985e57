"""Attention at Qwen3-30B-A3B's sizes.

`python benchmarks/ops/bench_attention.py [--dtype float32] [--only decode] [--compile]`

Long decodes take turns with keys and values of their own, as the layers of a model do, together more than the
last-level cache holds: their bandwidth is that of the memory. Prefills are bounded by arithmetic instead.

"huge": caches on huge pages, where the system has them, which is how ferrum_models allocates long ones; ordinary pages
cost a walk of the page tables every 4 KiB, also where the bandwidth is measured. Plain torch is
scaled_dot_product_attention, over the contiguous cache also where the op reads pages. --compile times, up to 512 query
tokens, inductor's code for the formula written out, with the pages gathered first: the reference looks at lengths on
the host, and scaled_dot_product_attention would be ATen's code again.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ferrum_models import huge_pages
from ferrum_ops.ops.attention import block_tables_for
from ferrum_ops.ops.kv_cache import quantize_heads
from ferrum_ops.testing.timing import EVICTION_BYTES, Case, bytes_of, run_cases

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 4, 128, 16
SCALE = HEAD_DIM**-0.5
DECODES = ((1, 128), (1, 1024), (1, 4096), (8, 4096))  # sequences, keys
CHUNKS = ((8, 1024),)  # queries, keys
PREFILLS = (512, 1024, 2048, 4096)
GPU_DECODES, GPU_KEYS = (1, 8, 32), (4096, 32768)


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The formula for q `[B, n, Hq, D]` over k, v `[B, Hkv, kv, D]`, softmax in float32."""
    batch, tokens, heads, head_dim = q.shape
    grouped = q.view(batch, tokens, k.shape[1], -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (grouped @ k.transpose(-1, -2)).float() * SCALE
    if mask is not None:
        scores = scores.unflatten(2, (-1, tokens)).masked_fill(~mask, -torch.inf).flatten(2, 3)
    out = scores.softmax(-1).to(q.dtype) @ v
    return out.unflatten(2, (-1, tokens)).permute(0, 3, 1, 2, 4).reshape(batch, tokens, heads, head_dim)


def plain_paged_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    tables: torch.Tensor,
    mask: torch.Tensor | None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same over pages that are all full, each sequence as long as the others."""

    def gather(pool: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        pages = pool[tables] if scale is None else (pool[tables] * scale[tables][..., None]).to(q.dtype)
        return pages.flatten(1, 2).transpose(1, 2)

    return plain_attention(q, gather(k_pool, k_scale), gather(v_pool, v_scale), mask)


def cases(
    dtype: torch.dtype = torch.bfloat16, only: str = "", prefill_sizes: tuple[int, ...] = PREFILLS
) -> Iterator[Case]:
    sizes = {
        "decode": [(batch, 1, keys) for batch, keys in DECODES],
        "chunk": [(1, tokens, keys) for tokens, keys in CHUNKS],
        "prefill": [(1, tokens, tokens) for tokens in prefill_sizes],
    }
    yield from sized_cases(dtype, itertools.chain.from_iterable([sizes[only]] if only else sizes.values()))


def cases_on_gpu(dtype: torch.dtype, tokens: tuple[int, ...]) -> Iterator[Case]:
    """A decode of so many sequences at each of GPU_KEYS, or for what is not in GPU_DECODES a prefill."""
    for n in tokens:
        yield from sized_cases(dtype, [(n, 1, keys) for keys in GPU_KEYS] if n in GPU_DECODES else [(1, n, n)])


def sized_cases(dtype: torch.dtype, sizes: Iterable[tuple[int, int, int]]) -> Iterator[Case]:
    """Of these numbers of sequences, query tokens and keys of each."""
    for batch, tokens, keys in sizes:
        q = torch.randn(batch, tokens, HEADS, HEAD_DIM).to(dtype)
        k, v = torch.randn(2, batch, KV_HEADS, keys, HEAD_DIM).to(dtype).unbind()
        lens = torch.full((batch,), keys, dtype=torch.int32)
        moved = bytes_of(q, q, k, v)
        label = f"B={batch} n={tokens} kv={keys}"

        # is_causal would align a chunk with the first keys.
        mask = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens) if tokens > 1 else None

        def sdpa(q=q, k=k, v=v, mask=mask if tokens < keys else None, causal=1 < tokens == keys):
            q = q.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)

        # Sets of caches that calls take turns with.
        sets = -(-EVICTION_BYTES // moved) if tokens == 1 and keys >= 4096 and q.device.type == "cpu" else 1
        formula = partial(plain_attention, q, k, v, mask)
        arguments = (q, k, v, lens, SCALE)
        yield Case("attention", label, arguments, moved, sdpa, formula, others=copies(arguments, sets - 1))
        if sets > 1:
            first, *others = copies(arguments, sets, on_huge_pages)
            yield Case("attention", f"{label} huge", first, moved, sdpa, formula, others=tuple(others))

        tables, blocks = block_tables_for((keys,) * batch, BLOCK_SIZE, torch.get_default_device())
        pools = torch.randn(2, blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(dtype).unbind()
        starts = torch.arange(batch + 1, dtype=torch.int32) * tokens
        common = (tables, starts, lens, SCALE)
        formula = partial(plain_paged_attention, q, *pools, tables, mask)
        arguments = (q.flatten(0, 1), *pools, *common)
        yield Case("paged_attention", label, arguments, moved, sdpa, formula, others=copies(arguments, sets - 1))
        if sets > 1:
            first, *others = copies(arguments, sets, on_huge_pages)
            yield Case("paged_attention", f"{label} huge", first, moved, sdpa, formula, others=tuple(others))
        if tokens == 1:
            (k_codes, k_scale), (v_codes, v_scale) = map(quantize_heads, pools)
            arguments = (q.flatten(0, 1), k_codes, v_codes, *common, True, 0, k_scale, v_scale)
            moved = bytes_of(q, q) + 2 * batch * keys * KV_HEADS * (HEAD_DIM + 4)
            formula = partial(plain_paged_attention, q, k_codes, v_codes, tables, mask, k_scale, v_scale)
            others = copies(arguments, 2 * (sets - 1))
            yield Case("paged_attention", f"{label} int8", arguments, moved, sdpa, formula, others=others)


def copies(
    arguments: tuple[Any, ...], count: int, copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> tuple[tuple[Any, ...], ...]:
    """The arguments with keys and values in memory of their own, `count` times."""
    query, keys, values, *rest = arguments
    return tuple((query, copy(keys), copy(values), *rest) for _ in range(count))


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    return huge_pages.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--only", default="", choices=["", "decode", "chunk", "prefill"])
    parser.add_argument(
        "--compile", action="store_true", help="also time the compiled reference, of prefills only the first"
    )
    args = parser.parse_args()
    sizes = PREFILLS[:1] if args.compile else PREFILLS
    run_cases(cases(getattr(torch, args.dtype), args.only, sizes), compile_reference=args.compile, repeats=10)
