"""GPTQ weights on their checkpoint layout, on CUDA: which kernel is launched how."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton.language as tl

from ferrum_ops._checks import ACTIVATION_DTYPES, expect
from ferrum_ops.formats import gptq
from ferrum_ops.ops.gptq import check_gemm
from ferrum_ops.triton import gptq_kernels as kernels
from ferrum_ops.triton import launch
from ferrum_ops.triton.gptq_kernels import FROM_G_IDX, ONE_PER_PERIOD, ONE_PER_TILE, PERIODS
from ferrum_ops.triton.launch import Binary, Target, cdiv

MAX_SPLITS = 16
REDUCE_BLOCK = 1024
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class GemmConfig:
    """How a product is launched. Where K is in several splits, a second kernel adds their sums."""

    groups: int  # ONE_PER_TILE, ONE_PER_PERIOD or FROM_G_IDX
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: int = 1


def pick_gptq_gemm_config(
    rows: int,
    in_features: int,
    out_features: int,
    bits: int,
    group_size: int,
    has_g_idx: bool,
    dtype: torch.dtype,
    target: Target,
) -> GemmConfig:
    """For x `[rows, in_features]`; `group_size` is K / G (anything with g_idx)."""
    config = tile_of(groups_of(in_features, bits, group_size, has_g_idx, dtype), dtype, few_rows=rows <= 16)
    blocks = cdiv(rows, config.block_m) * cdiv(out_features, config.block_n)
    return split(config, blocks, in_features // codes_per_period(bits), target)


def split(config: GemmConfig, blocks: int, periods: int, target: Target) -> GemmConfig:
    """`config` with K in as many splits as `blocks` of the result leave room for."""
    tiles = cdiv(periods, PERIODS.value)
    # Three blocks for each multiprocessor, of two tiles of K or more: a shorter loop would only fill its pipeline.
    wanted = max(1, min(3 * target.multiprocessors // max(blocks, 1), tiles // 2, MAX_SPLITS))
    return replace(config, splits=max(1, cdiv(tiles, max(1, cdiv(tiles, wanted)))))


def codes_per_period(bits: int) -> int:
    return min(8, 32 // bits)


def groups_of(in_features: int, bits: int, group_size: int, has_g_idx: bool, dtype: torch.dtype) -> int:
    codes = codes_per_period(bits)
    if has_g_idx or dtype == torch.float32:
        return FROM_G_IDX.value
    if group_size == in_features or group_size % (PERIODS.value * codes) == 0:
        return ONE_PER_TILE.value
    # Periods of 3 bits and their scales together are more than a thread has registers for.
    return (ONE_PER_PERIOD if group_size % codes == 0 and bits != 3 else FROM_G_IDX).value


def tile_of(groups: int, dtype: torch.dtype, few_rows: bool) -> GemmConfig:
    if groups == FROM_G_IDX.value:
        # Nothing is fetched ahead: each plane has scales of its own, more than shared memory has room for.
        return GemmConfig(groups, 32, 64, num_warps=8 if dtype == torch.float32 else 4, num_stages=1)
    if groups == ONE_PER_PERIOD.value:
        return GemmConfig(groups, 16 if few_rows else 32, 64, num_warps=4, num_stages=2)
    # With few rows, three blocks on a multiprocessor each have 24 KB of words on their way.
    m, warps, stages = (16, 4, 4) if few_rows else (64, 8, 3)
    return GemmConfig(groups, m, 128, warps, stages)


def _gemm_binary(config: GemmConfig, bits: int, dtype: torch.dtype) -> Binary:
    return Binary.of(
        kernels.gptq_gemm_kernel,
        config.num_warps,
        config.num_stages,
        DTYPE=DTYPES[dtype],
        BITS=bits,
        GROUPS=config.groups,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )


def reduce_binary(dtype: torch.dtype) -> Binary:
    return Binary.of(kernels.gptq_reduce_kernel, 4, 1, DTYPE=DTYPES[dtype], BLOCK=REDUCE_BLOCK)


def _dequantize_binary(bits: int, has_g_idx: bool, dtype: torch.dtype) -> Binary:
    return Binary.of(
        kernels.gptq_dequantize_kernel,
        4,
        1,
        DTYPE=DTYPES[dtype],
        BITS=bits,
        HAS_G_IDX=has_g_idx,
        BLOCK_PERIODS=4,
        BLOCK_N=128,
    )


def binaries(capability: int) -> dict[Binary, dict[str, str]]:
    """Everything the launchers here can ask for, on any capability, with the types of the arguments for float16
    scales."""
    pointers = {"qweight_ptr": "*i32", "qzeros_ptr": "*i32", "scales_ptr": "*fp16", "g_idx_ptr": "*i32"}
    found: dict[Binary, dict[str, str]] = {}
    for dtype, tl_dtype in DTYPES.items():
        out = f"*{tl_dtype}"
        for bits in gptq.SUPPORTED_BITS:
            for groups in (ONE_PER_TILE.value, ONE_PER_PERIOD.value, FROM_G_IDX.value):
                if (groups != FROM_G_IDX.value and dtype == torch.float32) or (
                    groups == ONE_PER_PERIOD.value and bits == 3
                ):
                    continue
                for few_rows in (True, False):
                    binary = _gemm_binary(tile_of(groups, dtype, few_rows), bits, dtype)
                    others = {"x_ptr": "*i32", "bias_ptr": out, "out_ptr": out, "partial_ptr": "*fp32"}
                    found[binary] = {**pointers, **others}
            for has_g_idx in (True, False):
                found[_dequantize_binary(bits, has_g_idx, dtype)] = {**pointers, "out_ptr": out}
        found[reduce_binary(dtype)] = {"partial_ptr": "*fp32", "bias_ptr": out, "out_ptr": out}
    return found


def check_kernel_takes(
    op: str, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, zero_offset: int
) -> None:
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales)):
        expect(tensor.is_contiguous(), op, name, "a contiguous tensor", f"strides {tuple(tensor.stride())}")
    expect(scales.dtype in ACTIVATION_DTYPES, op, "scales", "float32, float16 or bfloat16", scales.dtype)
    expect(zero_offset in (0, 1), op, "zero_offset", "0 or 1", zero_offset)


def gptq_dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    op = "gptq_dequantize"
    in_features, out_features, groups = gptq.check_tensors(op, qweight, qzeros, scales, g_idx, bits)
    expect(dtype in DTYPES, op, "dtype", "float32, float16 or bfloat16", dtype)
    check_kernel_takes(op, qweight, qzeros, scales, zero_offset)
    out = scales.new_empty((in_features, out_features), dtype=dtype)
    if out.numel():
        binary = _dequantize_binary(bits, g_idx is not None, dtype)
        constants = dict(binary.constants)
        periods = in_features // codes_per_period(bits)
        launch.run(
            binary,
            (cdiv(out_features, constants["BLOCK_N"]), cdiv(periods, constants["BLOCK_PERIODS"])),
            qweight,
            qzeros,
            scales,
            qweight if g_idx is None else g_idx.contiguous(),
            out,
            periods,
            out_features,
            groups,
            in_features // groups,
            qzeros.shape[1],
            zero_offset,
        )
    return out


def words_of(x: torch.Tensor) -> torch.Tensor:
    """x `[rows, K]` as 32-bit words. Rows that do not start on one are copied."""
    if x.numel() == 0:
        return x.new_empty(x.shape, dtype=torch.int32)
    lanes = 4 // x.element_size()
    if x.stride(1) != 1 or x.stride(0) % lanes or x.storage_offset() % lanes:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int32)


def gptq_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    zero_offset: int,
) -> torch.Tensor:
    op = "gptq_gemm"
    in_features, out_features, groups = check_gemm(x, qweight, qzeros, scales, g_idx, bias, bits)
    expect(x.dtype in ACTIVATION_DTYPES, op, "x", "float32, float16 or bfloat16", x.dtype)
    expect(bias is None or bias.dtype in ACTIVATION_DTYPES, op, "bias", "float32, float16 or bfloat16", bias)
    check_kernel_takes(op, qweight, qzeros, scales, zero_offset)
    out = x.new_empty((*x.shape[:-1], out_features))
    if out.numel() == 0:
        return out
    rows, group_size = out.numel() // out_features, in_features // max(groups, 1)
    config = pick_gptq_gemm_config(
        rows, in_features, out_features, bits, group_size, g_idx is not None, x.dtype, launch.target_of(x)
    )
    if g_idx is None and config.groups == FROM_G_IDX.value:
        g_idx = torch.arange(in_features, device=x.device, dtype=torch.int32) // max(group_size, 1)
    words = words_of(x.reshape(rows, in_features))
    in_splits = config.splits > 1
    partial = x.new_empty((config.splits, rows, out_features) if in_splits else 0, dtype=torch.float32)
    tail = (out if bias is None else bias.contiguous(), out)
    bias_size = 0 if bias is None else out_features
    periods = in_features // codes_per_period(bits)
    launch.run(
        _gemm_binary(config, bits, x.dtype),
        (cdiv(rows, config.block_m) * cdiv(out_features, config.block_n), config.splits),
        words,
        qweight,
        qzeros,
        scales,
        qweight if g_idx is None else g_idx.contiguous(),
        *tail,
        partial,
        rows,
        words.stride(0),
        periods,
        out_features,
        groups,
        max(group_size, 1),
        qzeros.shape[1],
        zero_offset,
        bias_size,
        cdiv(cdiv(periods, PERIODS.value), config.splits),
    )
    if in_splits:
        launch.run(
            reduce_binary(x.dtype),
            (cdiv(out.numel(), REDUCE_BLOCK),),
            partial,
            *tail,
            rows,
            out_features,
            bias_size,
            config.splits,
        )
    return out
