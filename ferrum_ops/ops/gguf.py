"""Dequantisation of GGUF blocks as files hold them (`ferrum_ops.formats.gguf`).

T rows, K in-features, N out-features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ferrum_ops._library import register
from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats.gguf import BLOCK_SIZES, FLOAT_TYPES, GGMLType


def gguf_dequantize(blocks: torch.Tensor, type: int, dtype: torch.dtype) -> torch.Tensor:
    """Packed rows of any ggml type in `ferrum_ops.formats.gguf.GGMLType` as dense weights.

    blocks uint8 `[..., bytes]`, contiguous, whole blocks in the last dimension. The weights are those of ggml in
    float32, rounded once to dtype: float32, float16 or bfloat16.

    Returns `[..., K]` of dtype. Raises RuntimeError naming the argument for anything else.
    """
    return torch.ops.ferrum.gguf_dequantize(blocks, type, dtype)


def check_type(op: str, name: str, type: int) -> GGMLType:
    if type not in BLOCK_SIZES:
        raise RuntimeError(
            f"[{op}] {name}: expected a ggml type that ferrum_ops.formats.gguf.GGMLType lists, got {int(type)}"
        )
    return GGMLType(type)


def gguf_dequantize_ref(blocks: torch.Tensor, type: int, dtype: torch.dtype) -> torch.Tensor:
    check_type("gguf_dequantize", "type", type)
    return formats.dequantize(blocks, type).to(dtype)


def gguf_dequantize_fake(blocks: torch.Tensor, type: int, dtype: torch.dtype) -> torch.Tensor:
    elements, nbytes = BLOCK_SIZES[type]
    return blocks.new_empty(*blocks.shape[:-1], blocks.shape[-1] // nbytes * elements, dtype=dtype)


def gguf_dequantize_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for type in GGMLType:
        in_features = 100 if type in FLOAT_TYPES else BLOCK_SIZES[type][0] * 3
        yield formats.random_blocks(type, 3, in_features).to(device), int(type), dtype
    yield formats.random_blocks(GGMLType.Q6_K, 4, 256).reshape(2, 2, -1).to(device), int(GGMLType.Q6_K), dtype
    yield torch.empty(0, 288, dtype=torch.uint8, device=device), int(GGMLType.Q4_K), dtype


register("gguf_dequantize", ref=gguf_dequantize_ref, fake=gguf_dequantize_fake, inputs=gguf_dequantize_inputs)
