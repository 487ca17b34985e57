"""The "int4_cpu" layout in pure torch, and the small transformations a loader needs around it.

K in-features, N out-features, G groups. Weight `w[k, n] = (code[k, n] - zero[g(k), n]) * scale[g(k), n]` with
codes 0..15. The output columns are cut into tiles of 16 (`N_pad` is N rounded up to 16) and the K_packed rows of a
tile into lines of eight rows and 64 bytes: byte `4c + b` of line i holds row `8i + b` of column c in the low nibble
and row `8i + 4 + b` in the high nibble.

    codes  uint8   [N_pad/16, K_packed/8, 64]
    scales float16 [N_pad/16, G, 16]          G = ceil(K_packed / group_size); the last group may be shorter
    zeros  uint8   [N_pad/16, G, 16], 0..16   None: every zero point is 8

Packed row j holds input channel `perm[j]`, -1 for a padding row (code 0, activation 0). Without `perm` the order is
kept and K_packed is K rounded up to 8. Padding columns have code, scale and zero point 0. The kernels take group
sizes that are multiples of 8 up to 128; `split_groups` brings any other there without changing a weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ferrum_ops.formats import gptq

TILE_COLUMNS = 16
LINE_ROWS = 8
LINE_BYTES = 64
MAX_GROUP_SIZE = 128
SYMMETRIC_ZERO = 8


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def packed_rows(perm: torch.Tensor | None, in_features: int) -> int:
    """K_packed: the length of `perm`, or `in_features` rounded up to a whole line of 8."""
    return _ceil_div(in_features, LINE_ROWS) * LINE_ROWS if perm is None else perm.shape[0]


def pack(qweight: torch.Tensor, perm: torch.Tensor | None, in_features: int) -> torch.Tensor:
    """What `ferrum::int4_pack` computes: int32 `[ceil(K/8), N]` -> codes uint8 `[N_pad/16, K_packed/8, 64]`."""
    codes = gptq.unpack_rows(qweight, 4)[:in_features]
    columns = codes.shape[1]
    if perm is None:
        codes = F.pad(codes, (0, 0, 0, packed_rows(None, in_features) - in_features))
    else:
        codes = torch.where(perm[:, None] >= 0, codes[perm.clamp_min(0).long()], 0).to(torch.uint8)
    codes = F.pad(codes, (0, -columns % TILE_COLUMNS))
    lines = codes.view(-1, 2, 4, codes.shape[1] // TILE_COLUMNS, TILE_COLUMNS)  # line, nibble, b, tile, column
    lines = lines.permute(3, 0, 1, 4, 2)  # tile, line, nibble, column, b
    return (lines[:, :, 0] | lines[:, :, 1] << 4).reshape(*lines.shape[:2], LINE_BYTES)


def unpack_codes(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """Codes uint8 `[K_packed, N]` in the order of the packed rows."""
    tiles, lines, _ = packed.shape
    nibbles = torch.stack([packed & 15, packed >> 4], dim=2).view(tiles, lines, 2, TILE_COLUMNS, 4)
    return nibbles.permute(1, 2, 4, 0, 3).reshape(lines * LINE_ROWS, tiles * TILE_COLUMNS)[:, :out_features]


def unpack(packed: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int) -> torch.Tensor:
    """Exact inverse of `pack`: qweight int32 `[ceil(K/8), N]`. Rows that `perm` does not name are 0."""
    codes = unpack_codes(packed, out_features)
    if perm is None:
        codes = codes[:in_features]
    else:
        kept = perm >= 0
        codes, ordered = codes.new_zeros(in_features, out_features), codes[kept]
        codes[perm[kept].long()] = ordered
    return gptq.pack_rows(F.pad(codes, (0, 0, 0, -in_features % LINE_ROWS)), 4)


def pack_groups(values: torch.Tensor) -> torch.Tensor:
    """One value per group and column, `[..., G, N]` -> `[..., N_pad/16, G, 16]`: scales or zeros, dtype kept."""
    values = F.pad(values, (0, -values.shape[-1] % TILE_COLUMNS))
    return values.unflatten(-1, (-1, TILE_COLUMNS)).transpose(-3, -2).contiguous()


def unpack_groups(tiled: torch.Tensor, out_features: int) -> torch.Tensor:
    """Inverse of `pack_groups`: `[..., G, N]`."""
    return tiled.transpose(-3, -2).flatten(-2)[..., :out_features]


def interleave_tiles(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Two packed tensors (codes, scales or zeros) `[..., tiles, *, *]` -> `[..., 2*tiles, *, *]`.

    Tile 2j is gate's tile j and tile 2j+1 up's: the form of `w13` in `moe_experts_int4`.
    """
    return torch.stack([gate, up], dim=-3).flatten(-4, -3)


