"""Weights in the Marlin layout: their sizes with padding, packing on the device they will run on, and the way back.

K in features, N out features, R packed rows, G groups. GPTQ tensors are copied to the device as they are on disk and
packed there, one matrix at a time, so that a device holds the packed model and one matrix's worth of work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ferrum_ops
from ferrum_models.quantization.layout import marlin_group_size
from ferrum_models.quantization.sources import QuantizedSource, SavedLinear, Shapes
from ferrum_ops.formats import gptq, marlin

#: Rows are padded to whole steps of the kernels' loop over K, columns to whole 16 x 64 units.
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class Codes:
    """The weights of one matrix as GPTQ has them, all columns in one piece."""

    qweight: torch.Tensor  # int32 [K*bits/32, N]
    scales: torch.Tensor  # [G, N]
    zeros: torch.Tensor | None  # uint8 [G, N]


def side_by_side(parts: list[Codes]) -> Codes:
    """One matrix of the columns of all parts."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Codes(
        torch.cat([part.qweight for part in parts], dim=1),
        torch.cat([part.scales for part in parts], dim=1),
        torch.cat(zeros, dim=1) if zeros else None,
    )


def interleave(gate: Codes, up: Codes) -> Codes:
    """One matrix of the columns of gate and up in runs of 8, the last run padded."""

    def columns(name: str) -> torch.Tensor:
        halves = [getattr(half, name) for half in (gate, up)]
        padding = -halves[0].shape[1] % marlin.GATE_RUN
        return marlin.interleave_gate_up(*(_padded(half, padding) for half in halves))

    return Codes(columns("qweight"), columns("scales"), None if gate.zeros is None else columns("zeros"))


def split(codes: Codes) -> tuple[Codes, Codes]:
    """Inverse of `interleave`, padding columns included."""

    zeros = (None, None) if codes.zeros is None else marlin.split_gate_up(codes.zeros)
    parts = zip(marlin.split_gate_up(codes.qweight), marlin.split_gate_up(codes.scales), zeros)
    gate, up = (Codes(*part) for part in parts)
    return gate, up


