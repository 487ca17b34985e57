"""GGUF blocks in pure torch: sizes and decoders of ggml's tensor types.

A row of K weights is a run of blocks; a tensor of packed rows is uint8 `[..., bytes of a row]`. Decoders give float32
and equal `gguf.quants.dequantize` of the Python package gguf bit for bit (a NaN scale gives NaN, of whatever payload).

| type | elements | bytes | a weight |
|---|---|---|---|
| Q4_0, Q5_0, Q8_0 | 32 | 18, 22, 34 | `d * (code - 8)`, `d * (code - 16)`, `d * code` |
| Q4_1, Q5_1 | 32 | 20, 24 | `d * code + m` |
| IQ4_NL, MXFP4 | 32 | 18, 17 | `d * table[code]` |
| Q4_K, Q5_K, Q2_K | 256 | 144, 176, 84 | `(d * scale) * code - dmin * min`, a scale and a min for 32, 32, 16 elements |
| Q6_K, Q3_K | 256 | 210, 110 | `(d * scale) * (code - 32)`, `(code - 4)`, a scale for 16 elements |
| IQ4_XS | 256 | 136 | `(d * scale) * table[code]`, a scale for 32 elements |
| F32, F16, BF16 | 1 | 4, 2, 2 | as it stands |
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch


class GGMLType(IntEnum):
    """The types this package decodes, with ggml's numbers. Members of gguf.GGMLQuantizationType serve as well."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    BF16 = 30
    MXFP4 = 39


#: Elements and bytes of a block.
BLOCK_SIZES: dict[int, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
    GGMLType.IQ4_NL: (32, 18),
    GGMLType.IQ4_XS: (256, 136),
    GGMLType.BF16: (1, 2),
    GGMLType.MXFP4: (32, 17),
}

#: Types that are plain floats.
FLOAT_TYPES = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}

#: Types of packed blocks.
QUANTIZED_TYPES = tuple(t for t in GGMLType if t not in FLOAT_TYPES)

NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def row_bytes(type: int, in_features: int) -> int:
    """Bytes of a row of `in_features` weights. Raises ValueError unless they fill whole blocks."""
    elements, nbytes = BLOCK_SIZES[type]
    if in_features % elements:
        raise ValueError(
            f"[row_bytes] in_features: expected a multiple of {elements} for {GGMLType(type).name}, got {in_features}"
        )
    return in_features // elements * nbytes


def row_elements(type: int, nbytes: int) -> int:
    """Weights of a row of `nbytes`. Raises ValueError unless they are whole blocks."""
    elements, block_bytes = BLOCK_SIZES[type]
    if nbytes % block_bytes:
        raise ValueError(
            f"[row_elements] nbytes: expected a multiple of {block_bytes} for {GGMLType(type).name}, got {nbytes}"
        )
    return nbytes // block_bytes * elements


def dequantize(blocks: torch.Tensor, type: int) -> torch.Tensor:
    """Packed rows uint8 `[..., bytes]` to float32 `[..., K]`."""
    nbytes = BLOCK_SIZES[type][1]
    in_features = row_elements(type, blocks.shape[-1])
    if blocks.numel() == 0:
        return blocks.new_empty(*blocks.shape[:-1], in_features, dtype=torch.float32)
    if type in FLOAT_TYPES:
        dtype = FLOAT_TYPES[GGMLType(type)]
        return blocks.reshape(-1).clone().view(dtype).float().reshape(*blocks.shape[:-1], in_features)
    weights = _DECODERS[GGMLType(type)](blocks.reshape(-1, nbytes))
    return weights.reshape(*blocks.shape[:-1], in_features)


# Decoders take uint8 [n, bytes] and give float32 [n, elements].


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of every block, `[n, 1]`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """`[..., w]` bytes to `[..., 2w]` codes, the low nibbles first."""
    return torch.cat([codes & 15, codes >> 4], dim=-1)


def _fields(codes: torch.Tensor, width: int, bits: int) -> torch.Tensor:
    """Runs of `width` bytes to codes of `bits` bits: the lowest field of the whole run first, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    runs = codes.reshape(codes.shape[0], -1, 1, width)
    return (runs >> shifts[:, None] & ((1 << bits) - 1)).flatten(1)


def _fifth_bits(high: torch.Tensor) -> torch.Tensor:
    """Four bytes to 32 codes of 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=high.device)
    return (high[:, :, None] >> shifts & 1).flatten(1) << 4


def _table(values: tuple[int, ...], codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.long()]


