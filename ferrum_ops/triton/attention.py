"""Attention over a KV cache on CUDA: which kernel is launched how, from sizes alone.

No length is read on the host, so that a graph replays with any. In pages the host does not know either how many tokens
each sequence has: where they may be few here and many there, one launch serves the sequences whose rows fit one small
tile and another the rest.

Floors: a decode reads `2 * kv_len * kv_heads * head_dim` elements of each sequence, at Qwen3-30B-A3B's 4 heads of 128
in 16 bits 2 KB for a key: 67 MB and 16 us for 32768 of them at 4.3 TB/s. A causal prefill of n tokens has
`2 * n^2 * heads * head_dim` operations, 34 G or 43 us for 2048 tokens at 790 TFLOP/s.

A decode wants 26 KB on their way for each multiprocessor of an H200 (4.3 TB/s times 0.8 us, of 132). Two tiles ahead of
64 keys and values of 128 in 16 bits are 64 KB, and registers have room for two programs: so the keys are split until
each multiprocessor has two. A split is the same part of a sequence whatever the others hold. So a sequence's result
depends on its neighbours through the number of splits only, and that is a function of the sizes of the call.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import triton.language as tl

from ferrum_ops._checks import ACTIVATION_DTYPES, expect
from ferrum_ops.ops.attention import check_attention, check_paged_attention
from ferrum_ops.triton import attention_kernels as kernels
from ferrum_ops.triton import launch
from ferrum_ops.triton.attention_kernels import CONTIGUOUS, INT8_PAGES, PAGES
from ferrum_ops.triton.launch import Binary, Target, cdiv

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SOURCES = (CONTIGUOUS.value, PAGES.value, INT8_PAGES.value)
#: Head sizes are filled up to one of these.
BLOCK_DS = (64, 128, 256)
MAX_SPLITS = 64
MERGE_D = 64
#: Keys of one sequence. The kernels compute their positions in 32 bits, and pages by `reciprocal`.
MAX_KEYS = (1 << 30) - 1
ANY_ROWS = (1 << 31) - 1


@dataclass(frozen=True)
class Tile:
    """Rows and keys of one step of a program."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int  # that a multiprocessor has room for
    split_tiles: int  # the least tiles of keys worth a split: less would mostly fill the pipeline


@dataclass(frozen=True)
class Sizes:
    """Of a call."""

    sequences: int
    tokens: int  # of each sequence, or in pages of all together
    group: int  # query heads of a KV head
    kv_heads: int
    head_dim: int
    capacity: int  # keys that a sequence can have
    dtype: torch.dtype
    source: int  # CONTIGUOUS, PAGES or INT8_PAGES


@dataclass(frozen=True)
class Launch:
    """One launch: which slots of rows there are, and which sequences it serves."""

    tile: Tile
    slots: int
    tiles: int  # slots of each sequence; 0 where they are searched
    splits: int
    rows_above: int = 0  # sequences with more rows than this
    rows_up_to: int = ANY_ROWS


def block_ds(dtype: torch.dtype, capability: int) -> tuple[int, ...]:
    """Those of BLOCK_DS that leave no register to be spilled."""
    if dtype == torch.float32:
        return (64, 256)
    return BLOCK_DS if capability >= 90 else BLOCK_DS[1:]


def _block_d(head_dim: int, dtype: torch.dtype, target: Target) -> int:
    return next(d for d in block_ds(dtype, target.capability) if d >= head_dim)


def few_rows_tile(block_d: int, dtype: torch.dtype, source: int, capability: int) -> Tile:
    """For a decode: one token of a group of up to 16 query heads. Bounded by bytes in flight."""
    if dtype == torch.float32:
        return Tile(16, 16, num_warps=4 if block_d == 64 else 8, num_stages=1, programs=1, split_tiles=8)
    # Of pages, the table is fetched as many tiles ahead again.
    stages = 3 if source == CONTIGUOUS.value else 5
    codes = source == INT8_PAGES.value  # converted in registers
    if block_d > 128 or (codes and capability < 90):
        return Tile(16, 32, 8 if codes and block_d > 128 else 4, stages, programs=2, split_tiles=4)
    return Tile(16, 64, num_warps=4, num_stages=stages, programs=2, split_tiles=2)