@dataclass(frozen=True)
class MarlinShape:
    """Sizes of a matrix, or of each of a stack of them, in the Marlin layout."""

    bits: int
    in_features: int
    rows: int  # R: K and padding
    columns: int  # N and padding
    group_size: int  # packed row j is of group j // group_size; -1: one group
    with_zeros: bool
    with_perm: bool
    scales_dtype: torch.dtype

    @classmethod
    def of(cls, sources: list[QuantizedSource], out_features: int) -> MarlinShape:
        """Of matrices of `out_features` columns made of `sources`, all of the same in-features and bits."""
        in_features = sources[0].in_features
        group_size = marlin_group_size(tuple({s.grouping for s in sources}))
        assert group_size is not None
        scales_dtype = sources[0].scales_dtype
        for source in sources[1:]:
            scales_dtype = torch.promote_types(scales_dtype, source.scales_dtype)
        return cls(
            sources[0].bits,
            in_features,
            _round_up(max(in_features, *(s.perm.shape[0] for s in sources if s.perm is not None), 0), ROW_MULTIPLE),
            _round_up(out_features, marlin.UNIT_COLUMNS),
            group_size,
            any(s.asymmetric for s in sources),
            any(s.perm is not None for s in sources),
            scales_dtype,
        )

    @property
    def groups(self) -> int:
        return gptq.num_groups(self.rows, self.group_size)

    def tensors(self, names: tuple[str, str, str, str], lead: tuple[int, ...] = ()) -> Shapes:
        """Shape and dtype of the words, scales, zeros and perm, under these names; only those that there are."""
        words, scales, zeros, perm = names
        shapes: Shapes = {
            words: ((*lead, self.rows // marlin.TILE_ROWS, self.columns * self.bits // 2), torch.int32),
            scales: ((*lead, self.groups, self.columns), self.scales_dtype),
        }
        if self.with_zeros:
            shapes[zeros] = ((*lead, self.groups, self.columns * self.bits // 32), torch.int32)
        if self.with_perm:
            shapes[perm] = ((*lead, self.rows), torch.int32)
        return shapes

    def order(self, source: QuantizedSource) -> torch.Tensor:
        """int32 `[R]`: the in-feature of every packed row, -1 for padding."""
        perm = source.perm
        if perm is None:
            perm = torch.arange(self.in_features, dtype=torch.int32)
        return F.pad(perm, (0, self.rows - perm.shape[0]), value=-1)

    def read(self, source: QuantizedSource, device: torch.device) -> Codes:
        """A source's weights on `device`, with a scale for every group of this shape."""
        qweight, scales, zeros = source.codes(device, self.with_zeros)
        first_rows = torch.arange(self.groups, device=device) * max(self.group_size, 0)
        # Groups behind the last one are padding, and so is what they scale.
        group = (first_rows // source.group_size).clamp_max(source.groups - 1)
        return Codes(qweight, scales.to(self.scales_dtype)[group], None if zeros is None else zeros[group])

    def pack(self, codes: Codes, perm: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Words, scales and zeros of one matrix; `perm` is what `order` gave, None when no source has one."""
        padding = self.columns - codes.qweight.shape[1]
        qweight, in_features = _padded(codes.qweight, padding), self.in_features
        if perm is None:
            in_features = self.rows
            qweight = _padded(qweight, 0, self.rows * self.bits // 32 - qweight.shape[0])
        words = ferrum_ops.marlin_repack(qweight, perm, in_features, self.columns, self.bits)
        scales = ferrum_ops.marlin_permute_scales(_padded(codes.scales, padding), self.rows, self.group_size)
        zeros = None
        if codes.zeros is not None:
            zeros = marlin.pack_zeros(_padded(codes.zeros, padding), self.bits)
        return words, scales, zeros

    def unpack(
        self, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, perm: torch.Tensor | None
    ) -> Codes:
        """Inverse of `pack`, padding columns included."""
        in_features = self.rows if perm is None else self.in_features
        qweight = ferrum_ops.marlin_unpack(words, perm, in_features, self.columns, self.bits)
        return Codes(
            qweight[: self.in_features * self.bits // 32],
            ferrum_ops.marlin_unpermute_scales(scales, self.rows, self.group_size),
            None if zeros is None else marlin.unpack_zeros(zeros, self.bits),
        )

    def restore(self, codes: Codes, perm: torch.Tensor | None, saved: SavedLinear) -> dict[str, torch.Tensor]:
        """The on-disk tensors of one linear, on the CPU. `codes` has its columns, and maybe padding behind them."""
        size = self.rows if self.group_size == -1 else self.group_size
        first = torch.arange(saved.groups, device=codes.scales.device) * saved.group_size // size
        scales = codes.scales[first, : saved.out_features]
        if codes.zeros is None:
            zeros = torch.full(scales.shape, 1 << (self.bits - 1), dtype=torch.uint8, device=scales.device)
        else:
            zeros = codes.zeros[first, : saved.out_features]
        if saved.groups == 1:
            g_idx = torch.zeros(saved.in_features, dtype=torch.int32)
        else:
            g_idx = gptq.g_idx_from_perm(perm, saved.group_size, saved.in_features)
        tensors = {
            "qweight": codes.qweight[:, : saved.out_features].contiguous(),
            "qzeros": gptq.encode_zeros(zeros, self.bits, saved.checkpoint_format),
            "scales": scales.to(saved.scales_dtype),
            "g_idx": g_idx,
        }
        return {name: tensor.cpu() for name, tensor in tensors.items()}


def _padded(matrix: torch.Tensor, columns: int, rows: int = 0) -> torch.Tensor:
    """With as many more columns and rows of zeros; itself, where there are none to add."""
    return F.pad(matrix, (0, columns, 0, rows)) if columns or rows else matrix


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