def _scaled(d: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`(d * scale) * code` with d `[n, 1]`, scales `[n, s]`, codes float32 `[n, 256]`."""
    grouped = codes.unflatten(1, (scales.shape[1], -1))
    return ((d * scales.float())[:, :, None] * grouped).flatten(1)


def _minus_mins(weights: torch.Tensor, dmin: torch.Tensor, mins: torch.Tensor) -> torch.Tensor:
    return (weights.unflatten(1, (mins.shape[1], -1)) - (dmin * mins.float())[:, :, None]).flatten(1)


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:]).float() + _half(b, 2)


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).float() - 16)


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])).float() + _half(b, 2)


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * b[:, 2:].contiguous().view(torch.int8).float()


def _iq4_nl(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * _table(NONLINEAR, _nibbles(b[:, 2:]))


def _mxfp4(b: torch.Tensor) -> torch.Tensor:
    exponent = b[:, :1].int()
    # 2^(e - 128), subnormal for the two smallest exponents.
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp_max(1), (exponent - 1).clamp_min(0) << 23)
    return bits.view(torch.float32) * _table(E2M1_DOUBLED, _nibbles(b[:, 1:]))


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    weights = _scaled(_half(b, 80), b[:, :16] & 15, _fields(b[:, 16:80], 32, 2).float())
    return _minus_mins(weights, _half(b, 82), b[:, :16] >> 4)


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    packed = b[:, 96:108]
    scales = (_nibbles(packed[:, :8]) | _fields(packed[:, 8:], 4, 2) << 4).float() - 32
    codes = _fields(b[:, 32:96], 32, 2) | _fields(b[:, :32], 32, 1) << 2
    return _scaled(_half(b, 108), scales, codes.float() - 4)


def _six_bit_scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight scales and eight mins of 12 bytes."""
    low, middle, high = b[:, :4], b[:, 4:8], b[:, 8:12]
    scales = torch.cat([low & 63, (high & 15) | (low >> 2 & 48)], dim=1)
    mins = torch.cat([middle & 63, high >> 4 | (middle >> 2 & 48)], dim=1)
    return scales, mins


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    scales, mins = _six_bit_scales(b[:, 4:16])
    weights = _scaled(_half(b, 0), scales, _fields(b[:, 16:], 32, 4).float())
    return _minus_mins(weights, _half(b, 2), mins)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    scales, mins = _six_bit_scales(b[:, 4:16])
    codes = _fields(b[:, 48:], 32, 4) | _fields(b[:, 16:48], 32, 1) << 4
    return _minus_mins(_scaled(_half(b, 0), scales, codes.float()), _half(b, 2), mins)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    codes = _fields(b[:, :128], 64, 4) | _fields(b[:, 128:192], 32, 2) << 4
    scales = b[:, 192:208].contiguous().view(torch.int8)
    return _scaled(_half(b, 208), scales, codes.float() - 32)


def _iq4_xs(b: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 16, 2, dtype=torch.int32, device=b.device)
    high = (b[:, 2:3].int() | b[:, 3:4].int() << 8) >> shifts & 3
    low = torch.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], dim=2).flatten(1).int()
    return _scaled(_half(b, 0), (low | high << 4) - 32, _table(NONLINEAR, _fields(b[:, 8:], 16, 4)))


_DECODERS: dict[GGMLType, Callable[[torch.Tensor], torch.Tensor]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
}


def random_blocks(type: int, rows: int, in_features: int, *, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    """Random packed rows uint8 `[rows, bytes]` with finite weights of about `scale`, for tests and benchmarks.

    Everything but the floating-point scales is uniform bits, so that every code and every integer scale occurs.
    """
    g = torch.Generator().manual_seed(seed)
    kind = GGMLType(type)
    if kind in FLOAT_TYPES:
        weights = torch.randn(rows, in_features, generator=g) * scale
        return weights.to(FLOAT_TYPES[kind]).view(torch.uint8)
    nbytes = BLOCK_SIZES[kind][1]
    count = rows * row_bytes(kind, in_features) // nbytes
    blocks = torch.randint(0, 256, (count, nbytes), generator=g, dtype=torch.int32).to(torch.uint8)
    if kind == GGMLType.MXFP4:
        blocks[:, 0] = torch.randint(118, 122, (count,), generator=g, dtype=torch.int32).to(torch.uint8)
        return blocks.reshape(rows, -1)
    for at, unit in _HALF_FIELDS[kind].items():
        values = (torch.rand(count, 1, generator=g) + 0.5) * scale * unit
        blocks[:, at : at + 2] = values.half().view(torch.uint8)
    return blocks.reshape(rows, -1)


#: Where a block has float16 fields, and what times the wanted size of a weight they should be for uniform codes.
_HALF_FIELDS: dict[GGMLType, dict[int, float]] = {
    GGMLType.Q4_0: {0: 1 / 5},
    GGMLType.Q4_1: {0: 1 / 5, 2: -1.5},
    GGMLType.Q5_0: {0: 1 / 9},
    GGMLType.Q5_1: {0: 1 / 9, 2: -1.7},
    GGMLType.Q8_0: {0: 1 / 74},
    GGMLType.IQ4_NL: {0: 1 / 70},
    GGMLType.Q2_K: {80: 1 / 10, 82: 1 / 10},
    GGMLType.Q3_K: {108: 1 / 43},
    GGMLType.Q4_K: {0: 1 / 180, 2: 1 / 24},
    GGMLType.Q5_K: {0: 1 / 360, 2: 1 / 24},
    GGMLType.Q6_K: {208: 1 / 1400},
    GGMLType.IQ4_XS: {0: 1 / 1300},
}
