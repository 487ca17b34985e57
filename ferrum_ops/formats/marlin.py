"""The Marlin tile layout of GPTQ codes, scales and zero points. Pure torch, any device, exact inverses.

K in-features (a multiple of 16), N out-features (a multiple of 64), b bits (4 or 8). Weights are cut into
tiles of 16 rows and 16 columns, all tiles of 16 rows after one another; four neighbouring tiles are a 16 x 64
unit that 32 lanes read with one load each. Lane i holds columns i//4 and i//4 + 8 of every tile of its unit,
rows 2(i%4) + {0, 1, 8, 9}: the B fragment of `mma.m16n8k16`. The eight codes of a lane and tile follow each
other, column i//4 first; inside a word they are reordered [0, 2, 4, 6, 1, 3, 5, 7] (four bits, one word) or
[0, 2, 1, 3] (eight bits, two words), so that masking a word leaves a pair of neighbouring rows in its two
halves. Codes are unsigned, as GPTQ stores them.

Written as bits, row `8h + 2q + l` of its tile, column `8c' + c` of tile j of unit u lies at

    [row tile, u, c, q, j, l, c', h]    4 bits (h varies fastest)
    [row tile, u, c, q, j, c', l, h]    8 bits

Source: the weight permutation of IST-DASLab/marlin; its 8-bit form is the `get_weight_perm(8)` of vLLM's
gptq_marlin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ferrum_ops.formats import gptq

SUPPORTED_BITS = (4, 8)
TILE_ROWS = 16
UNIT_COLUMNS = 64
#: Columns of gate that stand before the same columns of up in an interleaved matrix.
GATE_RUN = 8

# Words seen as axes [experts, row tile, q, u, j, (c',) c] and the order in which they lie.
_WORD_ORDER = {4: (0, 1, 3, 5, 2, 4), 8: (0, 1, 3, 6, 2, 4, 5)}


def check_sizes(op: str, packed_rows: int, out_features: int, bits: int) -> None:
    """Raise ValueError for bits or sizes the layout does not have."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"[{op}] bits: expected one of {SUPPORTED_BITS}, got {bits}")
    if packed_rows % TILE_ROWS:
        raise ValueError(f"[{op}] in_features: expected a multiple of {TILE_ROWS} rows, got {packed_rows}")
    if out_features % UNIT_COLUMNS:
        raise ValueError(f"[{op}] out_features: expected a multiple of {UNIT_COLUMNS}, got {out_features}")


