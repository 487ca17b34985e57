"""GGUF weights in tiles, in pure torch: 16 rows side by side, as the products read them fastest.

The information is that of the blocks (`ferrum_ops.formats.gguf`), in about as many bytes; the layout is written down in
csrc/common/gguf.h. A tensor of packed rows `[..., N, bytes]` becomes `[..., N/16, bytes of a tile]` and its type
`type + TILED`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats.gguf import E2M1_DOUBLED, NONLINEAR, GGMLType

TILED = 1 << 16
ROWS, CHUNK = 16, 256


@dataclass(frozen=True)
class Tiling:
    low_bits: int
    high_bits: int
    scales: int  # integer scales of a row and chunk
    signed: bool
    mins: bool
    halves: int  # float16 scales of a row and chunk; 0: eight exponents
    zero: int = 0
    table: tuple[int, ...] | None = None

    @property
    def scale_bytes(self) -> int:
        """Of everything behind the codes of a chunk, without padding."""
        integers = self.scales * ROWS * (2 if self.mins else 1)
        d = 8 * ROWS if self.halves == 0 else 2 * self.halves * ROWS
        return integers + d * (2 if self.mins else 1)

    @property
    def chunk_bytes(self) -> int:
        return 512 * (self.low_bits + self.high_bits) + -(-self.scale_bytes // 64) * 64


TILINGS: dict[int, Tiling] = {
    GGMLType.Q4_0: Tiling(4, 0, 0, False, False, 8, zero=8),
    GGMLType.Q4_1: Tiling(4, 0, 0, False, True, 8),
    GGMLType.Q5_0: Tiling(4, 1, 0, False, False, 8, zero=16),
    GGMLType.Q5_1: Tiling(4, 1, 0, False, True, 8),
    GGMLType.Q8_0: Tiling(8, 0, 0, False, False, 8, zero=128),
    GGMLType.Q2_K: Tiling(2, 0, 16, False, True, 1),
    GGMLType.Q3_K: Tiling(2, 1, 16, True, False, 1, zero=4),
    GGMLType.Q4_K: Tiling(4, 0, 8, False, True, 1),
    GGMLType.Q5_K: Tiling(4, 1, 8, False, True, 1),
    GGMLType.Q6_K: Tiling(4, 2, 16, True, False, 1, zero=32),
    GGMLType.IQ4_NL: Tiling(4, 0, 0, False, False, 8, table=NONLINEAR),
    GGMLType.IQ4_XS: Tiling(4, 0, 8, True, False, 1, table=NONLINEAR),
    GGMLType.MXFP4: Tiling(4, 0, 0, False, False, 0, table=E2M1_DOUBLED),
}


def fits(rows: int, in_features: int, type: int) -> bool:
    """Whether a matrix of this type can stand in tiles."""
    return type in TILINGS and rows > 0 and rows % ROWS == 0 and in_features > 0 and in_features % CHUNK == 0


def tile_bytes(type: int, in_features: int) -> int:
    """Bytes of a tile of 16 rows of `in_features` weights of ggml's `type`."""
    return in_features // CHUNK * TILINGS[type].chunk_bytes


