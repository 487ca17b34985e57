"""GPTQ weights on their checkpoint layout: dequantise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ferrum_ops._library import refuse_grad, register
from ferrum_ops.formats import gptq

OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gptq_dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    bits: int = 4,
    zero_offset: int = 1,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Dense weights `[K, N]` of one GPTQ projection: `(code - zero[g]) * scale[g]`, `g = g_idx[k]`.

    The product is formed in fp32 and rounded once to `dtype`. Layout: see `ferrum_ops.formats.gptq`.

    Args:
        qweight: int32 `[K*bits/32, N]`, codes packed along K.
        qzeros: int32 `[G, N*bits/32]`, zero points packed along N.
        scales: `[G, N]`, float32, float16 or bfloat16.
        g_idx: int32 `[K]`, group of each row; None means `k // (K / G)`.
        bits: 2, 3, 4 or 8.
        zero_offset: 1 when qzeros hold `zero - 1` (checkpoint_format "gptq"), 0 when they hold the zero point
            ("gptq_v2").
        dtype: of the result: float32, float16 or bfloat16.

    Raises:
        RuntimeError: from the CPU kernel, or ValueError from the reference, for bits, dtypes or shapes that do not
            fit, tensors that are not contiguous (CPU), and on CPU a g_idx outside `[0, G)`. On another device such
            rows are NaN.
    """
    refuse_grad("gptq_dequantize", scales)
    return torch.ops.ferrum.gptq_dequantize(qweight, qzeros, scales, g_idx, bits, zero_offset, dtype)


def gptq_dequantize_ref(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Computes in float64 when the scales are; the result has `dtype` all the same."""
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"[gptq_dequantize] dtype: expected float32, float16 or bfloat16, got {dtype}")
    return gptq.dequantize(qweight, qzeros, scales, g_idx, bits, zero_offset).to(dtype)


def gptq_dequantize_fake(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    in_features, out_features, _ = gptq.check_tensors("gptq_dequantize", qweight, qzeros, scales, g_idx, bits)
    return scales.new_empty((in_features, out_features), dtype=dtype)


def random_projection(
    in_features: int,
    out_features: int,
    groups: int,
    bits: int,
    device: str,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random qweight, qzeros and scales: every bit pattern is a valid projection."""

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, device=device).to(torch.int32)

    qweight = words(in_features * bits // 32, out_features)
    qzeros = words(groups, gptq.packed_columns(out_features, bits))
    scales = (torch.rand(groups, out_features, device=device) + 0.01).to(scale_dtype)
    return qweight, qzeros, scales


def gptq_dequantize_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for bits in gptq.SUPPORTED_BITS:
        for zero_offset in (0, 1):
            yield (*random_projection(128, 96, 4, bits, device), None, bits, zero_offset, dtype)
        shuffled = (torch.arange(96, device=device, dtype=torch.int32) % 3)[torch.randperm(96, device=device)]
        yield (*random_projection(96, 45, 3, bits, device), shuffled, bits, 1, dtype)
    one_group = random_projection(64, 600, 1, 4, device, torch.float32)
    yield (*one_group, None, 4, 1, dtype)
    # Groups of 40 rows: the last has 16, which only g_idx can say.
    uneven = torch.arange(96, device=device, dtype=torch.int32) // 40
    yield (*random_projection(96, 7, 3, 4, device, torch.bfloat16), uneven, 4, 0, dtype)
    for in_features, out_features in ((0, 8), (32, 0)):
        yield (*random_projection(in_features, out_features, 1, 4, device), None, 4, 1, dtype)


register(
    "gptq_dequantize",
    ref=gptq_dequantize_ref,
    fake=gptq_dequantize_fake,
    inputs=gptq_dequantize_inputs,
)