def many_rows_tile(block_d: int, dtype: torch.dtype, source: int, capability: int) -> Tile:
    """For a prefill: as many rows as registers hold, for the tensor cores' sake."""
    if dtype == torch.float32:
        return few_rows_tile(block_d, dtype, source, capability)
    stages = 2 if source == CONTIGUOUS.value else 3
    if block_d > 128:
        return Tile(32, 32, num_warps=8, num_stages=stages, programs=2, split_tiles=16)
    # Codes are converted in registers; from 10.0 on the places of 64 keys of 128 in pages are too many of them.
    wide_pages = source == PAGES.value and block_d > 64 and capability >= 100
    keys = 32 if source == INT8_PAGES.value or wide_pages else 64
    # Below 9.0 queries are in registers too.
    return Tile(128 if capability >= 90 else 64, keys, 8, stages, programs=1, split_tiles=8)


def _splits(tile: Tile, programs: int, capacity: int, target: Target) -> int:
    """The fewest splits with which `programs` of equal length keep nine tenths of the device busy.

    Partial results of many rows cost as much as their keys: such are split only to fill the device once.
    """
    room = tile.programs * target.multiprocessors
    most = min(MAX_SPLITS, capacity // (tile.block_n * tile.split_tiles))
    if tile.block_m > 16:
        most = min(most, room // max(programs, 1))

    def busy(splits: int) -> float:
        wanted = programs * splits
        return wanted / (cdiv(wanted, room) * room)

    candidates = range(1, max(most, 1) + 1)
    return next((n for n in candidates if busy(n) >= 0.9), max(candidates, key=busy))


def pick_attention_config(sizes: Sizes, target: Target) -> tuple[Launch, ...]:
    """One launch, or in pages two where sequences of few and of many tokens may be mixed."""
    block_d = _block_d(sizes.head_dim, sizes.dtype, target)
    few = few_rows_tile(block_d, sizes.dtype, sizes.source, target.capability)
    many = many_rows_tile(block_d, sizes.dtype, sizes.source, target.capability)
    rows, sequences = sizes.tokens * sizes.group, sizes.sequences

    def splits(tile: Tile, row_tiles: int) -> int:
        return _splits(tile, max(row_tiles, 1) * sizes.kv_heads, sizes.capacity, target)

    def searched(tile: Tile) -> int:
        return rows // tile.block_m + sequences + 1

    if sizes.source == CONTIGUOUS.value:
        tile = few if rows <= few.block_m else many
        tiles = cdiv(rows, tile.block_m)
        return (Launch(tile, sequences * tiles, tiles, splits(tile, sequences * tiles)),)
    if few == many or rows <= few.block_m * max(sequences, 1):
        row_tiles = max(rows // few.block_m, min(sequences, sizes.tokens))
        return (Launch(few, searched(few), 0, splits(few, row_tiles)),)
    above = few.block_m if sequences > 1 else 0
    launches = [Launch(many, searched(many), 0, splits(many, rows // many.block_m), rows_above=above)]
    if above:
        launches.append(Launch(few, sequences + 1, 1, splits(few, sequences), rows_up_to=above))
    return tuple(launches)


def reciprocal(divisor: int) -> tuple[int, int]:
    """(multiplier, shift), both int32, with `(i * multiplier) >> shift == i // divisor` for i up to `MAX_KEYS`."""
    shift = 30 + (divisor - 1).bit_length()
    return cdiv(1 << shift, divisor), shift


def _binary(tile: Tile, source: int, block_d: int, dtype: torch.dtype) -> Binary:
    return Binary.of(
        kernels.attention_kernel,
        tile.num_warps,
        tile.num_stages,
        DTYPE=DTYPES[dtype],
        SOURCE=source,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=block_d,
    )


def _merge_binary(source: int, dtype: torch.dtype) -> Binary:
    return Binary.of(
        kernels.attention_merge_kernel,
        4,
        1,
        DTYPE=DTYPES[dtype],
        SOURCE=min(source, PAGES.value),  # codes are no longer seen
        MAX_SPLITS=MAX_SPLITS,
        BLOCK_D=MERGE_D,
    )


def binaries(capability: int) -> dict[Binary, dict[str, str]]:
    """Everything the launchers here can ask for, with the types of the arguments."""
    found: dict[Binary, dict[str, str]] = {}
    for dtype, source in itertools.product(DTYPES, SOURCES):
        own = f"*{DTYPES[dtype]}"
        cache, scale = ("*i8", "*fp32") if source == INT8_PAGES.value else (own, "*i32")
        common = {"starts_ptr": "*i32", "out_ptr": own, "partial_ptr": "*fp32", "statistics_ptr": "*fp32"}
        types = {"q_ptr": own, "k_ptr": cache, "v_ptr": cache, "k_scale_ptr": scale, "v_scale_ptr": scale}
        types |= {"tables_ptr": "*i32", "lens_ptr": "*i32", "scale": "fp32"}
        for block_d in block_ds(dtype, capability):
            for tile_of in (few_rows_tile, many_rows_tile):
                tile = tile_of(block_d, dtype, source, capability)
                found[_binary(tile, source, block_d, dtype)] = types | common
        found[_merge_binary(source, dtype)] = common
    return found


def _attend(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    lists: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor],  # block tables, first tokens, lengths
    sizes: Sizes,
    pool: tuple[int, int, int],  # blocks, blocks of a table, block size
    strides: tuple[int, ...],  # of q: sequence, token, head; of the caches: sequence, head, key
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    out = q.new_empty(q.shape)
    kv_lens = lists[2]
    # Lengths stand for what the kernel does not read.
    scales_or_nothing = [kv_lens if t is None else t for t in scales]
    tables, starts = (kv_lens if t is None else t for t in lists[:2])
    target = launch.target_of(q)
    for step in pick_attention_config(sizes, target):
        tile = step.tile
        programs = step.slots * sizes.kv_heads * step.splits if step.splits > 1 else 0
        partial = q.new_empty((programs, tile.block_m, sizes.head_dim), dtype=torch.float32)
        statistics = q.new_empty((programs, 2, tile.block_m), dtype=torch.float32)
        common = (sizes.sequences, sizes.tokens, sizes.group, sizes.head_dim)
        serves = (step.tiles, step.rows_above, step.rows_up_to)
        launch.run(
            _binary(tile, sizes.source, _block_d(sizes.head_dim, sizes.dtype, target), q.dtype),
            (step.slots, sizes.kv_heads, step.splits),
            q,
            *caches,
            *scales_or_nothing,
            tables,
            starts,
            kv_lens,
            out,
            partial,
            statistics,
            *common,
            sizes.capacity,
            *pool,
            *reciprocal(pool[2]),
            *strides,
            scale * math.log2(math.e),
            int(causal),
            min(window, MAX_KEYS),
            *serves,
            tile.split_tiles,
        )
        if step.splits > 1:
            parts = cdiv(sizes.head_dim, MERGE_D)
            launch.run(
                _merge_binary(sizes.source, q.dtype),
                (step.slots, sizes.kv_heads, tile.block_m * parts),
                partial,
                statistics,
                starts,
                out,
                *common,
                tile.block_m,
                step.splits,
                *serves,
            )
    return out


def _check_sizes(op: str, q: torch.Tensor, capacity: int) -> None:
    expect(q.dtype in ACTIVATION_DTYPES, op, "q", "float32, float16 or bfloat16", q.dtype)
    expect(q.shape[-1] <= BLOCK_DS[-1], op, "q", f"a head size of at most {BLOCK_DS[-1]} on CUDA", q.shape[-1])
    expect(capacity <= MAX_KEYS, op, "k_cache", f"room for at most {MAX_KEYS} keys of a sequence on CUDA", capacity)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
) -> torch.Tensor:
    check_attention(q, k_cache, v_cache, kv_lens, window)
    sequences, kv_heads, capacity, head_dim = k_cache.shape
    _check_sizes("attention", q, capacity)
    if q.numel() == 0:
        return q.new_empty(q.shape)
    tokens, heads = q.shape[1:3]
    sizes = Sizes(sequences, tokens, heads // kv_heads, kv_heads, head_dim, capacity, q.dtype, source=CONTIGUOUS.value)
    strides = (*q.stride()[:3], *k_cache.stride()[:3])
    lists = (None, None, kv_lens)
    return _attend(q, (k_cache, v_cache), (None, None), lists, sizes, (0, 0, 1), strides, scale, causal, window)


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
    check_paged_attention(q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, window, k_scale, v_scale)
    blocks, block_size, kv_heads, head_dim = k_cache.shape
    sequences, max_blocks = block_tables.shape
    capacity = max_blocks * block_size
    _check_sizes("paged_attention", q, capacity)
    if q.numel() == 0:
        return q.new_empty(q.shape)
    tokens, heads, _ = q.shape
    source = PAGES.value if k_scale is None else INT8_PAGES.value
    sizes = Sizes(sequences, tokens, heads // kv_heads, kv_heads, head_dim, capacity, q.dtype, source)
    lists, pool = (block_tables, cu_seqlens_q, kv_lens), (blocks, max_blocks, block_size)
    strides = (0, *q.stride()[:2], 0, head_dim, kv_heads * head_dim)
    return _attend(q, (k_cache, v_cache), (k_scale, v_scale), lists, sizes, pool, strides, scale, causal, window)
