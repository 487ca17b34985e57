"""Kernels for GPTQ words as they lie in a checkpoint. Layout: `ferrum_ops.formats.gptq`.

Codes are packed along K. A period is the 8 codes (4 of 8 bits) that begin in one word of a column: a word of 4 or 8
bits, half of one for 2, three bytes for 3 bits. Unpacking a tile `[16 periods, BLOCK_N]` would move every code to
another row. Instead code j of all 16 periods is one plane, a `[16, BLOCK_N]` tile that no thread has to exchange,
multiplied by the 16 activations `x[:, 8 * period + j]`: the sum over k is the sum over planes. Codes become numbers in
the registers that they are multiplied from.

Where a tile lies within one group, `code - zero` is multiplied, exact in float16 and bfloat16 alike, and the group's
scale meets the fp32 sum. Otherwise (act-order, groups smaller than a tile) each weight is scaled in fp32 and rounded to
tf32: the precision of float16 without its overflow and underflow. float32 activations are multiplied in fp32.
"""

# mypy: allow-untyped-defs
# No `from __future__ import annotations` here: Triton's interpreter reads the annotations of kernels.
import triton
import triton.language as tl

#: Periods of a tile: the least K of a tensor-core product.
PERIODS = tl.constexpr(16)
#: Where a weight's group comes from: the tile, the period of codes, g_idx.
ONE_PER_TILE, ONE_PER_PERIOD, FROM_G_IDX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _periods(qweight_ptr, row, n, mask, out_features, BITS: tl.constexpr):
    """Words of the periods `row` [rows, 1] of columns n [1, columns], codes in the low bits."""
    if BITS == 3:
        shift = 24 * row % 32
        crosses = shift > 8
        low = tl.load(qweight_ptr + row * 3 // 4 * out_features + n, mask=mask, other=0)
        high = tl.load(qweight_ptr + (row * 3 // 4 + 1) * out_features + n, mask=mask & crosses, other=0)
        return _joined(low, high, shift, crosses)
    elif BITS == 2:
        return tl.load(qweight_ptr + row // 2 * out_features + n, mask=mask, other=0) >> row % 2 * 16
    else:
        return tl.load(qweight_ptr + row * out_features + n, mask=mask, other=0)


@triton.jit
def _joined(low, high, shift, crosses):
    """The bits from `shift` of `low` on, followed by those of `high` where the field crosses into it."""
    kept = (32 - shift) & 31
    return tl.where(crosses, ((low >> shift) & ((1 << kept) - 1)) | (high << kept), low >> shift)


@triton.jit
def _zero(row_ptr, n, mask, zero_offset, BITS: tl.constexpr):
    """Zero points of the columns n, from the words of their group; `formats.gptq.decode_zeros` has the arithmetic."""
    MASK: tl.constexpr = (1 << BITS) - 1
    if BITS == 3:
        shift = 3 * n % 32
        crosses = shift > 29
        low = tl.load(row_ptr + 3 * n // 32, mask=mask, other=0)
        high = tl.load(row_ptr + 3 * n // 32 + 1, mask=mask & crosses, other=0)
        return (_joined(low, high, shift, crosses) + zero_offset) & MASK
    else:
        PER_WORD: tl.constexpr = 32 // BITS
        ONES: tl.constexpr = 0xFFFFFFFF // MASK  # a one in every field
        word = tl.load(row_ptr + n // PER_WORD, mask=mask, other=0)
        word = tl.add(word, zero_offset * ONES, sanitize_overflow=False)
        return (word >> (n % PER_WORD * BITS)) & MASK


@triton.jit
def _centred(code, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """`code - zero`, exact in DTYPE.

    Each becomes the low bits of the mantissa of 2^10, 2^7 or 2^23, which costs one `or`; a conversion of integers runs
    at a fraction of that rate.
    """
    if DTYPE == tl.float16:
        code = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        zero = (zero | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    elif DTYPE == tl.bfloat16 and BITS < 8:
        code = (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        zero = (zero | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        code = (code | 0x4B000000).to(tl.float32, bitcast=True)
        zero = (zero | 0x4B000000).to(tl.float32, bitcast=True)
    return (code - zero).to(DTYPE)


@triton.jit
def _activations(words, i: tl.constexpr, DTYPE: tl.constexpr):
    """Activation i of each 32-bit word of x."""
    if DTYPE == tl.float32:
        return words.to(tl.float32, bitcast=True)
    else:
        return (words >> 16 * i).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _weight(code, scales_ptr, qzeros_ptr, group, n, mask, out_features, zero_words, zero_offset, BITS: tl.constexpr):
    """`(code - zero) * scale` in fp32 for a tile whose rows have the groups `group`; 0 where the mask is off."""
    scale = tl.load(scales_ptr + group[:, None] * out_features + n[None, :], mask=mask, other=0).to(tl.float32)
    zero = _zero(qzeros_ptr + group[:, None] * zero_words, n[None, :], mask, zero_offset, BITS)
    return _centred(code, zero, BITS, tl.float32) * scale


@triton.jit
def _multiplied(x, weight, sums, DTYPE: tl.constexpr):
    """`sums + x @ weight` for fp32 weights: as tf32, or in fp32 where x is float32."""
    if DTYPE == tl.float32:
        return tl.dot(x, weight, sums, input_precision="ieee")
    else:
        # Tensor cores drop the low 13 bits; the rounding is to nearest. A NaN must not be carried into the sign.
        nearest = tl.add(weight.to(tl.int32, bitcast=True), 0x1000, sanitize_overflow=False) & ~0x1FFF
        weight = tl.where(weight == weight, nearest.to(tl.float32, bitcast=True), weight)
        return tl.dot(x.to(tl.float32), weight, sums, input_precision="tf32")


@triton.jit
def _add_tile(
    sums,  # fp32 [rows, columns] of the result's tile
    tile,  # along K
    x_rows,  # pointers [rows, 1] to words of x
    in_rows,
    n,  # columns
    in_columns,
    qweight_ptr,
    qzeros_ptr,
    scales_ptr,
    g_idx_ptr,
    periods,
    out_features,
    groups,
    group_size,
    zero_words,
    zero_offset,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """`sums` and one tile of K more."""
    PLANES: tl.constexpr = 4 if BITS == 8 else 8
    MASK: tl.constexpr = (1 << BITS) - 1
    PACKED: tl.constexpr = 1 if DTYPE == tl.float32 else 2
    period = tile * PERIODS + tl.arange(0, PERIODS)
    in_tile = (period < periods)[:, None] & in_columns[None, :]
    in_x = in_rows[:, None] & (period < periods)[None, :]
    base = qweight_ptr + tl.cast(tile, tl.int64) * (PERIODS * PLANES * BITS // 32) * out_features
    words = _periods(base, tl.arange(0, PERIODS)[:, None], n[None, :], in_tile, out_features, BITS)
    partial = sums
    scale = tl.zeros_like(n).to(tl.float32)
    zero = tl.zeros_like(n)
    if GROUPS == ONE_PER_TILE:
        partial = tl.zeros_like(sums)
        group = tile * (PERIODS * PLANES) // group_size
        scale = tl.load(scales_ptr + group * out_features + n, mask=in_columns, other=0).to(tl.float32)
        zero = _zero(qzeros_ptr + group * zero_words, n, in_columns, zero_offset, BITS)
    for i in tl.static_range(PLANES // PACKED):
        x_words = tl.load(x_rows + (period * (PLANES // PACKED) + i)[None, :], mask=in_x, other=0)
        for lane in tl.static_range(PACKED):
            x = _activations(x_words, lane, DTYPE)
            code = (words >> BITS * (i * PACKED + lane)) & MASK
            if GROUPS == ONE_PER_TILE:
                weight = _centred(code, zero[None, :], BITS, DTYPE)
                partial = tl.dot(x, weight, partial, input_precision="ieee")
            else:
                known = period < periods
                if GROUPS == ONE_PER_PERIOD:
                    group = period * PLANES // group_size
                else:
                    k = period * PLANES + i * PACKED + lane
                    group = tl.load(g_idx_ptr + k, mask=known, other=0)
                    known = (group >= 0) & (group < groups)
                weight = _weight(
                    code,
                    scales_ptr,
                    qzeros_ptr,
                    group,
                    n,
                    in_tile & known[:, None],
                    out_features,
                    zero_words,
                    zero_offset,
                    BITS,
                )
                weight = tl.where(known[:, None] | ~in_tile, weight, float("nan"))
                partial = _multiplied(x, weight, partial, DTYPE)
    return sums + partial * scale[None, :] if GROUPS == ONE_PER_TILE else partial


@triton.jit(do_not_specialize=["rows", "periods", "groups", "group_size", "zero_offset", "bias_size", "split_tiles"])
def gptq_gemm_kernel(
    x_ptr,  # int32 [rows, x_stride]: words of two 16-bit activations or of one float32
    qweight_ptr,  # int32 [periods * words per period, out_features]
    qzeros_ptr,  # int32 [groups, zero_words]
    scales_ptr,  # [groups, out_features]
    g_idx_ptr,  # int32 [K], read for FROM_G_IDX only
    bias_ptr,  # [bias_size]; bias_size is out_features, or 0 without bias
    out_ptr,  # [rows, out_features], written where there is one split
    partial_ptr,  # fp32 [splits, rows, out_features], written where there are more
    rows,
    x_stride,
    periods,
    out_features,
    groups,
    group_size,
    zero_words,
    zero_offset,
    bias_size,
    split_tiles,  # tiles along K of each split
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (tiles of the result, those of one column of tiles next to each other; splits of K)."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = m < rows, n < out_features
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(1) * split_tiles
    for tile in range(first, tl.minimum(first + split_tiles, tl.cdiv(periods, PERIODS))):
        sums = _add_tile(
            sums,
            tile,
            x_rows,
            in_rows,
            n,
            in_columns,
            qweight_ptr,
            qzeros_ptr,
            scales_ptr,
            g_idx_ptr,
            periods,
            out_features,
            groups,
            group_size,
            zero_words,
            zero_offset,
            DTYPE,
            BITS,
            GROUPS,
        )
    place = m.to(tl.int64)[:, None] * out_features + n[None, :]
    in_out = in_rows[:, None] & in_columns[None, :]
    if tl.num_programs(1) == 1:
        bias = tl.load(bias_ptr + n, mask=n < bias_size, other=0).to(tl.float32)
        tl.store(out_ptr + place, (sums + bias[None, :]).to(DTYPE), mask=in_out)
    else:
        split = tl.program_id(1).to(tl.int64) * rows * out_features
        tl.store(partial_ptr + split + place, sums, mask=in_out)


@triton.jit(
    do_not_specialize=[
        *("rows", "top_k", "block_size", "entries", "experts", "periods", "groups", "group_size", "zero_offset"),
        *("g_idx_stride", "bias_size", "weighted", "split_tiles"),
    ]
)
def gptq_moe_gemm_kernel(
    x_ptr,  # int32 [rows / top_k, x_stride]: words of two 16-bit activations or of one float32
    qweight_ptr,  # int32 [experts, periods * words per period, out_features]
    qzeros_ptr,  # int32 [experts, groups, zero_words]
    scales_ptr,  # [experts, groups, out_features]
    g_idx_ptr,  # int32 [K] of each expert, read for FROM_G_IDX only
    bias_ptr,  # [experts, bias_size]; bias_size is out_features, or 0 without bias
    sorted_ptr,  # int32 [entries]: rows of the result
    block_ids_ptr,  # int32: the expert of each block of entries
    total_ptr,  # int32 [1]: entries in use
    weights_ptr,  # fp32 [rows], read where weighted
    out_ptr,  # [rows, out_features], zeros, written where there is one split
    partial_ptr,  # fp32 [splits, rows, out_features], zeros, written where there are more
    rows,
    top_k,
    block_size,
    entries,
    experts,
    x_stride,
    periods,
    out_features,
    groups,
    group_size,
    zero_words,
    zero_offset,
    g_idx_stride,  # K, or 0 where all experts share it
    bias_size,
    weighted,
    split_tiles,  # tiles along K of each split
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (blocks of entries, each in parts of BLOCK_M; tiles of columns; splits of K)."""
    PLANES: tl.constexpr = 4 if BITS == 8 else 8
    parts = tl.cdiv(block_size, BLOCK_M)
    block = tl.program_id(0) // parts
    m = tl.program_id(0) % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.minimum(tl.load(total_ptr), entries)
    entry = block * block_size + m
    row = tl.load(sorted_ptr + entry, mask=(m < block_size) & (entry < total), other=-1)
    expert = tl.load(block_ids_ptr + block)
    known = (expert >= 0) & (expert < experts)
    expert = tl.where(known, expert, 0).to(tl.int64)
    row = tl.where(known & (row < rows), row, -1)
    in_rows, in_columns = row >= 0, n < out_features
    x_rows = x_ptr + (tl.maximum(row, 0) // top_k).to(tl.int64)[:, None] * x_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(2) * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(periods, PERIODS))
    # A block that is not in use, or has no expert, has nothing to sum.
    for tile in range(first, tl.where(known & (block * block_size < total), last, first)):
        sums = _add_tile(
            sums,
            tile,
            x_rows,
            in_rows,
            n,
            in_columns,
            qweight_ptr + expert * (periods * PLANES * BITS // 32) * out_features,
            qzeros_ptr + expert * groups * zero_words,
            scales_ptr + expert * groups * out_features,
            g_idx_ptr + expert * g_idx_stride,
            periods,
            out_features,
            groups,
            group_size,
            zero_words,
            zero_offset,
            DTYPE,
            BITS,
            GROUPS,
        )
    bias_size = tl.where(tl.program_id(2) == 0, bias_size, 0)  # of the first split
    bias = tl.load(bias_ptr + expert * out_features + n, mask=n < bias_size, other=0).to(tl.float32)
    weight = tl.load(weights_ptr + row, mask=in_rows & (weighted != 0), other=1)
    sums = (sums + bias[None, :]) * weight[:, None]
    place = tl.where(in_rows, row, 0).to(tl.int64)[:, None] * out_features + n[None, :]
    in_out = in_rows[:, None] & in_columns[None, :]
    if tl.num_programs(2) == 1:
        tl.store(out_ptr + place, sums.to(DTYPE), mask=in_out)
    else:
        split = tl.program_id(2).to(tl.int64) * rows * out_features
        tl.store(partial_ptr + split + place, sums, mask=in_out)


@triton.jit(do_not_specialize=["rows", "bias_size", "splits"])
def gptq_reduce_kernel(
    partial_ptr, bias_ptr, out_ptr, rows, out_features, bias_size, splits, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """The splits' sums, always in the same order, plus the bias, rounded once."""
    size = rows.to(tl.int64) * out_features
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = (place % out_features).to(tl.int32)
    inside = place < size
    sums = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        sums += tl.load(partial_ptr + split * size + place, mask=inside, other=0)
    sums += tl.load(bias_ptr + column, mask=inside & (column < bias_size), other=0).to(tl.float32)
    tl.store(out_ptr + place, sums.to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=["periods", "groups", "group_size", "zero_offset"])
def gptq_dequantize_kernel(
    qweight_ptr,
    qzeros_ptr,
    scales_ptr,
    g_idx_ptr,
    out_ptr,  # [K, out_features]
    periods,
    out_features,
    groups,
    group_size,
    zero_words,
    zero_offset,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    HAS_G_IDX: tl.constexpr,
    BLOCK_PERIODS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (tiles of columns, tiles of periods)."""
    PLANES: tl.constexpr = 4 if BITS == 8 else 8
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_PERIODS
    period = first + tl.arange(0, BLOCK_PERIODS)
    inside = (period < periods)[:, None] & (n < out_features)[None, :]
    base = qweight_ptr + first.to(tl.int64) * PLANES * BITS // 32 * out_features
    words = _periods(base, tl.arange(0, BLOCK_PERIODS)[:, None], n[None, :], inside, out_features, BITS)
    for j in tl.static_range(PLANES):
        k = period * PLANES + j
        group = k // group_size
        if HAS_G_IDX:
            group = tl.load(g_idx_ptr + k, mask=period < periods, other=0)
        known = (group >= 0) & (group < groups)
        code = (words >> BITS * j) & ((1 << BITS) - 1)
        weight = _weight(
            code,
            scales_ptr,
            qzeros_ptr,
            group,
            n,
            inside & known[:, None],
            out_features,
            zero_words,
            zero_offset,
            BITS,
        )
        weight = tl.where(known[:, None], weight, float("nan")).to(DTYPE)
        tl.store(out_ptr + k.to(tl.int64)[:, None] * out_features + n[None, :], weight, mask=inside)
