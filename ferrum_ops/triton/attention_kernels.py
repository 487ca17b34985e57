"""Kernels for attention over a KV cache, contiguous or in pages.

A program owns BLOCK_M rows of one KV head and part of the keys that they see. The rows of a sequence are its tokens
with the query heads of the KV head side by side: row r is token `r // group`, head `r % group`. So a key is read once
for all heads that share it, and a decode's few rows fill a tensor-core tile as far as they can.

Slots number the blocks of rows. Where all sequences have equally many tokens, a slot is found by division; otherwise
sequence s owns the slots from `starts[s] * group // BLOCK_M + s` on, which are enough for it wherever the others end.

Tiles of BLOCK_N keys that every row sees need no mask. In the others, at both ends, a value that is not finite would
reach rows that do not see it, by 0 * NaN: there values are cleaned, and what was removed is put where it is seen.
"""

# mypy: allow-untyped-defs
# No `from __future__ import annotations` here: Triton's interpreter reads the annotations of kernels.
import triton
import triton.language as tl

#: Where keys and values are.
CONTIGUOUS, PAGES, INT8_PAGES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
#: Sequences that are looked at together when a slot is searched.
SEARCH = tl.constexpr(128)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _start(starts_ptr, s, sequences, tokens):
    """First token of sequence s, inside q whatever starts_ptr holds. Sequence 0 starts at 0."""
    start = tl.load(starts_ptr + s, mask=s <= sequences, other=0)
    return tl.where(s > 0, tl.minimum(tl.maximum(start, 0), tokens), 0)


