"""GPTQ tensors as they lie in a checkpoint: pack, unpack, dequantise. Pure torch, any device, exact inverses.

K in-features, N out-features, G groups, b bits (2, 3, 4 or 8).

| tensor  | dtype, shape        | packing                                                              |
|---------|---------------------|----------------------------------------------------------------------|
| qweight | int32 (K*b/32, N)   | along K, least significant bits first                                |
| qzeros  | int32 (G, N*b/32)   | along N, the same way                                                |
| scales  | floating (G, N)     |                                                                      |
| g_idx   | int32 (K)           | group of each row; `k // group_size` unless written with act-order   |

`w[k, n] = (code[k, n] - zero[g_idx[k], n]) * scale[g_idx[k], n]`. With b = 3 the codes are one little-endian
bit stream: 32 codes in 3 words, two of them across a word boundary. Source: the GPTQ reference packer
(IST-DASLab/gptq) and its successors AutoGPTQ and GPTQModel; the whole-word zero arithmetic is GPTQModel's
v1/v2 conversion.
"""

from __future__ import annotations

import torch

SUPPORTED_BITS = (2, 3, 4, 8)

#: By `checkpoint_format`: 1 where `zero - 1` is stored, 0 where the zero point itself is.
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}

#: One in every field of a word: a v1 writer subtracted this from whole words.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def check_bits(op: str, bits: int) -> None:
    """Raise ValueError unless `bits` is 2, 3, 4 or 8."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"[{op}] bits: expected one of {SUPPORTED_BITS}, got {bits}")


def zero_offset_of(checkpoint_format: str) -> int:
    """1 for "gptq" (v1, stores `zero - 1`), 0 for "gptq_v2". Raises ValueError for any other format."""
    if checkpoint_format not in ZERO_OFFSETS:
        raise ValueError(f"[gptq] checkpoint_format: expected one of {list(ZERO_OFFSETS)}, got {checkpoint_format!r}")
    return ZERO_OFFSETS[checkpoint_format]


def _period(bits: int) -> tuple[int, int]:
    """After how many codes and words a field starts at bit 0 again."""
    return (32, 3) if bits == 3 else (32 // bits, 1)


def _check_int32(name: str, words: torch.Tensor) -> None:
    if words.dtype != torch.int32 or words.dim() < 2:
        raise ValueError(
            f"[gptq] {name}: expected int32 with 2 or more dimensions, got {words.dtype} {tuple(words.shape)}"
        )


def _byte_stream(words: torch.Tensor) -> torch.Tensor:
    """int32 `[..., rows, N]` -> its little-endian bytes along the rows, uint8 `[..., 4*rows, N]`."""
    return words.unsqueeze(-1).view(torch.uint8).movedim(-1, -2).flatten(-3, -2)


def _words_of(stream: torch.Tensor) -> torch.Tensor:
    """Inverse of `_byte_stream`."""
    words = stream.unflatten(-2, (stream.shape[-2] // 4, 4)).movedim(-2, -1)
    # Flat, because torch does not view an empty tensor of several dimensions as another dtype.
    return words.flatten().view(torch.int32).view(words.shape[:-1])


def unpack_rows(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of packed words, `int32 [..., K*bits/32, N] -> uint8 [..., K, N]`.

    Raises ValueError for bits that are not supported and, for 3 bits, a row count that is no multiple of 3.
    """
    check_bits("gptq", bits)
    _check_int32("qweight", qweight)
    rows, words = qweight.shape[-2], _period(bits)[1]
    if rows % words:
        raise ValueError(f"[gptq] qweight: expected rows in multiples of {words} for {bits} bits, got {rows}")
    units = _byte_stream(qweight)
    if bits == 3:  # eight codes in three bytes
        low, middle, high = units.to(torch.int32).unflatten(-2, (rows * 4 // 3, 3)).unbind(-2)
        units = low | middle << 8 | high << 16
    shifts = torch.arange(0, 24 if bits == 3 else 8, bits, dtype=units.dtype, device=units.device)
    codes = (units.unsqueeze(-2) >> shifts.unsqueeze(-1)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-3, -2)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `unpack_rows`: `uint8 [..., K, N] -> int32 [..., K*bits/32, N]`.

    K must be a multiple of `32 / bits` (of 32 for 3 bits) and every code below `2**bits`; else ValueError. Codes on
    another device than the CPU are not looked at.
    """
    check_bits("gptq", bits)
    in_features, per_period = codes.shape[-2], _period(bits)[0]
    if codes.dtype != torch.uint8 or in_features % per_period:
        dtype = str(codes.dtype).removeprefix("torch.")
        raise ValueError(
            f"[gptq] codes: expected uint8 rows in multiples of {per_period} for {bits} bits, got {dtype} {in_features}"
        )
    if bits < 8 and codes.device.type == "cpu" and codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"[gptq] codes: expected values below {2**bits}, got {int(codes.max())}")
    per_unit = 8 if bits == 3 else 8 // bits
    fields = codes.to(torch.int32 if bits == 3 else torch.uint8).unflatten(-2, (in_features // per_unit, per_unit))
    units = fields[..., 0, :].clone()
    for i in range(1, per_unit):
        units |= fields[..., i, :] << (bits * i)
    if bits == 3:
        units = torch.stack((units, units >> 8, units >> 16), -2).flatten(-3, -2).to(torch.uint8)
    return _words_of(units)


def packed_columns(out_features: int, bits: int) -> int:
    """Words per row of qzeros: `N * bits / 32`, rounded up to whole words (to 3 words for 3 bits)."""
    codes, words = _period(bits)
    return -(-out_features // codes) * words


def unpack_columns(qzeros: torch.Tensor, bits: int, out_features: int) -> torch.Tensor:
    """Codes of words packed along the columns: `int32 [..., G, N*bits/32] -> uint8 [..., G, N]`.

    Where N does not fill the last word, its upper fields are left out. Raises ValueError for another width.
    """
    check_bits("gptq", bits)
    _check_int32("qzeros", qzeros)
    expected = packed_columns(out_features, bits)
    if qzeros.shape[-1] != expected:
        raise ValueError(
            f"[gptq] qzeros: expected {expected} columns for {out_features} out-features of {bits} bits, "
            f"got {tuple(qzeros.shape)}"
        )
    return unpack_rows(qzeros.mT, bits).mT[..., :out_features].contiguous()


def pack_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `unpack_columns`: `uint8 [..., G, N] -> int32 [..., G, N*bits/32]`, zero past N."""
    check_bits("gptq", bits)
    padding = -codes.shape[-1] % _period(bits)[0]
    return pack_rows(torch.nn.functional.pad(codes, (0, padding)).mT, bits).mT.contiguous()


def decode_zeros(qzeros: torch.Tensor, bits: int, out_features: int, checkpoint_format: str) -> torch.Tensor:
    """Zero points `uint8 [..., G, N]` of `qzeros`; exact inverse of `encode_zeros` for every word.

    "gptq_v2" holds the zero point itself, "gptq" (v1) the zero point minus one. A v1 writer subtracts one
    from every field of a word at once, so a zero point of 0 borrows from its neighbours: that is undone by
    one addition per word, with wrap-around, not field by field. Three-bit fields cross words; there
    GPTQModel's writer and reader work field by field, modulo 8, and so does this. (Its early releases shifted
    the first and third word of a period by each other's constant; their 3-bit v1 files cannot be told apart
    and are not supported.)
    """
    offset = zero_offset_of(checkpoint_format)
    if offset and bits in _ONES:
        qzeros = qzeros + _ONES[bits]
    zeros = unpack_columns(qzeros, bits, out_features)
    return (zeros + 1) & 7 if offset and bits == 3 else zeros


def encode_zeros(zeros: torch.Tensor, bits: int, checkpoint_format: str) -> torch.Tensor:
    """Inverse of `decode_zeros`: `uint8 [..., G, N] -> int32 [..., G, N*bits/32]`."""
    offset = zero_offset_of(checkpoint_format)
    if offset and bits == 3:
        zeros = (zeros + 7) & 7
    qzeros = pack_columns(zeros, bits)
    return qzeros - _ONES[bits] if offset and bits in _ONES else qzeros


def check_tensors(
    op: str,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
) -> tuple[int, int, int]:
    """(K, N, G) of one projection's tensors; raises ValueError when dtypes or shapes do not fit together.

    Values of g_idx are not looked at: see `check_g_idx`.
    """
    check_bits(op, bits)
    codes, words = _period(bits)

    def expect(name: str, good: bool, expected: str, tensor: torch.Tensor) -> None:
        if not good:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"[{op}] {name}: expected {expected}, got {dtype} {tuple(tensor.shape)}")

    rows_fit = qweight.dim() == 2 and qweight.shape[0] % words == 0
    expect("qweight", qweight.dtype == torch.int32 and rows_fit, f"int32 ({words}*rows, N)", qweight)
    in_features, out_features = qweight.shape[0] // words * codes, qweight.shape[1]
    scales_fit = scales.dim() == 2 and scales.shape[1] == out_features
    some_group = scales_fit and (scales.shape[0] > 0 or in_features == 0)
    expect("scales", scales.is_floating_point() and some_group, f"floating (G, {out_features})", scales)
    groups = scales.shape[0]
    zeros_shape = (groups, packed_columns(out_features, bits))
    zeros_fit = qzeros.dtype == torch.int32 and qzeros.shape == zeros_shape
    expect("qzeros", zeros_fit, f"int32 {zeros_shape}", qzeros)
    if g_idx is not None:
        g_idx_fits = g_idx.dtype == torch.int32 and g_idx.shape == (in_features,)
        expect("g_idx", g_idx_fits, f"int32 ({in_features},)", g_idx)
    elif groups and in_features % groups:
        raise ValueError(
            f"[{op}] g_idx: expected int32 ({in_features},), as {groups} groups do not divide that, got None"
        )
    return in_features, out_features, groups


def check_stack(
    op: str, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None, bits: int
) -> tuple[int, int, int, int]:
    """(E, K, N, G) of the tensors of E projections, each with a leading dimension E, as `check_tensors`."""
    experts = qweight.shape[0] if qweight.dim() == 3 else 0
    for name, stack, dims in (
        ("qweight", qweight, 3),
        ("qzeros", qzeros, 3),
        ("scales", scales, 3),
        ("g_idx", g_idx, 2),
    ):
        if stack is not None and (stack.dim() != dims or stack.shape[0] != experts):
            expected = f"({experts}, rows, columns)" if dims == 3 else f"({experts}, K)"
            raise ValueError(f"[{op}] {name}: expected {expected}, got {tuple(stack.shape)}")

    def one(stack: torch.Tensor) -> torch.Tensor:  # its shape, which a stack of none has too
        return torch.empty(stack.shape[1:], dtype=stack.dtype, device="meta")

    order = None if g_idx is None else one(g_idx)
    return experts, *check_tensors(op, one(qweight), one(qzeros), one(scales), order, bits)


def check_g_idx(op: str, g_idx: torch.Tensor, groups: int) -> None:
    """Raise ValueError when a value of `g_idx` is no group. Reads the values: on a device the host waits."""
    if g_idx.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(g_idx))
    if low < 0 or high >= groups:
        raise ValueError(f"[{op}] g_idx: expected values in [0, {groups}), got values in [{low}, {high}]")


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    zero_offset: int,
    op: str = "gptq_dequantize",
) -> torch.Tensor:
    """Weights `[K, N]` of one projection, float32 (float64 where the scales are).

    Args:
        zero_offset: 1 when qzeros hold `zero - 1` ("gptq"), 0 when they hold the zero point ("gptq_v2").
        g_idx: None means `k // (K / G)`.
        op: named in messages.

    Raises ValueError for shapes, dtypes or bits that do not fit, and on CPU for a g_idx outside `[0, G)`. On
    another device such rows are NaN: looking would make the host wait.
    """
    in_features, out_features, groups = check_tensors(op, qweight, qzeros, scales, g_idx, bits)
    if zero_offset not in (0, 1):
        raise ValueError(f"[{op}] zero_offset: expected 0 or 1, got {zero_offset}")
    checkpoint_format = "gptq" if zero_offset else "gptq_v2"
    scales = scales.to(torch.promote_types(scales.dtype, torch.float32))
    zeros = decode_zeros(qzeros, bits, out_features, checkpoint_format)
    codes = unpack_rows(qweight, bits)
    if g_idx is None:
        # An empty projection may have no group at all.
        rows = in_features // max(groups, 1)
        zeros, scales = zeros.repeat_interleave(rows, 0), scales.repeat_interleave(rows, 0)
        return (codes.to(scales.dtype) - zeros.to(scales.dtype)) * scales
    if g_idx.device.type == "cpu":
        check_g_idx(op, g_idx, groups)
    inside = ((g_idx >= 0) & (g_idx < groups)).unsqueeze(-1)
    group = g_idx.clamp(0, max(groups - 1, 0)).long()
    zeros, scales = zeros[group], scales[group]
    weight = (codes.to(scales.dtype) - zeros.to(scales.dtype)) * scales
    return weight.masked_fill(~inside, float("nan"))


