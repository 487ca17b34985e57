"""int8 weights in the CPU layout: the tiles and scales of `ferrum_ops.formats.int4` with a byte per code.

K in-features, N out-features, G groups. Weight `w[k, n] = (code[k, n] - 128) * scale[g(k), n]` with codes 1..255. The
output columns are cut into tiles of 16 (`N_pad` is N rounded up to 16) and the rows of a tile into lines of eight rows
and 128 bytes: byte `4c + b` of line i holds row `8i + b` of column c, byte `64 + 4c + b` row `8i + 4 + b`.

    codes  uint8   [N_pad/16, K_packed/8, 128]   K_packed is K rounded up to 8; padding rows and columns have code 128
    scales float16 [N_pad/16, G, 16]             G = ceil(K_packed / group_size); the last group may be shorter
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ferrum_ops.formats.int4 import LINE_ROWS, TILE_COLUMNS, unpack_groups

LINE_BYTES = 128
ZERO = 128


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 `[K, N]` -> `[N_pad/16, K_packed/8, 128]`."""
    codes = F.pad(codes, (0, -codes.shape[1] % TILE_COLUMNS, 0, -codes.shape[0] % LINE_ROWS), value=ZERO)
    lines = codes.view(-1, 2, 4, codes.shape[1] // TILE_COLUMNS, TILE_COLUMNS)  # line, half, b, tile, column
    return lines.permute(3, 0, 1, 4, 2).reshape(lines.shape[3], lines.shape[0], LINE_BYTES)


def unpack(packed: torch.Tensor, in_features: int, out_features: int) -> torch.Tensor:
    """Exact inverse of `pack`: codes uint8 `[K, N]`."""
    tiles, lines, _ = packed.shape
    codes = packed.view(tiles, lines, 2, TILE_COLUMNS, 4).permute(1, 2, 4, 0, 3)
    return codes.reshape(lines * LINE_ROWS, tiles * TILE_COLUMNS)[:in_features, :out_features]


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    in_features: int,
    out_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The weights `[K, N]`, the kernels' oracle."""
    codes = unpack(packed, in_features, out_features).to(dtype) - ZERO
    group = torch.arange(in_features, device=codes.device) // group_size
    return codes * unpack_groups(scales, out_features).to(dtype)[group]


def quantize_rtn(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric round-to-nearest int8 of a dense weight `[N, K]`, per group of `group_size` input channels.

    Returns codes uint8 `[K, N]` and scales float16 `[G, N]`: scale = max|w| / 127 rounded to float16, code =
    clamp(rint(w / scale), -127, 127) + 128. A group too small for float16 gets scale 0 and codes 128.

    Raises ValueError for NaN or infinite weights and for scales above float16.
    """
    out_features, in_features = weight.shape
    grouped = F.pad(weight.float(), (0, -in_features % group_size)).view(out_features, -1, group_size)
    scales = (grouped.abs().amax(-1) / 127).to(torch.float16)
    if not torch.isfinite(scales).all():
        raise ValueError(
            "[quantize_rtn] weight: expected finite values with max|w| / 127 in float16, "
            f"got max|w| = {grouped.abs().max():.4g}"
        )
    divisor = scales.float()[..., None]
    codes = torch.where(divisor > 0, grouped / divisor, 0).round().clamp(-127, 127).add(ZERO).to(torch.uint8)
    return codes.view(out_features, -1)[:, :in_features].T.contiguous(), scales.T.contiguous()