def pack(blocks: torch.Tensor, type: int) -> torch.Tensor:
    """Packed rows uint8 `[..., N, bytes]` to tiles `[..., N/16, bytes]`. N is a multiple of 16, K of 256."""
    tiling = TILINGS[type]
    elements, nbytes = formats.BLOCK_SIZES[type]
    *outer, rows, row_bytes = blocks.shape
    chunks = row_bytes // nbytes * elements // CHUNK
    if blocks.numel() == 0:
        return blocks.new_empty(*outer, rows // ROWS, chunks * tiling.chunk_bytes)
    # [tile, row, chunk, blocks of the chunk, bytes]
    b = blocks.reshape(-1, ROWS, chunks, CHUNK // elements, nbytes).transpose(1, 2)
    codes, scales, mins = _FIELDS[GGMLType(type)](b.reshape(-1, nbytes))
    codes = codes.reshape(-1, ROWS, 8, 8, 4).permute(0, 2, 3, 1, 4)  # [chunk, run, vector, row, byte]
    parts = [_planes(codes & ((1 << tiling.low_bits) - 1), tiling.low_bits)]
    if tiling.high_bits:
        parts.append(_planes(codes >> tiling.low_bits, tiling.high_bits))
    fields = [torch.cat(parts, dim=2).flatten(1)]
    for field in (scales, mins) if tiling.scales else ():
        if field is not None:
            fields.append(field.reshape(-1, ROWS, tiling.scales).transpose(1, 2).flatten(1))
    at_d, at_m, width = _SCALE_FIELDS.get(GGMLType(type), (0, 2, 2))
    for at in (at_d, at_m) if tiling.mins else (at_d,):
        half = b[..., at : at + width].reshape(-1, ROWS, CHUNK // elements, width)
        fields.append(half.transpose(1, 2).flatten(1))
    packed = torch.cat(fields, dim=1)
    packed = torch.nn.functional.pad(packed, (0, tiling.chunk_bytes - packed.shape[1]))
    return packed.reshape(*outer, rows // ROWS, chunks * tiling.chunk_bytes)


def dequantize(tiles: torch.Tensor, type: int) -> torch.Tensor:
    """Tiles `[..., N/16, bytes]` of ggml's `type` (without TILED) to float32 `[..., N, K]`."""
    tiling = TILINGS[type]
    *outer, count, nbytes = tiles.shape
    chunks = nbytes // tiling.chunk_bytes
    if tiles.numel() == 0:
        return tiles.new_empty(*outer, count * ROWS, chunks * CHUNK, dtype=torch.float32)
    b = tiles.reshape(-1, tiling.chunk_bytes)
    bits = tiling.low_bits + tiling.high_bits
    lines = b[:, : 512 * bits].reshape(-1, 8, 64 * bits)
    codes = _codes(lines[..., : 64 * tiling.low_bits], tiling.low_bits)
    if tiling.high_bits:
        codes = codes | _codes(lines[..., 64 * tiling.low_bits :], tiling.high_bits) << tiling.low_bits
    codes = codes.permute(0, 3, 1, 2, 4).reshape(-1, ROWS, CHUNK)
    values = codes.float() - tiling.zero
    if tiling.table is not None:
        values = torch.tensor(tiling.table, dtype=torch.float32, device=b.device)[codes.long()]
    at = 512 * bits

    def take(count: int, dtype: torch.dtype) -> torch.Tensor:
        """`[n, row, count]` in float32."""
        nonlocal at
        size = count * ROWS * dtype.itemsize
        field = b[:, at : at + size].contiguous().view(dtype).reshape(-1, count, ROWS).transpose(1, 2).float()
        at += size
        return field

    integer = torch.int8 if tiling.signed else torch.uint8
    scales = take(tiling.scales, integer) if tiling.scales else torch.ones(b.shape[0], ROWS, 8, device=b.device)
    mins = take(tiling.scales, integer) if tiling.mins and tiling.scales else torch.ones_like(scales)
    d = take(tiling.halves, torch.float16) if tiling.halves else _e8m0(take(8, torch.uint8))
    weights = (d * scales)[..., None] * values.unflatten(-1, (scales.shape[-1], -1))
    if tiling.mins:
        m = take(tiling.halves, torch.float16)
        m = m * mins if tiling.scales else -m  # blocks of 32 add theirs
        weights = weights - m[..., None]
    weights = weights.reshape(-1, chunks, ROWS, CHUNK).transpose(1, 2)
    return weights.reshape(*outer, count * ROWS, chunks * CHUNK)


def _planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[n, run, 8 vectors, row, 4]` below `1 << bits` to lines `[n, run, 64 * bits]`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    lines = codes.unflatten(2, (bits, 8 // bits)) << shifts[:, None, None]
    return lines.sum(dim=3).to(torch.uint8).flatten(2)


def _codes(lines: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_planes`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=lines.device)
    planes = lines.reshape(*lines.shape[:2], bits, 1, ROWS, 4) >> shifts[:, None, None] & ((1 << bits) - 1)
    return planes.flatten(2, 3)


def _e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """2^(e - 128): half of what e8m0 means, for doubled codes."""
    bits = exponents.int()
    bits = torch.where(bits < 2, 0x00200000 << bits.clamp_max(1), (bits - 1).clamp_min(0) << 23)
    return bits.view(torch.float32)


# The stored codes [n, elements] of blocks [n, bytes], and their integer scales and mins [n, .] as bytes.

Fields = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _fifth(b: torch.Tensor, at: int) -> torch.Tensor:
    return formats._nibbles(b[:, at + 4 :]) | formats._fifth_bits(b[:, at : at + 4])


def _q3_k(b: torch.Tensor) -> Fields:
    packed = b[:, 96:108]
    scales = (formats._nibbles(packed[:, :8]) | formats._fields(packed[:, 8:], 4, 2) << 4) - 32
    return formats._fields(b[:, 32:96], 32, 2) | formats._fields(b[:, :32], 32, 1) << 2, scales, None


def _q5_k(b: torch.Tensor) -> Fields:
    codes = formats._fields(b[:, 48:], 32, 4) | formats._fields(b[:, 16:48], 32, 1) << 4
    return codes, *formats._six_bit_scales(b[:, 4:16])


def _q6_k(b: torch.Tensor) -> Fields:
    return formats._fields(b[:, :128], 64, 4) | formats._fields(b[:, 128:192], 32, 2) << 4, b[:, 192:208], None


def _iq4_xs(b: torch.Tensor) -> Fields:
    shifts = torch.arange(0, 16, 2, dtype=torch.int32, device=b.device)
    high = (b[:, 2:3].int() | b[:, 3:4].int() << 8) >> shifts & 3
    low = torch.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], dim=2).flatten(1).int()
    return formats._fields(b[:, 8:], 16, 4), ((low | high << 4) - 32).to(torch.int8).view(torch.uint8), None


_FIELDS = {
    GGMLType.Q4_0: lambda b: (formats._nibbles(b[:, 2:]), None, None),
    GGMLType.Q4_1: lambda b: (formats._nibbles(b[:, 4:]), None, None),
    GGMLType.Q5_0: lambda b: (_fifth(b, 2), None, None),
    GGMLType.Q5_1: lambda b: (_fifth(b, 4), None, None),
    GGMLType.Q8_0: lambda b: (b[:, 2:] + 128, None, None),
    GGMLType.Q2_K: lambda b: (formats._fields(b[:, 16:80], 32, 2), b[:, :16] & 15, b[:, :16] >> 4),
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: lambda b: (formats._fields(b[:, 16:], 32, 4), *formats._six_bit_scales(b[:, 4:16])),
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: lambda b: (formats._nibbles(b[:, 2:]), None, None),
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: lambda b: (formats._nibbles(b[:, 1:]), None, None),
}

#: Where a block has d and m and how many bytes wide, if not float16 at 0 and 2.
_SCALE_FIELDS = {
    GGMLType.Q2_K: (80, 82, 2),
    GGMLType.Q3_K: (108, 0, 2),
    GGMLType.Q6_K: (208, 0, 2),
    GGMLType.MXFP4: (0, 0, 1),
}
