"""Experts' GPTQ weights on their checkpoint layout, on CUDA: how the grouped product is launched."""

from __future__ import annotations

from dataclasses import replace

import torch

from ferrum_ops._checks import ACTIVATION_DTYPES, expect
from ferrum_ops.formats import gptq as formats
from ferrum_ops.ops.moe_gemm import check_gptq_moe_gemm
from ferrum_ops.triton import gptq, launch
from ferrum_ops.triton import gptq_kernels as kernels
from ferrum_ops.triton.gptq import GemmConfig, codes_per_period
from ferrum_ops.triton.gptq_kernels import FROM_G_IDX, ONE_PER_PERIOD, ONE_PER_TILE, PERIODS
from ferrum_ops.triton.launch import Binary, Target, cdiv


def pick_gptq_moe_gemm_config(
    blocks: int,
    block_size: int,
    in_features: int,
    out_features: int,
    bits: int,
    group_size: int,
    has_g_idx: bool,
    dtype: torch.dtype,
    target: Target,
) -> GemmConfig:
    """For `blocks` of `block_size` rows each; the other arguments as in `pick_gptq_gemm_config`."""
    groups = gptq.groups_of(in_features, bits, group_size, has_g_idx, dtype)
    if groups == ONE_PER_PERIOD.value:  # too rare in experts for binaries of its own
        groups = FROM_G_IDX.value
    config = _tile_of(groups, bits, dtype, few_rows=block_size <= 16)
    tiles = blocks * cdiv(block_size, config.block_m) * cdiv(out_features, config.block_n)
    return gptq.split(config, tiles, in_features // codes_per_period(bits), target)


def _tile_of(groups: int, bits: int, dtype: torch.dtype, few_rows: bool) -> GemmConfig:
    config = gptq.tile_of(groups, dtype, few_rows)
    if groups != FROM_G_IDX.value or bits != 3:
        return config
    # Scales of their own for each period of 3 bits leave registers for half as many rows, and in float32 columns.
    config = replace(config, block_m=16)
    return replace(config, block_n=32, num_warps=4) if dtype == torch.float32 else config


def _binary(config: GemmConfig, bits: int, dtype: torch.dtype) -> Binary:
    return Binary.of(
        kernels.gptq_moe_gemm_kernel,
        config.num_warps,
        config.num_stages,
        DTYPE=gptq.DTYPES[dtype],
        BITS=bits,
        GROUPS=config.groups,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )


def binaries(capability: int) -> dict[Binary, dict[str, str]]:
    """All that the launcher here can ask for, on any capability, with the types of the arguments for float16 scales."""
    words = dict.fromkeys(("x_ptr", "qweight_ptr", "qzeros_ptr", "g_idx_ptr"), "*i32")
    blocks = dict.fromkeys(("sorted_ptr", "block_ids_ptr", "total_ptr"), "*i32")
    found: dict[Binary, dict[str, str]] = {}
    for dtype, tl_dtype in gptq.DTYPES.items():
        out = f"*{tl_dtype}"
        others = {"scales_ptr": "*fp16", "bias_ptr": out, "weights_ptr": "*fp32", "out_ptr": out}
        for bits in formats.SUPPORTED_BITS:
            for groups in (ONE_PER_TILE.value, FROM_G_IDX.value):
                for few_rows in (True, False):
                    if groups == FROM_G_IDX.value or dtype != torch.float32:
                        binary = _binary(_tile_of(groups, bits, dtype, few_rows), bits, dtype)
                        found[binary] = {**words, **blocks, **others, "partial_ptr": "*fp32"}
        found[gptq.reduce_binary(dtype)] = {"partial_ptr": "*fp32", "bias_ptr": out, "out_ptr": out}
    return found


def gptq_moe_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    sorted_token_ids: torch.Tensor,
    block_ids: torch.Tensor,
    total_post_pad: torch.Tensor,
    topk_weights: torch.Tensor | None,
    top_k: int,
    block_size: int,
    bits: int,
    zero_offset: int,
) -> torch.Tensor:
    op, routed = "gptq_moe_gemm", (sorted_token_ids, block_ids, total_post_pad)
    experts, in_features, out_features, groups = check_gptq_moe_gemm(
        x, qweight, qzeros, scales, g_idx, bias, *routed, topk_weights, top_k, block_size, bits
    )
    expect(x.dtype in ACTIVATION_DTYPES, op, "x", "float32, float16 or bfloat16", x.dtype)
    expect(bias is None or bias.dtype in ACTIVATION_DTYPES, op, "bias", "float32, float16 or bfloat16", bias)
    gptq.check_kernel_takes(op, qweight, qzeros, scales, zero_offset)
    rows, blocks = x.shape[0] * top_k, block_ids.numel()
    out = x.new_zeros((rows, out_features))
    if out.numel() == 0 or experts == 0 or blocks == 0:
        return out
    group_size = max(in_features // max(groups, 1), 1)
    # No more blocks are in use than there are rows.
    config = pick_gptq_moe_gemm_config(
        min(blocks, rows),
        block_size,
        in_features,
        out_features,
        bits,
        group_size,
        g_idx is not None,
        x.dtype,
        launch.target_of(x),
    )
    order = qweight if g_idx is None else g_idx.contiguous()
    order_stride = 0 if g_idx is None else in_features
    if g_idx is None and config.groups == FROM_G_IDX.value:
        order = torch.arange(in_features, device=x.device, dtype=torch.int32) // group_size
    words = gptq.words_of(x)
    in_splits = config.splits > 1
    partial = x.new_zeros((config.splits, rows, out_features) if in_splits else 0, dtype=torch.float32)
    periods = in_features // codes_per_period(bits)
    parts = cdiv(block_size, config.block_m)
    launch.run(
        _binary(config, bits, x.dtype),
        (blocks * parts, cdiv(out_features, config.block_n), config.splits),
        words,
        qweight,
        qzeros,
        scales,
        order,
        out if bias is None else bias.contiguous(),
        *routed,
        partial if topk_weights is None else topk_weights,
        out,
        partial,
        rows,
        top_k,
        block_size,
        sorted_token_ids.numel(),
        experts,
        words.stride(0),
        periods,
        out_features,
        groups,
        group_size,
        qzeros.shape[2],
        zero_offset,
        order_stride,
        0 if bias is None else out_features,
        int(topk_weights is not None),
        cdiv(cdiv(periods, PERIODS.value), config.splits),
    )
    if in_splits:
        launch.run(
            gptq.reduce_binary(x.dtype),
            (cdiv(out.numel(), gptq.REDUCE_BLOCK),),
            partial,
            out,
            out,
            rows,
            out_features,
            0,
            config.splits,
        )
    return out
