"""Writing keys and values to a cache: contiguous per sequence or a pool of pages, of the activations' dtype or int8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ferrum_ops._checks import check_activation, check_float32, check_shape, expect
from ferrum_ops._library import refuse_grad, register


def kv_append_(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache_lens: torch.Tensor
) -> None:
    """Append the keys and values of n tokens to every sequence: positions `[len, len + n)` of its cache.

    Args:
        k_cache, v_cache: contiguous `[B, Hkv, capacity, D]`, float32, float16 or bfloat16; written.
        k, v: `[B, n, Hkv, D]` of the caches' dtype; last dimension contiguous, other strides free.
        cache_lens: int32 `[B]`, tokens that each sequence holds already.

    Raises:
        RuntimeError: other dtypes, shapes or strides; on CPU a length below 0 or with `len + n > capacity`, before
            anything is written; an input that requires grad while autograd is on. On other devices, where lengths are
            not read on the host, nothing is written to the cache of such a sequence.
    """
    refuse_grad("kv_append_", k_cache, v_cache, k, v)
    torch.ops.ferrum.kv_append_(k_cache, v_cache, k, v, cache_lens)


def check_last_contiguous(op: str, argument: str, t: torch.Tensor) -> None:
    """The last stride of `t` is 1 wherever it matters."""
    rows = t.numel() == 0 or t.shape[-1] == 1 or t.stride(-1) == 1
    expect(rows, op, argument, "a contiguous last dimension", f"strides {tuple(t.stride())}")


def check_contiguous(op: str, argument: str, t: torch.Tensor) -> None:
    """`t` is contiguous."""
    expect(t.is_contiguous(), op, argument, "a contiguous tensor", f"strides {tuple(t.stride())}")


def check_caches(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor, shape: str) -> None:
    """Both caches are contiguous, of 4 dimensions, one dtype and one shape."""
    expect(k_cache.dim() == 4, op, "k_cache", f"shape {shape}", tuple(k_cache.shape))
    check_contiguous(op, "k_cache", k_cache)
    expect(v_cache.dtype == k_cache.dtype, op, "v_cache", str(k_cache.dtype), v_cache.dtype)
    check_shape(op, "v_cache", v_cache, tuple(k_cache.shape))
    check_contiguous(op, "v_cache", v_cache)


def check_lengths(op: str, argument: str, lengths: torch.Tensor, size: int) -> None:
    """`lengths` is contiguous int32 `[size]`."""
    expect(lengths.dtype == torch.int32, op, argument, "int32", lengths.dtype)
    check_shape(op, argument, lengths, (size,))
    check_contiguous(op, argument, lengths)


def on_host(t: torch.Tensor) -> bool:
    """Whether the values of `t` can be looked at: it lies on the CPU and is no tracer's stand-in."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_tokens(op: str, k: torch.Tensor, v: torch.Tensor) -> None:
    check_last_contiguous(op, "k", k)
    expect(v.dtype == k.dtype, op, "v", str(k.dtype), v.dtype)
    check_shape(op, "v", v, tuple(k.shape))
    check_last_contiguous(op, "v", v)


def write_rows(pool: torch.Tensor, rows: torch.Tensor, inside: torch.Tensor, values: torch.Tensor) -> None:
    """`pool[rows[i]] = values[i]` where `inside[i]`, with no host read and no row touched twice with two values."""
    if len(pool) == 0 or len(rows) == 0:
        return
    # Every other token repeats the first one that counts; without any, row 0 is written with what it holds.
    first = inside.int().argmax()
    source = torch.where(inside, torch.arange(len(rows), device=rows.device), first)
    any_inside = inside[source]
    to = torch.where(any_inside, rows[source], 0).long()
    wide = any_inside.view(-1, *[1] * (pool.dim() - 1))
    pool.index_put_((to,), torch.where(wide, values[source], pool[to]))


def _check_kv_append_(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache_lens: torch.Tensor
) -> None:
    op = "kv_append_"
    check_activation(op, "k_cache", k_cache)
    check_caches(op, k_cache, v_cache, "(batch, kv_heads, capacity, head_dim)")
    batch, heads, _, head_dim = k_cache.shape
    fits = k.dim() == 4 and (k.shape[0], *k.shape[2:]) == (batch, heads, head_dim)
    expect(fits, op, "k", f"shape ({batch}, *, {heads}, {head_dim})", tuple(k.shape))
    expect(k.dtype == k_cache.dtype, op, "k", str(k_cache.dtype), k.dtype)
    _check_tokens(op, k, v)
    check_lengths(op, "cache_lens", cache_lens, batch)


