"""Attention over a KV cache, contiguous or paged: prefill, chunked prefill and decode, grouped queries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from ferrum_ops._checks import check_activation, check_float32, check_shape, compute_dtype, expect
from ferrum_ops._library import refuse_grad, register
from ferrum_ops.ops.kv_cache import (
    POOL_SHAPE,
    check_caches,
    check_contiguous,
    check_last_contiguous,
    check_lengths,
    on_host,
    quantize_heads,
)

#: Scores the reference holds at a time; it walks over the queries in steps.
REFERENCE_SCORES = 1 << 24


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
) -> torch.Tensor:
    """`softmax(q k^T * scale) v` of n new tokens per sequence over a contiguous cache that holds them already.

    Query i of a sequence sees key j when `j <= kv_len - n + i` (causal) or `j < kv_len`; with a window only the last
    `window` of those. Query head h reads KV head `h // (Hq / Hkv)`. Scores, softmax and sums are float32; on CUDA, and
    for bfloat16 on AMD's CPUs, the softmax's weights are rounded to q's dtype. A key or value that is not finite
    reaches only the queries that see it.

    Args:
        q: `[B, n, Hq, D]`, float32, float16 or bfloat16; last dimension contiguous, other strides free.
        k_cache, v_cache: `[B, Hkv, capacity, D]` of q's dtype; Hq is a multiple of Hkv. Both have the same strides: 1
            for the last dimension, multiples of D for the others. So they may be the filled part of larger buffers, or
            token-major tensors with their heads in front.
        kv_lens: int32 `[B]`, keys of each sequence, the new ones included. A sequence of length 0 gives zeros.
        scale: factor of the scores, usually `D ** -0.5`.
        causal: whether a query sees only keys up to its own.
        window: at least 0; 0 means no window.

    Returns:
        Contiguous `[B, n, Hq, D]` of q's dtype; a query that sees no key gets zeros.

    Raises:
        RuntimeError: other dtypes, shapes or strides; on CPU a length below 0, above the capacity or, when causal,
            above 0 and below n; on CUDA heads larger than 256; an input that requires grad while autograd is on. On
            other devices, where lengths are not read on the host, keys outside the capacity are not seen.
    """
    refuse_grad("attention", q, k_cache, v_cache)
    return torch.ops.ferrum.attention(q, k_cache, v_cache, kv_lens, scale, causal, window)


def _visible(
    tokens: int, kv_len: torch.Tensor | int, device: torch.device, causal: bool, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """First visible key of each token and the one behind the last, int64 `[tokens]`."""
    token = torch.arange(tokens, device=device)
    end = (kv_len - tokens + token + 1 if causal else token * 0 + kv_len).clamp(min=0)
    begin = (end - window).clamp(min=0) if window > 0 else torch.zeros_like(end)
    return begin, end


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of q `[n, Hq, D]` over k and v `[kv, Hkv, D]`; token i sees the keys `[begin[i], end[i])`."""
    keys, kv_heads, _ = k.shape
    step = max(1, REFERENCE_SCORES // max(1, q.shape[1] * keys))
    key = torch.arange(keys, device=q.device)
    bad = ~v.isfinite()
    values = v.masked_fill(bad, 0)
    rows = []
    for i in range(0, q.shape[0], step):
        heads = q[i : i + step].unflatten(1, (kv_heads, -1))
        visible = (key >= begin[i : i + step, None]) & (key < end[i : i + step, None])
        scores = torch.einsum("thgd,khd->thgk", heads, k) * scale
        weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
        weights = weights.masked_fill(~visible.any(-1)[:, None, None, None], 0)
        out = torch.einsum("thgk,khd->thgd", weights, values)
        # A value that is not finite, times the weight 0 of a token that does not see it, would be NaN.
        sees_bad = torch.einsum("tk,khd->thd", visible.to(q.dtype), bad.to(q.dtype)) > 0
        rows.append(out.masked_fill(sees_bad[:, :, None], torch.nan).flatten(1, 2))
    return torch.cat(rows)


def _check_heads(op: str, q: torch.Tensor, k_cache: torch.Tensor, kv_heads: int, window: int) -> None:
    expect(k_cache.shape[3] == q.shape[-1], op, "k_cache", f"a head size of {q.shape[-1]}", tuple(k_cache.shape))
    multiple = kv_heads >= 1 and q.shape[-2] % kv_heads == 0
    expect(multiple, op, "q", f"heads that are a multiple of the cache's {kv_heads}", q.shape[-2])
    check_last_contiguous(op, "q", q)
    expect(window >= 0, op, "window", "at least 0", window)


def _check_kv_len(op: str, kv_len: int, tokens: int, capacity: int, causal: bool) -> None:
    expect(0 <= kv_len <= capacity, op, "kv_lens", f"0 <= length <= {capacity}", kv_len)
    holds = not causal or kv_len == 0 or kv_len >= tokens
    expect(holds, op, "kv_lens", f"0 or at least the {tokens} causal queries", kv_len)


def _check_cache_rows(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    expect(k_cache.dim() == 4, op, "k_cache", "shape (batch, kv_heads, capacity, head_dim)", tuple(k_cache.shape))
    expect(v_cache.dtype == k_cache.dtype, op, "v_cache", str(k_cache.dtype), v_cache.dtype)
    check_shape(op, "v_cache", v_cache, tuple(k_cache.shape))
    check_last_contiguous(op, "k_cache", k_cache)
    if k_cache.numel() == 0:
        return
    strides, head_dim = k_cache.stride(), k_cache.shape[3]
    rows = all(size == 1 or stride % head_dim == 0 for size, stride in zip(k_cache.shape[:3], strides))
    expect(rows, op, "k_cache", "strides that are multiples of head_dim", f"strides {tuple(strides)}")
    same = all(size == 1 or v == k for size, k, v in zip(k_cache.shape, strides, v_cache.stride()))
    expect(same, op, "v_cache", f"the strides {tuple(strides)} of k_cache", f"strides {tuple(v_cache.stride())}")


def check_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_lens: torch.Tensor, window: int
) -> None:
    op = "attention"
    check_activation(op, "q", q)
    expect(q.dim() == 4, op, "q", "shape (batch, tokens, heads, head_dim)", tuple(q.shape))
    _check_cache_rows(op, k_cache, v_cache)
    expect(k_cache.dtype == q.dtype, op, "k_cache", str(q.dtype), k_cache.dtype)
    expect(k_cache.shape[0] == q.shape[0], op, "k_cache", f"a batch of {q.shape[0]}", tuple(k_cache.shape))
    _check_heads(op, q, k_cache, k_cache.shape[1], window)
    check_lengths(op, "kv_lens", kv_lens, q.shape[0])


def attention_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
) -> torch.Tensor:
    check_attention(q, k_cache, v_cache, kv_lens, window)
    tokens = q.shape[1]
    if on_host(kv_lens):
        for kv_len in kv_lens.tolist():
            _check_kv_len("attention", kv_len, tokens, k_cache.shape[2], causal)
    compute = compute_dtype(q.dtype)
    if q.numel() == 0:
        return q.new_empty(q.shape)
    out = [
        _attend(
            q[b].to(compute),
            k_cache[b].transpose(0, 1).to(compute),
            v_cache[b].transpose(0, 1).to(compute),
            *_visible(tokens, kv_lens[b].long(), q.device, causal, window),
            scale,
        )
        for b in range(q.shape[0])
    ]
    return torch.stack(out).to(q.dtype)