def effective_group_size(in_features: int, group_size: int) -> int:
    """Rows of a full group: `group_size`, or all K for -1 and for a group larger than K."""
    if group_size != -1 and group_size < 1:
        raise ValueError(f"[gptq] group_size: expected -1 or a positive number, got {group_size}")
    return in_features if group_size == -1 or group_size > in_features else group_size


def num_groups(in_features: int, group_size: int) -> int:
    """G: `ceil(K / group_size)`, 1 for group_size -1."""
    return -(-in_features // max(effective_group_size(in_features, group_size), 1))


def is_regular(g_idx: torch.Tensor, group_size: int) -> bool:
    """Whether `g_idx[k] == k // group_size` for every row, as in a checkpoint without act-order."""
    in_features = g_idx.numel()
    size = max(effective_group_size(in_features, group_size), 1)
    return torch.equal(g_idx, torch.arange(in_features, device=g_idx.device, dtype=g_idx.dtype) // size)


def packed_group_size(g_idx: torch.Tensor, in_features: int, group_size: int, multiple: int = 1) -> int:
    """Rows each group takes in packed order, where all groups are equally long: group_size'.

    It is the effective group size, or the row count of the largest group where that is more (a g_idx need not
    have equal groups), rounded up to `multiple`. Raises ValueError like `sort_groups`.
    """
    groups = _check_groups(g_idx, in_features, group_size)
    largest = int(torch.bincount(g_idx.long(), minlength=groups).max()) if in_features else 0
    size = max(effective_group_size(in_features, group_size), largest)
    return -(-size // multiple) * multiple


def _check_groups(g_idx: torch.Tensor, in_features: int, group_size: int) -> int:
    if g_idx.shape != (in_features,) or g_idx.dtype != torch.int32:
        raise ValueError(f"[gptq] g_idx: expected int32 {(in_features,)}, got {g_idx.dtype} {tuple(g_idx.shape)}")
    groups = num_groups(in_features, group_size)
    check_g_idx("gptq", g_idx, groups)
    return groups


def sort_groups(
    g_idx: torch.Tensor, in_features: int, group_size: int, packed_size: int | None = None
) -> torch.Tensor | None:
    """The row order in which every group is one run of group_size' rows; None when the rows already lie so.

    Args:
        g_idx: int32 `[K]`, values in `[0, ceil(K / group_size))`.
        group_size: the checkpoint's; -1 means one group.
        packed_size: group_size', default `packed_group_size(...)`; larger to give every expert of a stack the
        same.

    Returns:
        None when `g_idx[k] == k // group_size` and group_size' is group_size. Otherwise perm int32
        `[G * group_size']`: packed row j is row `perm[j]` and belongs to group `j // group_size'`; -1 is a
        padding row. Rows of a group keep their order (a stable sort). Every row of `[0, K)` occurs once.

    Raises ValueError for a g_idx of another length, dtype or range, or a packed_size that is too small.
    """
    groups = _check_groups(g_idx, in_features, group_size)
    needed = packed_group_size(g_idx, in_features, group_size)
    size = needed if packed_size is None else packed_size
    if size < needed:
        raise ValueError(f"[gptq] packed_size: expected at least {needed}, got {size}")
    if size == effective_group_size(in_features, group_size) and is_regular(g_idx, group_size):
        return None
    order = torch.argsort(g_idx, stable=True)
    group = g_idx[order].long()
    counts = torch.bincount(group, minlength=groups)
    first = counts.cumsum(0) - counts
    position = group * size + torch.arange(in_features, device=g_idx.device) - first[group]
    perm = torch.full((groups * size,), -1, dtype=torch.int32, device=g_idx.device)
    perm[position] = order.to(torch.int32)
    return perm


def g_idx_from_perm(perm: torch.Tensor | None, group_size: int, in_features: int) -> torch.Tensor:
    """Inverse of `sort_groups`: int32 `[K]`. `group_size` is that of the packed rows, group_size'.

    Raises ValueError unless perm holds every row of `[0, in_features)` exactly once, besides -1.
    """
    if perm is None:
        size = max(effective_group_size(in_features, group_size), 1)
        return torch.arange(in_features, dtype=torch.int32) // size
    slots = torch.nonzero(perm >= 0).flatten()
    rows = perm[slots].long()
    if not torch.equal(rows.sort().values, torch.arange(in_features, device=perm.device)):
        raise ValueError(
            f"[gptq] perm: expected every row of [0, {in_features}) once, got {tuple(perm.shape)} otherwise"
        )
    g_idx = torch.empty(in_features, dtype=torch.int32, device=perm.device)
    g_idx[rows] = (slots // group_size).to(torch.int32)
    return g_idx