@triton.jit
def _rows_of(slot, starts_ptr, sequences, tokens, group, block_m, tiles, SOURCE: tl.constexpr):
    """(sequence, its first token, its tokens, the first row of this slot), the row negative or too large for none.

    In pages, the tokens behind the last sequence are one more, without keys.
    """
    if tiles > 0:
        s = slot // tiles
        row = slot % tiles * block_m
    else:
        owners = tl.zeros((SEARCH,), tl.int32)
        for i in range(0, sequences + 1, SEARCH):
            index = i + tl.arange(0, SEARCH)
            first = _start(starts_ptr, index, sequences, tokens) * group // block_m + index
            owners += ((first <= slot) & (index <= sequences)).to(tl.int32)
        s = tl.sum(owners, 0) - 1
        row = (slot - (_start(starts_ptr, s, sequences, tokens) * group // block_m + s)) * block_m
    if SOURCE == CONTIGUOUS:
        start = s * tokens
        count = tl.zeros_like(s) + tokens
    else:
        start = _start(starts_ptr, s, sequences, tokens)
        count = tl.where(s < sequences, _start(starts_ptr, s + 1, sequences, tokens), tokens) - start
    return s, start, count, row


@triton.jit
def _visible(token, count, kv_len, capacity, causal, window):
    """First visible key of a token and the one behind the last."""
    end = tl.where(causal != 0, kv_len - count + token + 1, kv_len)
    begin = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    return begin, tl.minimum(tl.maximum(end, 0), capacity)


@triton.jit
def _cells(key, in_range, table_ptr, pages, SOURCE: tl.constexpr, MASKED: tl.constexpr):
    """Rows of the cache that hold the keys, int64, and which of them may be read."""
    if SOURCE == CONTIGUOUS:
        return key.to(tl.int64), in_range
    else:
        blocks, block_size, page_multiplier, page_shift = pages
        page = ((key.to(tl.int64) * page_multiplier) >> page_shift).to(tl.int32)  # key // block_size
        if MASKED:
            block = tl.load(table_ptr + page, mask=in_range, other=-1)
        else:
            block = tl.load(table_ptr + page)
        cell = block.to(tl.int64) * block_size + (key - page * block_size)
        return cell, in_range & (block >= 0) & (block < blocks)


@triton.jit
def _float32_scores(q_rows, k_rows, readable, head_dim, BLOCK_N: tl.constexpr):
    """Products of queries and keys, from pointers to their rows: no tensor core takes float32, and a thread has no
    registers for more than a part of head_dim."""
    PART: tl.constexpr = 32
    scores = tl.zeros((q_rows.shape[0], BLOCK_N), tl.float32)
    for i in tl.range(0, head_dim, PART, num_stages=1):
        d = i + tl.arange(0, PART)
        inside = (d < head_dim)[None, :]
        q = tl.load(q_rows[:, None] + d[None, :], mask=inside, other=0)
        k = tl.load(k_rows[:, None] + d[None, :], mask=readable[:, None] & inside, other=0)
        scores = tl.dot(q, tl.trans(k.to(tl.float32)), scores, input_precision="ieee")
    return scores


@triton.jit
def _cleaned(
    acc,
    v,
    key,
    begin,
    end,
    cell,
    readable,
    v_ptr,
    v_scale_ptr,
    key_stride,
    head_dim,
    SOURCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Values without those that are not finite, and sums that are NaN where a row sees one.

    That is rare, so it is done key by key: a product of what is seen with what is bad has no registers left.
    """
    if tl.sum(tl.sum(v.to(tl.float32) * 0, 1), 0) != 0:
        v = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), v, 0.0).to(v.dtype)
        d = tl.arange(0, BLOCK_D)
        for j in tl.range(tl.min(key, 0), tl.max(key, 0) + 1, num_stages=1):
            at = tl.sum(tl.where(readable & (key == j), cell + 1, 0), 0) - 1
            value = tl.load(v_ptr + at * key_stride + d, mask=(d < head_dim) & (at >= 0), other=0).to(tl.float32)
            if SOURCE == INT8_PAGES:
                value *= tl.load(v_scale_ptr + at * tl.num_programs(1), mask=at >= 0, other=0)
            sees = (j >= begin) & (j < end)
            acc = tl.where(sees[:, None] & ~(tl.abs(value) < float("inf"))[None, :], float("nan"), acc)
    return acc, v


@triton.jit
def _step(
    tile,
    q,
    acc,
    largest,
    total,
    view,
    caches,
    table_ptr,
    key_stride,
    pages,
    head_dim,
    scale,
    DTYPE: tl.constexpr,
    SOURCE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The rows' running maximum, sum and weighted values after one more tile of keys."""
    begin, end, low, high = view
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr = caches
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_range = (key >= low) & (key < high) if MASKED else tl.full((BLOCK_N,), True, tl.int1)
    cell, readable = _cells(key, in_range, table_ptr, pages, SOURCE, MASKED)
    place = (cell * key_stride)[:, None] + d[None, :]
    mask = readable[:, None] & (d < head_dim)[None, :]
    if DTYPE == tl.float32:
        scores = _float32_scores(q, k_ptr + cell * key_stride, readable, head_dim, BLOCK_N)
    else:
        k = tl.load(k_ptr + place, mask=mask, other=0)
        scores = tl.dot(q, tl.trans(k.to(DTYPE)))
    scores *= scale
    if SOURCE == INT8_PAGES:
        key_scale = tl.load(k_scale_ptr + cell * tl.num_programs(1), mask=readable, other=0)
        # A key of an infinite scale has elements of both signs, or NaN for a code of 0.
        scores *= tl.where(tl.abs(key_scale) < float("inf"), key_scale, float("nan"))[None, :]
    if MASKED:
        visible = readable[None, :] & (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        scores = tl.where(visible, scores, NOTHING)
    elif SOURCE != CONTIGUOUS:
        scores += tl.where(readable, 0.0, NOTHING)[None, :]
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    reference = tl.where(new_largest == NOTHING, 0.0, new_largest)
    weights = tl.exp2(scores - reference[:, None])
    kept = tl.exp2(largest - reference)
    total = total * kept + tl.sum(weights, 1)
    acc = acc * kept[:, None]
    v = tl.load(v_ptr + place, mask=mask, other=0)
    if SOURCE == INT8_PAGES:
        value_scale = tl.load(v_scale_ptr + cell * tl.num_programs(1), mask=readable, other=0)
        v = (v.to(tl.float32) * value_scale[:, None]).to(DTYPE)
    if MASKED:
        acc, v = _cleaned(
            acc, v, key, begin, end, cell, readable, v_ptr, v_scale_ptr, key_stride, head_dim, SOURCE, BLOCK_D
        )
    acc = tl.dot(weights.to(DTYPE), v, acc, input_precision="ieee")
    return acc, new_largest, total


@triton.jit(
    do_not_specialize=[
        "sequences",
        "tokens",
        "group",
        "capacity",
        "blocks",
        "block_size",
        "page_multiplier",
        "page_shift",
        "scale",
        "causal",
        "window",
        "tiles",
        "rows_above",
        "rows_up_to",
        "split_tiles",
    ]
)
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,  # fp32 [blocks, block_size, kv_heads], read for INT8_PAGES only; so is v_scale_ptr
    v_scale_ptr,
    tables_ptr,  # int32 [sequences, max_blocks], read for pages only
    starts_ptr,  # int32 [sequences + 1], read for pages only
    lens_ptr,  # int32 [sequences]
    out_ptr,  # [all tokens, heads, head_dim], written where there is one split
    partial_ptr,  # fp32 [slots, kv_heads, splits, BLOCK_M, head_dim], written where there are more
    statistics_ptr,  # fp32 [slots, kv_heads, splits, 2, BLOCK_M]: largest score and sum; -1 for a row without keys
    sequences,
    tokens,  # of each sequence, or of all in pages
    group,  # query heads of a KV head
    head_dim,
    capacity,  # keys that a sequence can have
    blocks,  # pages of the pool
    max_blocks,
    block_size,
    page_multiplier,
    page_shift,
    q_sequence_stride,
    q_token_stride,
    q_head_stride,
    sequence_stride,  # of the caches; 0 for pages
    head_stride,
    key_stride,
    scale,  # times log2(e): exponentials are powers of 2
    causal,
    window,
    tiles,  # slots of each sequence; 0 where they are searched
    rows_above,  # sequences with more rows than this and at most rows_up_to are served
    rows_up_to,
    split_tiles,  # the least tiles of keys that make a split
    DTYPE: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (slots, KV heads, splits of the keys)."""
    # The last rows of a causal prefill see most keys: they start first.
    slot, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    split, splits = tl.program_id(2), tl.num_programs(2)
    s, start, count, first_row = _rows_of(slot, starts_ptr, sequences, tokens, group, BLOCK_M, tiles, SOURCE)
    rows = count * group
    if (first_row < 0) | (first_row >= rows) | (rows <= rows_above) | (rows > rows_up_to):
        return
    kv_len = tl.maximum(tl.load(lens_ptr + s, mask=s < sequences, other=0), 0)
    row = first_row + tl.arange(0, BLOCK_M)
    used = tl.minimum(row, rows - 1)  # rows behind the last repeat it
    token, head, d = used // group, kv_head * group + used % group, tl.arange(0, BLOCK_D)
    in_rows = (row < rows)[:, None] & (d < head_dim)[None, :]
    begin, end = _visible(token, count, kv_len, capacity, causal, window)
    last_token = (tl.minimum(first_row + BLOCK_M, rows) - 1) // group
    low, first_end = _visible(first_row // group, count, kv_len, capacity, causal, window)
    last_begin, high = _visible(last_token, count, kv_len, capacity, causal, window)

    first_tile, end_tile = low // BLOCK_N, tl.cdiv(high, BLOCK_N)
    each = tl.maximum(tl.cdiv(tl.maximum(end_tile - first_tile, 0), splits), split_tiles)
    first_tile = first_tile + split * each
    end_tile = tl.maximum(tl.minimum(first_tile + each, end_tile), first_tile)
    # Between these every row sees every key.
    full = tl.minimum(tl.maximum(tl.cdiv(last_begin, BLOCK_N), first_tile), end_tile)
    full_end = tl.minimum(tl.maximum(first_end // BLOCK_N, full), end_tile)

    place = ((slot.to(tl.int64) * tl.num_programs(1) + kv_head) * splits + split) * BLOCK_M
    statistics_ptr += 2 * place + tl.arange(0, BLOCK_M)
    if (splits > 1) & (first_tile == end_tile):
        tl.store(statistics_ptr, tl.zeros((BLOCK_M,), tl.float32) + NOTHING)
        tl.store(statistics_ptr + BLOCK_M, tl.zeros((BLOCK_M,), tl.float32) - 1)
        return

    q_row = tl.cast(s, tl.int64) * q_sequence_stride
    if SOURCE != CONTIGUOUS:
        q_row = tl.cast(start, tl.int64) * q_token_stride
    q_rows = q_row + token.to(tl.int64) * q_token_stride + head.to(tl.int64) * q_head_stride
    if DTYPE == tl.float32:
        q = q_ptr + q_rows
    else:
        q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=in_rows, other=0)
    base = tl.cast(s, tl.int64) * sequence_stride + tl.cast(kv_head, tl.int64) * head_stride
    table_ptr = tables_ptr + tl.cast(s, tl.int64) * max_blocks
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    largest = tl.zeros((BLOCK_M,), tl.float32) + NOTHING
    total = tl.zeros((BLOCK_M,), tl.float32)
    view, pages = (begin, end, low, high), (blocks, block_size, page_multiplier, page_shift)
    caches = (k_ptr + base, v_ptr + base, k_scale_ptr + kv_head, v_scale_ptr + kv_head)
    for tile in range(full, full_end):
        acc, largest, total = _step(
            tile, q, acc, largest, total, view, caches, table_ptr, key_stride, pages, head_dim, scale,
            DTYPE, SOURCE, False, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for i in tl.range(end_tile - first_tile - (full_end - full), num_stages=1):
        tile = first_tile + i + tl.where(first_tile + i < full, 0, full_end - full)
        acc, largest, total = _step(
            tile, q, acc, largest, total, view, caches, table_ptr, key_stride, pages, head_dim, scale,
            DTYPE, SOURCE, True, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    saw = begin < end
    if SOURCE != CONTIGUOUS:
        # A row without a score may have seen only minus infinity or NaN, or only blocks outside the pool.
        saw = saw & (largest > NOTHING)
        if tl.min(saw.to(tl.int32), 0) == 0:
            for tile in tl.range(first_tile, end_tile, num_stages=1):
                key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
                in_range = (key >= low) & (key < high)
                _, readable = _cells(key, in_range, table_ptr, pages, SOURCE, True)
                visible = readable[None, :] & (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
                saw = saw | (tl.max(visible.to(tl.int32), 1) > 0)
    if splits == 1:
        out_row = (tl.cast(start, tl.int64) + token) * (tl.num_programs(1) * group) + head
        out = tl.where(saw[:, None], acc / total[:, None], 0.0).to(DTYPE)
        tl.store(out_ptr + out_row[:, None] * head_dim + d[None, :], out, mask=in_rows)
    else:
        partial_row = place + tl.arange(0, BLOCK_M)
        tl.store(partial_ptr + partial_row[:, None] * head_dim + d[None, :], acc, mask=in_rows)
        tl.store(statistics_ptr, largest)
        tl.store(statistics_ptr + BLOCK_M, tl.where(saw, total, -1.0))


@triton.jit(
    do_not_specialize=["sequences", "tokens", "group", "block_m", "splits", "tiles", "rows_above", "rows_up_to"]
)
def attention_merge_kernel(
    partial_ptr,
    statistics_ptr,
    starts_ptr,
    out_ptr,
    sequences,
    tokens,
    group,
    head_dim,
    block_m,
    splits,
    tiles,
    rows_above,
    rows_up_to,
    DTYPE: tl.constexpr,
    SOURCE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row's splits, always added in the same order. Grid: (slots, KV heads, block_m rows of parts of head_dim)."""
    slot, kv_head, parts = tl.program_id(0), tl.program_id(1), tl.cdiv(head_dim, BLOCK_D)
    _, start, count, first_row = _rows_of(slot, starts_ptr, sequences, tokens, group, block_m, tiles, SOURCE)
    r = tl.program_id(2) // parts
    rows, row = count * group, first_row + r
    if (first_row < 0) | (row >= rows) | (rows <= rows_above) | (rows > rows_up_to):
        return
    i, d = tl.arange(0, MAX_SPLITS), tl.program_id(2) % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    place = ((slot.to(tl.int64) * tl.num_programs(1) + kv_head) * splits + i) * block_m + r
    statistic = statistics_ptr + 2 * place - r
    largest = tl.load(statistic, mask=i < splits, other=NOTHING)
    total = tl.load(statistic + block_m, mask=i < splits, other=-1)
    saw = ~(total < 0)  # a sum may be NaN
    reference = tl.max(largest, 0)
    reference = tl.where(reference == NOTHING, 0.0, reference)
    weight = tl.where(saw, tl.exp2(largest - reference), 0.0)
    inside = saw[:, None] & (d < head_dim)[None, :]
    partial = tl.load(partial_ptr + place[:, None] * head_dim + d[None, :], mask=inside, other=0)
    out = tl.sum(weight[:, None] * partial, 0) / tl.sum(tl.where(saw, weight * total, 0.0), 0)
    out = tl.where(tl.max(saw.to(tl.int32), 0) > 0, out, 0.0)
    out_row = (tl.cast(start, tl.int64) + row // group) * (tl.num_programs(1) * group) + kv_head * group + row % group
    tl.store(out_ptr + out_row * head_dim + d, out.to(DTYPE), mask=d < head_dim)
