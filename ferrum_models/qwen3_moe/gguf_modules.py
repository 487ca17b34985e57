"""Modules whose weights are GGUF blocks: views of the mapped file, or tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import ferrum_ops
from ferrum_models.quantization.modules import _FormatModule
from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats.gguf_tiles import TILED
from ferrum_ops.ops.gguf import in_features, num_rows


class _GgufModule(_FormatModule):
    """Keeps the dtype its weights would have if they were dense; `.to(dtype)` changes that and leaves the blocks."""

    layout = "gguf"
    dtype: torch.dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class GgufLinear(_GgufModule):
    """`x @ W.T` with the rows of one or more packed matrices: `blocks_i` uint8 `[N_i, bytes]` of `types[i]`, or tiles
    `[N_i/16, bytes]`.
    """

    op = "gguf_linear"

    def __init__(
        self, blocks: Sequence[torch.Tensor], types: Sequence[int], activation: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype = dtype
        for i, tensor in enumerate(blocks):
            self.register_buffer(f"blocks_{i}", tensor)
        self.types = tuple(int(t) for t in types)
        self.in_features = in_features(blocks[0], self.types[0])
        self.out_features = sum(num_rows(tensor.shape[0], type) for tensor, type in zip(blocks, self.types))
        self.activation = activation

    def blocks(self) -> list[torch.Tensor]:
        return [self.get_buffer(f"blocks_{i}") for i in range(len(self.types))]

    @property
    def op_weights(self) -> tuple[list[torch.Tensor], tuple[int, ...]]:
        """What ops take of this matrix: blocks and types."""
        return self.blocks(), self.types

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """What the op takes behind x."""
        return *self.op_weights, None, self.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ferrum_ops.gguf_linear(x.contiguous(), *self.op_arguments)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight `[N, K]`, dequantised now."""
        parts = zip(self.blocks(), self.types)
        return torch.cat([ferrum_ops.gguf_dequantize(blocks, type, self.dtype) for blocks, type in parts])

    @property
    def bias(self) -> None:
        return None

    def set_activation(self, name: str) -> None:
        self.activation = name

    def extra_repr(self) -> str:
        names = ", ".join(formats.GGMLType(t % TILED).name + " tiles" * (t >= TILED) for t in self.types)
        return f"in_features={self.in_features}, out_features={self.out_features}, types={names}"


class GgufEmbedding(_GgufModule):
    """Rows of a packed table, dequantised when they are looked up. `blocks` uint8 `[vocabulary, bytes]`."""

    blocks: torch.Tensor

    def __init__(self, blocks: torch.Tensor, type: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("blocks", blocks)
        self.type, self.dtype = int(type), dtype

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.embedding(input_ids, self.blocks)
        return ferrum_ops.gguf_dequantize(rows, self.type, self.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The dense table, dequantised now."""
        return ferrum_ops.gguf_dequantize(self.blocks, self.type, self.dtype)

    def extra_repr(self) -> str:
        return f"rows={self.blocks.shape[0]}, type={formats.GGMLType(self.type).name}"