def attention_fake(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
) -> torch.Tensor:
    check_attention(q, k_cache, v_cache, kv_lens, window)
    return q.new_empty(q.shape)


def attention_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for heads, kv_heads, head_dim, capacity, tokens, lens, causal, window in (
        (4, 2, 64, 20, 1, (20, 0, 7), True, 0),
        (6, 2, 63, 90, 7, (90, 33), True, 0),
        (8, 1, 128, 600, 1, (600,), True, 0),
        (3, 3, 17, 40, 11, (40,), True, 5),
        (2, 1, 100, 33, 9, (5, 33), False, 0),
        (2, 2, 256, 9, 2, (9,), True, 3),
        (4, 2, 1, 5, 0, (5,), True, 0),
    ):
        caches = randn(2, len(lens), kv_heads, capacity, head_dim).unbind()
        kv_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        yield randn(len(lens), tokens, heads, head_dim), *caches, kv_lens, head_dim**-0.5, causal, window
    sliced = randn(2, 3, 7, 100)[:, :, 1:5, 17:81]
    lens = torch.tensor((3, 12), dtype=torch.int32, device=device)
    yield sliced, randn(2, 2, 12, 64), randn(2, 2, 12, 64), lens, 0.3, True, 0
    filled = (buffer[:, :, :12] for buffer in randn(2, 2, 2, 20, 64).unbind())
    yield randn(2, 3, 4, 64), *filled, lens, 0.3, True, 0
    token_major = (heads.transpose(1, 2) for heads in randn(2, 2, 12, 2, 64).unbind())
    yield randn(2, 3, 4, 64), *token_major, lens, 0.3, True, 0


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention` over a paged pool for sequences with any number of new tokens each.

    Key j of sequence s is row `j % block_size` of block `block_tables[s, j // block_size]`. Prefills, chunks of
    prefills and decodes may share one call. Over int8 pools a bfloat16 decode on AMD's CPUs computes with 16-bit
    integers: queries are rounded to 1 / 32767 of their head's largest element, weights to that of a tile's largest.

    Args:
        q: `[T, Hq, D]`, float32, float16 or bfloat16, the sequences one after the other; last dimension contiguous,
            other strides free.
        k_cache, v_cache: contiguous `[num_blocks, block_size, Hkv, D]` of q's dtype, or int8 with scales.
        block_tables: contiguous int32 `[S, max_blocks]`. Entries of blocks without a visible key are not looked at.
        cu_seqlens_q: int32 `[S + 1]`, ascending from 0 to T: queries `[cu[s], cu[s + 1])` belong to sequence s.
        kv_lens: int32 `[S]`, keys of each sequence, the new ones included. A sequence of length 0 gives zeros.
        scale, causal, window: as in `attention`.
        k_scale, v_scale: contiguous float32 `[num_blocks, block_size, Hkv]` as `paged_kv_write_int8_` writes
            them; given for int8 pools only.

    Returns:
        Contiguous `[T, Hq, D]` of q's dtype; a query that sees no key gets zeros.

    Raises:
        RuntimeError: as `attention`; on CPU also values of cu_seqlens_q that do not ascend from 0 to T, and blocks
            outside the pool that hold a visible key. On CUDA, where they are not read on the host, keys of such blocks
            are not seen, and rows of q behind the last sequence give zeros.
    """
    refuse_grad("paged_attention", q, k_cache, v_cache, k_scale, v_scale)
    return torch.ops.ferrum.paged_attention(
        q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, scale, causal, window, k_scale, v_scale
    )


def check_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    window: int,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    op = "paged_attention"
    check_activation(op, "q", q)
    expect(q.dim() == 3, op, "q", "shape (tokens, heads, head_dim)", tuple(q.shape))
    check_caches(op, k_cache, v_cache, POOL_SHAPE)
    int8 = k_cache.dtype == torch.int8
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scales is None:
            expect(not int8, op, name, "a tensor beside int8 caches", "none")
            continue
        expect(int8, op, name, "none beside caches that are not int8", "a tensor")
        check_float32(op, name, scales, q)
        check_shape(op, name, scales, tuple(k_cache.shape[:3]))
        check_contiguous(op, name, scales)
    expect(int8 or k_cache.dtype == q.dtype, op, "k_cache", str(q.dtype), k_cache.dtype)
    expect(k_cache.shape[1] >= 1, op, "k_cache", "a block size of at least 1", k_cache.shape[1])
    _check_heads(op, q, k_cache, k_cache.shape[2], window)
    expect(block_tables.dtype == torch.int32, op, "block_tables", "int32", block_tables.dtype)
    expect(block_tables.dim() == 2, op, "block_tables", "shape (sequences, max_blocks)", tuple(block_tables.shape))
    check_contiguous(op, "block_tables", block_tables)
    check_lengths(op, "cu_seqlens_q", cu_seqlens_q, block_tables.shape[0] + 1)
    check_lengths(op, "kv_lens", kv_lens, block_tables.shape[0])


def _check_starts(op: str, starts: list[int], tokens: int) -> None:
    expect(starts[0] == 0, op, "cu_seqlens_q", "0 first", starts[0])
    expect(starts[-1] == tokens, op, "cu_seqlens_q", f"the {tokens} rows of q last", starts[-1])
    for first, second in itertools.pairwise(starts):
        expect(first <= second, op, "cu_seqlens_q", "ascending values", f"{first} before {second}")


def _sequence_keys(
    pool: torch.Tensor, scales: torch.Tensor | None, table: torch.Tensor, kv_len: int, begin: int, compute: torch.dtype
) -> torch.Tensor:
    """Keys or values `[kv_len, Hkv, D]` of one sequence; those before `begin` are not read and hold zeros."""
    block_size = pool.shape[1]
    first = begin // block_size
    blocks = table[first : (kv_len + block_size - 1) // block_size].long()
    outside = blocks[(blocks < 0) | (blocks >= pool.shape[0])]
    if len(outside) > 0:
        expect(False, "paged_attention", "block_tables", f"0 <= block < {pool.shape[0]}", int(outside[0]))
    pages = pool[blocks].to(compute)
    if scales is not None:
        pages = pages * scales[blocks].to(compute)[..., None]
    rows = pages.flatten(0, 1)[: kv_len - first * block_size]
    return torch.cat((rows.new_zeros(first * block_size, *rows.shape[1:]), rows))


def paged_attention_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    op = "paged_attention"
    check_paged_attention(q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, window, k_scale, v_scale)
    starts, lens = cu_seqlens_q.tolist(), kv_lens.tolist()
    _check_starts(op, starts, q.shape[0])
    compute = compute_dtype(q.dtype)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for s, kv_len in enumerate(lens):
        tokens = starts[s + 1] - starts[s]
        _check_kv_len(op, kv_len, tokens, block_tables.shape[1] * k_cache.shape[1], causal)
        if tokens == 0 or kv_len == 0:
            continue
        begin, end = _visible(tokens, kv_len, q.device, causal, window)
        first = int(begin[0])
        k = _sequence_keys(k_cache, k_scale, block_tables[s], kv_len, first, compute)
        v = _sequence_keys(v_cache, v_scale, block_tables[s], kv_len, first, compute)
        rows = slice(starts[s], starts[s + 1])
        out[rows] = _attend(q[rows].to(compute), k, v, begin, end, scale).to(q.dtype)
    return out


def paged_attention_fake(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    check_paged_attention(q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, window, k_scale, v_scale)
    return q.new_empty(q.shape)


def block_tables_for(
    kv_lens: tuple[int, ...], block_size: int, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, int]:
    """Shuffled tables `[S, max_blocks]` for sequences of these lengths, padded with -1, and the number of blocks."""
    counts = [-(-n // block_size) for n in kv_lens]
    blocks = torch.randperm(sum(counts) + 2).int()  # two blocks belong to nobody
    tables = torch.full((len(kv_lens), max(counts, default=0)), -1, dtype=torch.int32)
    for s, own in enumerate(blocks[: sum(counts)].split(counts)):
        tables[s, : len(own)] = own
    return tables.to(device), len(blocks)


def paged_attention_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for heads, kv_heads, head_dim, block_size, tokens, lens, causal, window, int8 in (
        (4, 2, 64, 16, (1, 7, 1, 0), (33, 7, 0, 5), True, 0, False),
        (8, 1, 128, 16, (1,), (600,), True, 0, True),
        (3, 3, 63, 5, (4, 1), (21, 17), True, 6, False),
        (6, 2, 17, 1, (3, 2), (9, 3), False, 0, True),
        (2, 1, 100, 100, (0, 0), (3, 0), True, 0, False),
    ):
        tables, blocks = block_tables_for(lens, block_size, device)
        caches: tuple[torch.Tensor, ...] = randn(2, blocks, block_size, kv_heads, head_dim).unbind()
        scales: tuple[torch.Tensor | None, ...] = (None, None)
        if int8:
            pairs = [quantize_heads(cache) for cache in caches]
            caches, scales = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
        q = randn(sum(tokens), heads, head_dim)
        starts = torch.tensor((0, *tokens), dtype=torch.int32, device=device).cumsum(0).int()
        kv_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        yield q, *caches, tables, starts, kv_lens, head_dim**-0.5, causal, window, *scales
    tables, blocks = block_tables_for((9,), 4, device)
    starts, kv_lens = (torch.tensor(values, dtype=torch.int32, device=device) for values in ((0, 3), (9,)))
    caches = randn(2, blocks, 4, 2, 64).unbind()
    yield randn(3, 7, 100)[:, 1:5, 17:81], *caches, tables, starts, kv_lens, 0.3, True, 0, None, None


register("attention", ref=attention_ref, fake=attention_fake, inputs=attention_inputs)
register("paged_attention", ref=paged_attention_ref, fake=paged_attention_fake, inputs=paged_attention_inputs)