def deinterleave_tiles(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `interleave_tiles`, as views."""
    return tiles[..., 0::2, :, :], tiles[..., 1::2, :, :]


def kernel_group_size(group_size: int) -> int | None:
    """The longest groups the kernels take, a multiple of 8 up to 128, that `group_size` divides into. None: none."""
    return next((part for part in range(MAX_GROUP_SIZE, 0, -LINE_ROWS) if group_size % part == 0), None)


def repeat_groups(values: torch.Tensor, group_size: int, part: int, rows: int) -> torch.Tensor:
    """Scales or zeros `[..., G, N]` of groups of `group_size` -> of their parts of `part`, those that `rows` have."""
    return values.repeat_interleave(group_size // part, dim=-2)[..., : _ceil_div(rows, part), :].contiguous()


def split_groups(
    scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Groups the kernels take, for the same weights: `(scales, zeros, group_size)`, a multiple of 8 up to 128.

    scales and zeros are `[..., G, N]`. group_size -1 is one group over all of K. Larger groups are cut into equal
    parts that repeat the scale.

    Raises ValueError for a group size that is not a multiple of 8, and for a G that does not follow from K.
    """
    if group_size != -1 and (group_size < LINE_ROWS or group_size % LINE_ROWS):
        raise ValueError(f"[split_groups] group_size: expected -1 or a positive multiple of 8, got {group_size}")
    # One group over everything may as well be taken for a longer one that the kernel's largest divides.
    size = _ceil_div(in_features, MAX_GROUP_SIZE) * MAX_GROUP_SIZE if group_size == -1 else group_size
    if scales.shape[-2] != _ceil_div(in_features, size):
        raise ValueError(
            f"[split_groups] scales: expected {_ceil_div(in_features, size)} groups for group_size {group_size} and "
            f"{in_features} input channels, got {scales.shape[-2]}"
        )
    part = kernel_group_size(size)
    assert part is not None
    if part == size:
        return scales, zeros, size
    parts = repeat_groups(scales, size, part, in_features)
    return parts, None if zeros is None else repeat_groups(zeros, size, part, in_features), part


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The weights `[K, N]` of one packed matrix, the kernels' oracle. Channels that `perm` does not name are 0."""
    codes = unpack_codes(packed, out_features).to(dtype)
    group = torch.arange(codes.shape[0], device=codes.device) // group_size
    zero = SYMMETRIC_ZERO if zeros is None else unpack_groups(zeros, out_features).to(dtype)[group]
    weights = (codes - zero) * unpack_groups(scales, out_features).to(dtype)[group]
    if perm is None:
        return weights[:in_features]
    kept = perm >= 0
    return weights.new_zeros(in_features, out_features).index_add(0, perm[kept].long(), weights[kept])


def quantize_rtn(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric round-to-nearest int4 of a dense weight `[N, K]`.

    Returns codes uint8 `[K, N]` (zero point 8) and scales float16 `[G, N]`. The grid is that of symmetric GPTQ and
    compressed-tensors: per group of `group_size` input channels (-1: all of K) the scale is 2 max|w| / 15, here
    rounded to float16 first, and the code clamp(rint(w / scale) + 8, 0, 15). A group too small for float16 gets
    scale 0 and codes 8.

    Raises ValueError for NaN or infinite weights and for scales above float16.
    """
    out_features, in_features = weight.shape
    size = in_features if group_size == -1 else group_size
    grouped = F.pad(weight.float(), (0, -in_features % size)).view(out_features, -1, size)
    scales = (grouped.abs().amax(-1) * (2 / 15)).to(torch.float16)
    if not torch.isfinite(scales).all():
        raise ValueError(
            "[quantize_rtn] weight: expected finite values with 2 max|w| / 15 in float16, "
            f"got max|w| = {grouped.abs().max():.4g}"
        )
    divisor = scales.float()[..., None]
    codes = torch.where(divisor > 0, grouped / divisor, 0).round().add(SYMMETRIC_ZERO).clamp(0, 15).to(torch.uint8)
    return codes.view(out_features, -1)[:, :in_features].T.contiguous(), scales.T.contiguous()