def describe(tensor: torch.Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_words(op: str, name: str, words: torch.Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless `words` is int32 of `shape`, alone or one per expert."""
    if words.dtype != torch.int32 or words.dim() not in (2, 3) or words.shape[-2:] != shape:
        expected = f"int32 {shape} or (E, {shape[0]}, {shape[1]})"
        raise ValueError(f"[{op}] {name}: expected {expected}, got {describe(words)}")


def check_perm(op: str, perm: torch.Tensor | None, experts: tuple[int, ...]) -> None:
    """Raise ValueError unless `perm` is int32 `[*experts, packed rows]`."""
    if perm is not None and (perm.dtype != torch.int32 or perm.shape[:-1] != experts or perm.dim() == 0):
        shape = ", ".join((*map(str, experts), "rows"))
        raise ValueError(f"[{op}] perm: expected int32 ({shape}), got {describe(perm)}")


def check_perm_values(op: str, perm: torch.Tensor, in_features: int) -> None:
    """Raise ValueError unless every row of `[0, in_features)` occurs once, besides -1. Reads the values."""
    rows = perm.reshape(-1, perm.shape[-1]).sort(-1).values
    first = perm.shape[-1] - in_features
    expected = torch.arange(in_features, device=perm.device, dtype=perm.dtype)
    if first < 0 or not (rows[:, :first] == -1).all() or not (rows[:, first:] == expected).all():
        raise ValueError(
            f"[{op}] perm: expected every row of [0, {in_features}) once and -1 for padding, "
            f"got other values in {tuple(perm.shape)}"
        )


def _row_index(perm: torch.Tensor, per_expert: int) -> torch.Tensor:
    """`perm` of a stack as indices into its rows flattened, `[experts * packed rows]`."""
    experts = perm.shape[:-1].numel()
    start = torch.arange(experts, device=perm.device).unsqueeze(-1) * per_expert
    return (perm.long().view(experts, perm.shape[-1]) + start).flatten()


def _fields(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Views of `codes` by their place in a word, lowest first; each has one element per word."""
    experts, rows, columns = codes.shape[:-2].numel(), codes.shape[-2], codes.shape[-1]
    axes = codes.view(experts, rows // TILE_ROWS, 2, 4, 2, columns // UNIT_COLUMNS, 4, 2, 8)  # h, q, l, u, j, c', c
    if bits == 8:
        return [axes[:, :, h, :, l] for l in (0, 1) for h in (0, 1)]
    return [axes[:, :, h, :, l, :, :, half] for l in (0, 1) for half in (0, 1) for h in (0, 1)]


def _tile(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 `[..., K, N]` -> words int32 `[..., K/16, N*bits/2]`."""
    fields = _fields(codes.contiguous(), bits)
    words = fields[0].to(torch.int32)
    for place, field in enumerate(fields[1:], start=1):
        words |= field.to(torch.int32) << (bits * place)
    shape = (*codes.shape[:-2], codes.shape[-2] // TILE_ROWS, codes.shape[-1] * bits // 2)
    return words.permute(_WORD_ORDER[bits]).reshape(shape)


def _untile(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `_tile`."""
    rows, columns = words.shape[-2] * TILE_ROWS, words.shape[-1] * 2 // bits
    codes = torch.empty((*words.shape[:-2], rows, columns), dtype=torch.uint8, device=words.device)
    fields = _fields(codes, bits)
    order = _WORD_ORDER[bits]
    packed = words.reshape([fields[0].shape[axis] for axis in order])
    axes = packed.permute([order.index(axis) for axis in range(len(order))])
    for place, field in enumerate(fields):
        field.copy_((axes >> (bits * place)) & (2**bits - 1))
    return codes


def repack(
    qweight: torch.Tensor,
    perm: torch.Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    op: str = "marlin_repack",
) -> torch.Tensor:
    """GPTQ words `int32 [..., K*bits/32, N]` to Marlin words `int32 [..., packed rows/16, N*bits/2]`.

    Packed row j is row `perm[j]` (j without a perm); a -1 in perm is a padding row of codes `2**(bits - 1)`,
    the zero point of symmetric weights. Raises ValueError for what does not fit; on a device the values of
    perm are not looked at, and one outside `[0, in_features)` makes a padding row.
    """
    packed_rows = in_features if perm is None else perm.shape[-1]
    check_sizes(op, packed_rows, out_features, bits)
    if in_features * bits % 32:
        raise ValueError(f"[{op}] in_features: expected a multiple of {32 // bits}, got {in_features}")
    check_words(op, "qweight", qweight, (in_features * bits // 32, out_features))
    check_perm(op, perm, qweight.shape[:-2])
    codes, experts = gptq.unpack_rows(qweight, bits), qweight.shape[:-2].numel()
    if perm is not None:
        if perm.device.type == "cpu":
            check_perm_values(op, perm, in_features)
        padding = (perm < 0) | (perm >= in_features)
        index = _row_index(perm.clamp(0, max(in_features - 1, 0)), in_features)
        rows = codes.reshape(experts * in_features, out_features)
        rows = rows[index] if in_features else rows.new_empty(index.numel(), out_features)
        codes = rows.view(*perm.shape, out_features).masked_fill(padding.unsqueeze(-1), 2 ** (bits - 1))
    return _tile(codes, bits)


def unpack(
    packed: torch.Tensor,
    perm: torch.Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    op: str = "marlin_unpack",
) -> torch.Tensor:
    """Inverse of `repack`: the GPTQ words `int32 [..., K*bits/32, N]`, rows in their old order and
    without padding rows."""
    packed_rows = in_features if perm is None else perm.shape[-1]
    check_sizes(op, packed_rows, out_features, bits)
    check_words(op, "packed", packed, (packed_rows // TILE_ROWS, out_features * bits // 2))
    check_perm(op, perm, packed.shape[:-2])
    codes, experts = _untile(packed, bits), packed.shape[:-2].numel()
    if perm is not None:
        if perm.device.type == "cpu":
            check_perm_values(op, perm, in_features)
        # One row more per expert takes the padding.
        inside = (perm >= 0) & (perm < in_features)
        index = _row_index(torch.where(inside, perm, in_features), in_features + 1)
        rows = codes.new_zeros(experts * (in_features + 1), out_features)
        rows[index] = codes.reshape(experts * packed_rows, out_features)
        codes = rows.view(*perm.shape[:-1], in_features + 1, out_features)[..., :in_features, :]
    return gptq.pack_rows(codes, bits)


def _scale_axes(
    op: str, scales: torch.Tensor, in_features: int, group_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How a run of scales is seen as axes, and their order in the packed run.

    With several groups a run of 64 is an 8 x 8 transpose: a lane reads the scales of its 8 columns of a unit
    at once. With one group the scales are applied to the accumulators, whose lanes hold columns
    2(i%4) + {0, 1} of every 8: runs of 32.
    """
    groups = gptq.num_groups(in_features, group_size)
    if scales.dim() not in (2, 3) or scales.shape[-2] != groups or not scales.is_floating_point():
        expected = f"floating ({groups}, N) or (E, {groups}, N)"
        raise ValueError(f"[{op}] scales: expected {expected}, got {describe(scales)}")
    if scales.shape[-1] % UNIT_COLUMNS:
        raise ValueError(f"[{op}] scales: expected N in multiples of {UNIT_COLUMNS}, got {describe(scales)}")
    return ((8, 8), (1, 0)) if groups > 1 else ((4, 4, 2), (1, 0, 2))


def _permute_runs(values: torch.Tensor, sizes: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    # The copy is explicit: a reshape of an empty tensor would hand out the input itself.
    runs = values.unflatten(-1, (-1, *sizes) if values.shape[-1] else (0, *sizes))
    lead = runs.dim() - len(sizes)
    axes = (*range(lead), *(lead + a for a in order))
    return runs.permute(axes).clone(memory_format=torch.contiguous_format).view(values.shape)


def permute_scales(
    scales: torch.Tensor, in_features: int, group_size: int, op: str = "marlin_permute_scales"
) -> torch.Tensor:
    """Scales `[..., G, N]` in the order Marlin's lanes read them; which order depends on whether G is 1."""
    return _permute_runs(scales, *_scale_axes(op, scales, in_features, group_size))


def unpermute_scales(
    scales: torch.Tensor, in_features: int, group_size: int, op: str = "marlin_unpermute_scales"
) -> torch.Tensor:
    """Inverse of `permute_scales`."""
    sizes, order = _scale_axes(op, scales, in_features, group_size)
    inverse = tuple(order.index(a) for a in range(len(order)))
    return _permute_runs(scales, tuple(sizes[a] for a in order), inverse)


def pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points `uint8 [..., G, N]` to Marlin's `int32 [..., G, N*bits/32]`.

    They lie in the order of grouped scales (for any G), and within a word in the order of codes.
    """
    check_sizes("marlin", 0, zeros.shape[-1], bits)
    permuted = _permute_runs(zeros, (8, 8), (1, 0))
    return gptq.pack_columns(_permute_runs(permuted, (4, 2) if bits == 4 else (2, 2), (1, 0)), bits)


def unpack_zeros(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack_zeros`."""
    columns = qzeros.shape[-1] * 32 // bits
    check_sizes("marlin", 0, columns, bits)
    ordered = gptq.unpack_columns(qzeros, bits, columns)
    permuted = _permute_runs(ordered, (2, 4) if bits == 4 else (2, 2), (1, 0))
    return _permute_runs(permuted, (8, 8), (1, 0))


def repack_zeros(
    qzeros: torch.Tensor, out_features: int, bits: int, zero_offset: int, op: str = "marlin_repack_zeros"
) -> torch.Tensor:
    """GPTQ zero words `int32 [..., G, N*bits/32]` to Marlin's, same shape.

    zero_offset is 1 where qzeros hold `zero - 1` ("gptq"), 0 where they hold the zero point ("gptq_v2"); Marlin's words
    hold the zero point itself. Raises ValueError for sizes, bits, shapes or dtypes that do not fit.
    """
    check_sizes(op, 0, out_features, bits)
    return pack_zeros(
        gptq.decode_zeros(
            _zero_words(op, qzeros, out_features, bits), bits, out_features, _zero_format(op, zero_offset)
        ),
        bits,
    )


def restore_zeros(
    zeros: torch.Tensor, out_features: int, bits: int, zero_offset: int, op: str = "marlin"
) -> torch.Tensor:
    """Inverse of `repack_zeros`, same arguments: the GPTQ zero words."""
    check_sizes(op, 0, out_features, bits)
    codes = unpack_zeros(_zero_words(op, zeros, out_features, bits), bits)
    return gptq.encode_zeros(codes, bits, _zero_format(op, zero_offset))


def _zero_words(op: str, words: torch.Tensor, out_features: int, bits: int) -> torch.Tensor:
    if words.dtype != torch.int32 or words.dim() not in (2, 3) or words.shape[-1] != out_features * bits // 32:
        columns = out_features * bits // 32
        expected = f"int32 (G, {columns}) or (E, G, {columns})"
        raise ValueError(f"[{op}] qzeros: expected {expected}, got {describe(words)}")
    return words


def _zero_format(op: str, zero_offset: int) -> str:
    if zero_offset not in (0, 1):
        raise ValueError(f"[{op}] zero_offset: expected 0 or 1, got {zero_offset}")
    return "gptq" if zero_offset else "gptq_v2"


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    bits: int,
    dtype: torch.dtype = torch.float32,
    op: str = "marlin",
) -> torch.Tensor:
    """Weights `[..., packed rows, N]` of a matrix or a stack, rows in their packed order: `(code - zero) * scale`.

    Args:
        packed: int32 `[..., packed rows/16, N*bits/2]`, from `repack`.
        scales: floating `[..., G, N]`, from `permute_scales`; packed row j is of group `j // group_size`.
        zeros: int32 `[..., G, N*bits/32]`, from `repack_zeros`; None: `2**(bits - 1)`.
        group_size: -1 for one group.
        dtype: of the result and of the arithmetic.

    Raises ValueError for sizes, bits, shapes or dtypes that do not fit.
    """
    rows, columns = packed.shape[-2] * TILE_ROWS, packed.shape[-1] * 2 // bits
    check_sizes(op, rows, columns, bits)
    check_words(op, "packed", packed, (rows // TILE_ROWS, columns * bits // 2))
    zeros_shape = (*packed.shape[:-2], gptq.num_groups(rows, group_size), columns * bits // 32)
    if zeros is not None and (zeros.dtype != torch.int32 or zeros.shape != zeros_shape):
        raise ValueError(f"[{op}] zeros: expected int32 {zeros_shape}, got {describe(zeros)}")
    group = torch.arange(rows, device=packed.device) // max(gptq.effective_group_size(rows, group_size), 1)
    scale = unpermute_scales(scales, rows, group_size, op).to(dtype)[..., group, :]
    codes = _untile(packed, bits).to(dtype)
    zero = 2 ** (bits - 1) if zeros is None else unpack_zeros(zeros, bits).to(dtype)[..., group, :]
    return (codes - zero) * scale


def check_dense(
    op: str,
    packed: torch.Tensor,
    perm: torch.Tensor | None,
    expert_offsets: torch.Tensor | None,
    bits: int,
    interleaved: bool,
    out: torch.Tensor,
) -> None:
    """Raise ValueError unless `out` can take the weights of `packed` (`dequantize` checks packed, scales and zeros)."""
    check_sizes(op, 0, 0, bits)
    experts, lead = packed.shape[:-2], "".join(f"{e}, " for e in packed.shape[:-2])
    if packed.dtype != torch.int32 or packed.dim() not in (2, 3):
        raise ValueError(f"[{op}] packed: expected int32 ({lead}R/16, N*{bits}/2), got {describe(packed)}")
    rows, columns = packed.shape[-2] * TILE_ROWS, packed.shape[-1] * 2 // bits
    fits = out.is_floating_point() and out.dim() == packed.dim() and out.shape[:-2] == experts
    fits = fits and (perm is not None or out.shape[-2] <= rows) and out.shape[-1] <= columns
    if not fits or (interleaved and out.shape[-1] % 2):
        even = " and even" if interleaved else ""
        expected = f"floating ({lead}K, N), K up to {rows}, N up to {columns}{even}"
        raise ValueError(f"[{op}] out: expected {expected}, got {describe(out)}")
    if out.numel():
        apart = [s >= n for size, s, n in zip(out.shape[:-1], out.stride(), _strides_of_rows(out)) if size > 1]
        if not all(apart) or (out.shape[-1] > 1 and out.stride(-1) != 1):
            raise ValueError(f"[{op}] out: expected contiguous rows that do not overlap, got strides {out.stride()}")
    if perm is not None and (perm.dtype != torch.int32 or perm.shape != (*experts, rows)):
        raise ValueError(f"[{op}] perm: expected int32 ({lead}{rows}), got {describe(perm)}")
    if expert_offsets is not None:
        per_expert = experts and expert_offsets.shape == (experts[0] + 1,)
        if expert_offsets.dtype != torch.int32 or not per_expert or not expert_offsets.is_contiguous():
            expected = "contiguous int32 (E + 1,) for a stack of E matrices"
            raise ValueError(f"[{op}] expert_offsets: expected {expected}, got {describe(expert_offsets)}")


def _strides_of_rows(out: torch.Tensor) -> list[int]:
    """The least strides of matrices `[..., K, N]` and their rows that do not overlap."""
    return [out.shape[-2] * out.stride(-2)] * (out.dim() - 2) + [out.shape[-1]]


def dequantize_into(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    expert_offsets: torch.Tensor | None,
    group_size: int,
    bits: int,
    interleaved: bool,
    out: torch.Tensor,
    op: str = "marlin_dequantize_out",
) -> None:
    """Weights into `out` `[..., K, N]`, rows in their old order; arguments are those of `marlin_dequantize_out`.

    One matrix of a stack after another: the work takes the memory of one.
    """
    check_dense(op, packed, perm, expert_offsets, bits, interleaved, out)
    in_features, columns = out.shape[-2:]
    if perm is not None and perm.device.type == "cpu":
        check_perm_values(op, perm, in_features)
    compute = torch.promote_types(out.dtype, torch.float32)
    count = packed.shape[0] if packed.dim() == 3 else 1
    named = None if expert_offsets is None else expert_offsets[1:] > expert_offsets[:-1]

    def each(t: torch.Tensor | None) -> Sequence[Any]:
        return [None] * count if t is None else [t] if packed.dim() == 2 else t.unbind()

    stacks = (packed, scales, zeros, perm, named, out)
    for words, scale, zero, order, wanted, dense in zip(*map(each, stacks)):
        weight = dequantize(words, scale, zero, group_size, bits, compute, op).to(out.dtype)
        if interleaved:
            weight = torch.cat([half[:, : columns // 2] for half in split_gate_up(weight)], dim=1)
        if order is None:
            rows = weight[:in_features, :columns]
        else:  # padding rows go to a row more
            index = torch.where((order >= 0) & (order < in_features), order, in_features).long()
            rows = torch.nn.functional.pad(dense, (0, 0, 0, 1)).index_copy(0, index, weight[:, :columns])[:-1]
        dense.copy_(rows if wanted is None else torch.where(wanted, rows, dense))


def interleave_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Columns of gate and up side by side in runs of 8: eight of gate, the same eight of up, the next eight of gate.

    The last dimension of both is N columns, a multiple of 8 (codes, qweight, scales, zero points; not packed zero
    words). A lane then holds gate and up of the same column in one 16-column tile, and forms silu(gate) * up in its
    registers. Returns `[..., 2N]`. Raises ValueError for shapes that do not fit.
    """
    if gate.shape != up.shape or gate.dim() == 0 or gate.shape[-1] % GATE_RUN:
        expected = f"two of the same shape (..., N), N a multiple of {GATE_RUN}"
        raise ValueError(f"[marlin] gate, up: expected {expected}, got {tuple(gate.shape)} and {tuple(up.shape)}")
    runs = (gate.shape[-1] // GATE_RUN, GATE_RUN)
    return torch.stack((gate.unflatten(-1, runs), up.unflatten(-1, runs)), -2).flatten(-3)


def split_gate_up(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `interleave_gate_up`: gate and up, `[..., N]` each."""
    if columns.dim() == 0 or columns.shape[-1] % (2 * GATE_RUN):
        expected = f"(..., 2N), N a multiple of {GATE_RUN}"
        raise ValueError(f"[marlin] columns: expected {expected}, got {tuple(columns.shape)}")
    gate, up = columns.unflatten(-1, (columns.shape[-1] // (2 * GATE_RUN), 2, GATE_RUN)).unbind(-2)
    return gate.flatten(-2), up.flatten(-2)
