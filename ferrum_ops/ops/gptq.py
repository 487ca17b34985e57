"""GPTQ weights on their checkpoint layout: dequantise, multiply."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ferrum_ops._library import differentiable, needs_grad, refuse_grad, register
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
            fit, tensors that are not contiguous (CPU, CUDA), and on CPU a g_idx outside `[0, G)`. On another device
            such rows are NaN.
    """
    refuse_grad("gptq_dequantize", scales)
    return torch.ops.ferrum.gptq_dequantize(qweight, qzeros, scales, g_idx, bits, zero_offset, dtype)


def gptq_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bits: int = 4,
    zero_offset: int = 1,
) -> torch.Tensor:
    """`x @ w + bias`, w being what `gptq_dequantize` gives in fp32 for the same tensors, without a copy of w.

    Sums are fp32 and rounded once, to x's dtype. On the CPU a row of the result has the same bits for any number of
    threads and whatever other rows are in x. On CUDA (Triton) the same call gives the same bits; beside 16-bit
    activations, weights are rounded to tf32 where their groups are shorter than 128 in-features (64 for 8 bits) or come
    from g_idx, and not at all elsewhere. NaN and infinity in x spread as in a dense product.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16; on the CPU rows must be contiguous with one stride between them, on
            CUDA rows that do not begin on a multiple of 4 bytes are copied.
        qweight: int32 `[K*bits/32, N]`, codes packed along K.
        qzeros: int32 `[G, N*bits/32]`, zero points packed along N.
        scales: `[G, N]`, float32, float16 or bfloat16.
        g_idx: int32 `[K]`, group of each in-feature, in any order; None means `k // (K / G)`.
        bias: `[N]`, float32, float16 or bfloat16, added before the rounding.
        bits: 2, 3, 4 or 8.
        zero_offset: 1 when qzeros hold `zero - 1` (checkpoint_format "gptq"), 0 when they hold the zero point
            ("gptq_v2").

    Returns:
        `[..., N]`, contiguous, of x's dtype.

    x and bias have gradients; that of x is `grad @ w.T` with the dequantised weights, in fp32.

    Raises:
        RuntimeError: from the CPU kernel, or ValueError from the reference, for bits, dtypes or shapes that do not
            fit, weights that are not contiguous (CPU, CUDA), and on the CPU a g_idx outside `[0, G)`. On another
            device such in-features make the result NaN. RuntimeError when scales require grad.
    """
    refuse_grad("gptq_gemm", scales)
    arguments = (x, qweight, qzeros, scales, g_idx, bias, bits, zero_offset)
    if needs_grad(x, bias):
        return _differentiable_gptq_gemm(*arguments)
    return torch.ops.ferrum.gptq_gemm(*arguments)


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


def check_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> tuple[int, int, int]:
    """(K, N, G); raises ValueError when dtypes or shapes do not fit together."""
    in_features, out_features, groups = gptq.check_tensors("gptq_gemm", qweight, qzeros, scales, g_idx, bits)
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"[gptq_gemm] x: expected floating (..., {in_features}), got {x.dtype} {tuple(x.shape)}")
    if bias is not None and (not bias.is_floating_point() or bias.shape != (out_features,)):
        raise ValueError(f"[gptq_gemm] bias: expected floating ({out_features},), got {bias.dtype} {tuple(bias.shape)}")
    return in_features, out_features, groups


def gptq_gemm_ref(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    zero_offset: int,
) -> torch.Tensor:
    """Computes in float64 when x is."""
    check_gemm(x, qweight, qzeros, scales, g_idx, bias, bits)
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = gptq.dequantize(qweight, qzeros, scales, g_idx, bits, zero_offset, op="gptq_gemm").to(compute)
    out = x.to(compute) @ weight
    if bias is not None:
        out = out + bias.to(compute)
    return out.to(x.dtype)


def gptq_gemm_backward(
    needs: Sequence[bool],
    grads: Sequence[torch.Tensor],
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    zero_offset: int,
) -> tuple[torch.Tensor | None, ...]:
    compute = torch.promote_types(x.dtype, torch.float32)
    grad = grads[0].reshape(-1, scales.shape[1]).to(compute)
    grad_x = None
    if needs[0]:
        weight = torch.ops.ferrum.gptq_dequantize(qweight, qzeros, scales, g_idx, bits, zero_offset, torch.float32)
        grad_x = (grad @ weight.to(compute).T).to(x.dtype).reshape(x.shape)
    grad_bias = grad.sum(0).to(bias.dtype) if bias is not None and needs[5] else None
    return grad_x, *(None,) * 4, grad_bias, None, None


_differentiable_gptq_gemm = differentiable(torch.ops.ferrum.gptq_gemm, gptq_gemm_backward)


def gptq_gemm_fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    zero_offset: int,
) -> torch.Tensor:
    check_gemm(x, qweight, qzeros, scales, g_idx, bias, bits)
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


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


def gptq_gemm_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for rows, (*tensors, g_idx, bits, zero_offset, _) in zip(
        itertools.cycle(((1,), (3, 5), (7,), (2,))), gptq_dequantize_inputs(device, dtype)
    ):
        in_features, out_features = tensors[0].shape[0] * 32 // bits, tensors[0].shape[1]
        x = torch.randn(*rows, in_features, device=device, dtype=dtype)
        bias = torch.randn(out_features, device=device, dtype=dtype) if zero_offset else None
        yield x, *tensors, g_idx, bias, bits, zero_offset
    grouped = random_projection(160, 80, 5, 4, device, torch.bfloat16)
    yield torch.randn(0, 160, device=device, dtype=dtype), *grouped, None, None, 4, 1
    yield torch.randn(9, 200, device=device, dtype=dtype)[:, 13:173], *grouped, None, None, 4, 1


register(
    "gptq_gemm",
    ref=gptq_gemm_ref,
    fake=gptq_gemm_fake,
    inputs=gptq_gemm_inputs,
)