def kv_append__ref(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache_lens: torch.Tensor
) -> None:
    _check_kv_append_(k_cache, v_cache, k, v, cache_lens)
    batch, heads, capacity, head_dim = k_cache.shape
    tokens = k.shape[1]
    if on_host(cache_lens):
        for length in cache_lens.tolist():
            expect(
                0 <= length <= capacity - tokens,
                "kv_append_",
                "cache_lens",
                f"0 <= length <= {capacity - tokens} (capacity {capacity} less {tokens} new)",
                length,
            )
    at = cache_lens.long()[:, None, None] + torch.arange(tokens, device=k.device)[:, None]  # [B, n, 1]
    sequence = torch.arange(batch, device=k.device)[:, None, None]
    head = torch.arange(heads, device=k.device)
    rows = (sequence * heads + head) * capacity + at
    fits = (cache_lens >= 0) & (cache_lens <= capacity - tokens)
    inside = fits[:, None, None].expand_as(rows)
    for cache, new in ((k_cache, k), (v_cache, v)):
        write_rows(cache.view(-1, head_dim), rows.flatten(), inside.flatten(), new.reshape(-1, head_dim))


def kv_append__fake(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache_lens: torch.Tensor
) -> None:
    _check_kv_append_(k_cache, v_cache, k, v, cache_lens)


def kv_append__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for batch, heads, capacity, head_dim, tokens, lens in (
        (2, 3, 7, 63, 2, [5, 0]),
        (1, 2, 1, 128, 1, [0]),
        (3, 1, 9, 1, 4, [5, 2, 0]),
        (2, 2, 4, 16, 0, [4, 1]),
        (0, 2, 4, 16, 1, []),
    ):
        caches = randn(2, batch, heads, capacity, head_dim)
        new = randn(2, batch, tokens, heads, head_dim)
        yield *caches.unbind(), *new.unbind(), torch.tensor(lens, dtype=torch.int32, device=device)
    qkv = randn(2, 3, 8, 100)[..., 17:81]
    lens = torch.tensor([1, 4], dtype=torch.int32, device=device)
    yield randn(2, 2, 9, 64), randn(2, 2, 9, 64), qkv[:, :, 4:6], qkv[:, :, 6:], lens


