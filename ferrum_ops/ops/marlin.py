"""GPTQ weights to the Marlin tile layout and back.

Data movement only, done once at load: the pure-torch form is the implementation on every device. The layout is
described in `ferrum_ops.formats.marlin`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ferrum_ops._library import refuse_grad, register
from ferrum_ops.formats import gptq, marlin


def marlin_repack(
    qweight: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int = 4
) -> torch.Tensor:
    """GPTQ words to the Marlin tile layout, int32 `[packed rows/16, N*bits/2]`.

    Args:
        qweight: int32 `[K*bits/32, N]`, or a stack of experts `[E, K*bits/32, N]`, packed one by one.
        perm: int32 `[packed rows]` (`[E, packed rows]` for a stack): packed row j is row `perm[j]`; -1 is a padding row
            of codes `2**(bits - 1)`. See `formats.gptq.sort_groups`. None: rows stay where they are.
        in_features: K. The packed rows (K without a perm) must be a multiple of 16.
        out_features: N, a multiple of 64.
        bits: 4 or 8.

    Raises ValueError for sizes, bits, shapes or dtypes that do not fit, and on CPU for a perm that does not hold
    every row once; on another device an entry outside `[0, K)` makes a padding row.
    """
    return torch.ops.ferrum.marlin_repack(qweight, perm, in_features, out_features, bits)


def marlin_unpack(
    packed: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int = 4
) -> torch.Tensor:
    """Inverse of `marlin_repack`, same arguments: GPTQ words int32 `[K*bits/32, N]` (`[E, K*bits/32, N]`).

    Raises ValueError like `marlin_repack`.
    """
    return torch.ops.ferrum.marlin_unpack(packed, perm, in_features, out_features, bits)


def marlin_permute_scales(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    """Scales in the order the Marlin kernel's lanes read them, same shape and dtype.

    Args:
        scales: floating `[G, N]` or `[E, G, N]`, `G = ceil(K / group_size)` in the order of the packed rows'
            groups, N a multiple of 64.
        in_features: K, or the packed rows where a perm has padding.
        group_size: -1 for one group. One group has another order (runs of 32) than several (runs of 64).

    Raises ValueError for a shape or dtype that does not fit.
    """
    refuse_grad("marlin_permute_scales", scales)
    return torch.ops.ferrum.marlin_permute_scales(scales, in_features, group_size)


def marlin_unpermute_scales(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    """Inverse of `marlin_permute_scales`, same arguments. Raises ValueError like it."""
    refuse_grad("marlin_unpermute_scales", scales)
    return torch.ops.ferrum.marlin_unpermute_scales(scales, in_features, group_size)


def marlin_repack_ref(
    qweight: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int
) -> torch.Tensor:
    return marlin.repack(qweight, perm, in_features, out_features, bits)


def marlin_unpack_ref(
    packed: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int
) -> torch.Tensor:
    return marlin.unpack(packed, perm, in_features, out_features, bits)


def marlin_permute_scales_ref(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    return marlin.permute_scales(scales, in_features, group_size)


def marlin_unpermute_scales_ref(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    return marlin.unpermute_scales(scales, in_features, group_size)


def marlin_repack_fake(
    qweight: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int
) -> torch.Tensor:
    packed_rows = in_features if perm is None else perm.shape[-1]
    marlin.check_sizes("marlin_repack", packed_rows, out_features, bits)
    return qweight.new_empty((*qweight.shape[:-2], packed_rows // marlin.TILE_ROWS, out_features * bits // 2))


def marlin_unpack_fake(
    packed: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int
) -> torch.Tensor:
    packed_rows = in_features if perm is None else perm.shape[-1]
    marlin.check_sizes("marlin_unpack", packed_rows, out_features, bits)
    return packed.new_empty((*packed.shape[:-2], in_features * bits // 32, out_features))


def marlin_permute_scales_fake(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    return scales.new_empty(scales.shape)


def marlin_unpermute_scales_fake(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    return scales.new_empty(scales.shape)


def _words(*shape: int, device: str) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, device=device).to(torch.int32)


def _padded_perm(in_features: int, device: str) -> torch.Tensor:
    """A random act-order of three unequal groups, each padded to the same number of rows."""
    g_idx = (torch.rand(in_features, device=device) * 2.5).to(torch.int32)
    group_size = -(-in_features // 3)
    size = gptq.packed_group_size(g_idx, in_features, group_size, marlin.TILE_ROWS)
    perm = gptq.sort_groups(g_idx, in_features, group_size, size)
    assert perm is not None
    return perm


def marlin_repack_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    if dtype != torch.float32:
        return  # words only: the same samples for every dtype
    for bits in marlin.SUPPORTED_BITS:
        rows = 48 * bits // 32
        yield _words(rows, 128, device=device), None, 48, 128, bits
        perm = torch.randperm(48, device=device).to(torch.int32)
        yield _words(rows, 64, device=device), perm, 48, 64, bits
        yield _words(2, rows, 64, device=device), torch.stack([perm, perm.flip(0)]), 48, 64, bits
        # 40 rows are no multiple of 16, but their padded order is.
        yield _words(40 * bits // 32, 64, device=device), _padded_perm(40, device), 40, 64, bits
        yield _words(0, rows, 64, device=device), None, 48, 64, bits
        yield _words(rows, 0, device=device), None, 48, 0, bits


def marlin_unpack_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for qweight, perm, in_features, out_features, bits in marlin_repack_inputs(device, dtype):
        packed = marlin.repack(qweight, perm, in_features, out_features, bits)
        yield packed, perm, in_features, out_features, bits


def marlin_permute_scales_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape, in_features, group_size in (
        ((4, 128), 128, 32),
        ((1, 128), 128, -1),
        ((1, 64), 128, 128),
        ((3, 2, 64), 100, 64),
        ((3, 1, 192), 100, -1),
        ((2, 0), 64, 32),
        ((0, 2, 64), 64, 32),
    ):
        yield torch.randn(shape, device=device, dtype=dtype), in_features, group_size
    yield torch.randn(128, 4, device=device, dtype=dtype).T, 128, 32


def marlin_unpermute_scales_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    yield from marlin_permute_scales_inputs(device, dtype)


register(
    "marlin_repack",
    ref=marlin_repack_ref,
    fake=marlin_repack_fake,
    inputs=marlin_repack_inputs,
)
register(
    "marlin_unpack",
    ref=marlin_unpack_ref,
    fake=marlin_unpack_fake,
    inputs=marlin_unpack_inputs,
)
register(
    "marlin_permute_scales",
    ref=marlin_permute_scales_ref,
    fake=marlin_permute_scales_fake,
    inputs=marlin_permute_scales_inputs,
)
register(
    "marlin_unpermute_scales",
    ref=marlin_unpermute_scales_ref,
    fake=marlin_unpermute_scales_fake,
    inputs=marlin_unpermute_scales_inputs,
)