def paged_kv_write_(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write the keys and values of T tokens to their slots of a paged pool.

    Slot s is row `s % block_size` of block `s // block_size`. The slots of one call are distinct, apart from -1: which
    of two tokens stays in a slot is not defined.

    Args:
        k_cache, v_cache: contiguous `[num_blocks, block_size, Hkv, D]`, float32, float16 or bfloat16; written.
        k, v: `[T, Hkv, D]` of the pool's dtype; last dimension contiguous, other strides free.
        slot_mapping: int32 or int64 `[T]`; a token with slot -1 is skipped.

    Raises:
        RuntimeError: other dtypes, shapes or strides; on CPU a slot outside the pool, before anything is written; an
            input that requires grad while autograd is on. On other devices, where slots are not read on the host, a
            token with such a slot is skipped.
    """
    refuse_grad("paged_kv_write_", k_cache, v_cache, k, v)
    torch.ops.ferrum.paged_kv_write_(k_cache, v_cache, k, v, slot_mapping)


POOL_SHAPE = "(num_blocks, block_size, kv_heads, head_dim)"


def check_slot_mapping(op: str, slot_mapping: torch.Tensor, tokens: int) -> None:
    """`slot_mapping` is contiguous int32 or int64 `[tokens]`."""
    integers = slot_mapping.dtype in (torch.int32, torch.int64)
    expect(integers, op, "slot_mapping", "int32 or int64", slot_mapping.dtype)
    check_shape(op, "slot_mapping", slot_mapping, (tokens,))
    check_contiguous(op, "slot_mapping", slot_mapping)


def _check_pool_tokens(
    op: str, k_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    heads, head_dim = k_cache.shape[2:]
    fits = k.dim() == 3 and tuple(k.shape[1:]) == (heads, head_dim)
    expect(fits, op, "k", f"shape (*, {heads}, {head_dim})", tuple(k.shape))
    _check_tokens(op, k, v)
    check_slot_mapping(op, slot_mapping, k.shape[0])


def inside_pool(op: str, slot_mapping: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Which tokens have a slot of the pool; raises on the host for one that is neither that nor -1."""
    inside = (slot_mapping >= 0) & (slot_mapping < num_slots)
    if on_host(slot_mapping):
        outside = slot_mapping[~inside & (slot_mapping != -1)]
        if len(outside) > 0:
            expect(False, op, "slot_mapping", f"-1 <= slot < {num_slots}", int(outside[0]))
    return inside


def _check_paged_kv_write_(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    op = "paged_kv_write_"
    check_activation(op, "k_cache", k_cache)
    check_caches(op, k_cache, v_cache, POOL_SHAPE)
    expect(k.dtype == k_cache.dtype, op, "k", str(k_cache.dtype), k.dtype)
    _check_pool_tokens(op, k_cache, k, v, slot_mapping)


def paged_kv_write__ref(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    _check_paged_kv_write_(k_cache, v_cache, k, v, slot_mapping)
    inside = inside_pool("paged_kv_write_", slot_mapping, k_cache.shape[0] * k_cache.shape[1])
    for cache, new in ((k_cache, k), (v_cache, v)):
        write_rows(cache.flatten(0, 1), slot_mapping, inside, new)


def paged_kv_write__fake(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    _check_paged_kv_write_(k_cache, v_cache, k, v, slot_mapping)


def paged_kv_write__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def slots(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    for blocks, block_size, heads, head_dim, slot_mapping in (
        (4, 16, 2, 128, slots(5, 63, -1, 0, 17)),
        (3, 5, 3, 63, slots(14, 3, 7, dtype=torch.int64)),
        (7, 1, 1, 1, slots(6)),
        (2, 4, 2, 16, slots(-1, -1)),
        (2, 4, 2, 16, slots()),
        (0, 4, 2, 16, slots(-1)),
    ):
        caches = randn(2, blocks, block_size, heads, head_dim)
        yield *caches.unbind(), *randn(2, len(slot_mapping), heads, head_dim).unbind(), slot_mapping
    heads = randn(3, 8, 100)[..., 17:81]
    yield randn(2, 3, 2, 64), randn(2, 3, 2, 64), heads[:, 4:6], heads[:, 6:], slots(5, 2, 0)


def paged_kv_write_int8_(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """`paged_kv_write_` into int8 pools, quantised symmetrically per token and head.

    `s = max(max|x|, 1e-8) / 127` and `q = clamp(rint(x / s), -127, 127)` over the D elements of a head, in float32,
    ties to even; it reads back as `q * s`. A head with an element that is not finite gets codes 0 and scale NaN.

    Args:
        k_cache, v_cache: contiguous int8 `[num_blocks, block_size, Hkv, D]`; written.
        k_scale, v_scale: contiguous float32 `[num_blocks, block_size, Hkv]`; written.
        k, v: `[T, Hkv, D]`, float32, float16 or bfloat16; last dimension contiguous, other strides free.
        slot_mapping: as in `paged_kv_write_`.

    Raises:
        RuntimeError: as `paged_kv_write_`, with the same slots skipped on other devices.
    """
    refuse_grad("paged_kv_write_int8_", k, v)
    torch.ops.ferrum.paged_kv_write_int8_(k_cache, v_cache, k_scale, v_scale, k, v, slot_mapping)


def _check_paged_kv_write_int8_(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    op = "paged_kv_write_int8_"
    expect(k_cache.dtype == torch.int8, op, "k_cache", "int8", k_cache.dtype)
    check_caches(op, k_cache, v_cache, POOL_SHAPE)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        check_float32(op, name, scale, k)
        check_shape(op, name, scale, tuple(k_cache.shape[:3]))
        check_contiguous(op, name, scale)
    check_activation(op, "k", k)
    _check_pool_tokens(op, k_cache, k, v, slot_mapping)


def quantize_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 of x's shape and scales float32 without the last dimension; see `paged_kv_write_int8_`."""
    x = x.float()  # also for a float64 oracle: the codes are defined in float32
    finite = x.isfinite().all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] > 0 else x.new_zeros(*x.shape[:-1], 1)
    scale = largest.clamp(min=1e-8) / 127
    codes = (x / scale).round().clamp(-127, 127).to(torch.int8)
    return codes, torch.where(finite, scale, torch.nan)[..., 0]


def paged_kv_write_int8__ref(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    _check_paged_kv_write_int8_(k_cache, v_cache, k_scale, v_scale, k, v, slot_mapping)
    inside = inside_pool("paged_kv_write_int8_", slot_mapping, k_cache.shape[0] * k_cache.shape[1])
    for cache, scale, new in ((k_cache, k_scale, k), (v_cache, v_scale, v)):
        codes, scales = quantize_heads(new)
        write_rows(cache.flatten(0, 1), slot_mapping, inside, codes)
        write_rows(scale.flatten(0, 1), slot_mapping, inside, scales.to(scale.dtype))


def paged_kv_write_int8__fake(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    _check_paged_kv_write_int8_(k_cache, v_cache, k_scale, v_scale, k, v, slot_mapping)


def paged_kv_write_int8__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for k_cache, _, k, v, slot_mapping in paged_kv_write__inputs(device, dtype):
        codes = torch.randint(-127, 128, (2, *k_cache.shape), dtype=torch.int8, device=device)
        scales = torch.rand(2, *k_cache.shape[:3], device=device)
        yield *codes.unbind(), *scales.unbind(), k, v, slot_mapping


register("kv_append_", ref=kv_append__ref, fake=kv_append__fake, inputs=kv_append__inputs)
register("paged_kv_write_", ref=paged_kv_write__ref, fake=paged_kv_write__fake, inputs=paged_kv_write__inputs)
register(
    "paged_kv_write_int8_",
    ref=paged_kv_write_int8__ref,
    fake=paged_kv_write_int8__fake,
    inputs=paged_kv_write_int8__inputs,
)
