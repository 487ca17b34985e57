"""Routed experts: the whole block over int4 weights as one op (CPU), and one product grouped by expert, in the Marlin
layout for tensor cores or over GPTQ words as they lie in a checkpoint.

T tokens, H hidden, I expert width, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ferrum_ops._library import refuse_grad, register
from ferrum_ops.formats import gptq, marlin
from ferrum_ops.formats import int4 as layout
from ferrum_ops.ops.gptq import random_projection
from ferrum_ops.ops.int4 import (
    ACTIVATIONS,
    check_activation,
    compute_dtype,
    gather_channels,
    multiply_packed,
    random_matrix,
)
from ferrum_ops.ops.marlin import check_bias, check_product, gather_packed_rows, random_marlin_experts
from ferrum_ops.ops.moe_routing import check_blocks, expert_of_rows, moe_align_block_size_ref

#: What happens to a product's sums before they are rounded.
EPILOGUES = ("none", "silu_mul")
#: Rows of a product that can be added up to one of the result.
MAX_SLOTS = 1024


def moe_experts_int4(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w13_zeros: torch.Tensor | None,
    w13_perm: torch.Tensor | None,
    w13_group_size: int,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    w2_zeros: torch.Tensor | None,
    w2_perm: torch.Tensor | None,
    w2_group_size: int,
    intermediate_size: int,
    activation: str,
) -> torch.Tensor:
    """The routed experts of one layer, `[T, H] -> [T, H]`.

    `out[t] = sum_k topk_weights[t, k] * down(silu(gate(hidden[t])) * up(hidden[t]))`, the projections being those of
    expert `topk_ids[t, k]`. hidden float32, float16 or bfloat16 `[T, H]`; topk_ids int32 and topk_weights float32
    `[T, K]`; a slot whose id lies outside `[0, E)` (padding, another rank's expert) adds nothing. Weights in the layout
    of `ferrum_ops.formats.int4`, with group sizes that are multiples of 8 from 8 to 128:

    - w13 uint8 `[E, 2*I_pad/16, H_packed/8, 64]`, tile 2j holding gate columns 16j..16j+15 and tile 2j+1 the same
      columns of up; w13_scales float16 and w13_zeros uint8 `[E, 2*I_pad/16, G, 16]`; w13_perm int32 `[E, P, H_packed]`,
      P = 1 when gate and up share it, else 2 (gate, up).
    - w2 uint8 `[E, H_pad/16, I_packed/8, 64]`, scales and zeros alike; w2_perm int32 `[E, I_packed]`.

    Everything between hidden and the result is fp32 and rounded once, to hidden's dtype; slots are added in ascending
    k. activation "int8" or "full" as in `int4_linear`, for both products: the intermediate is quantised again. The
    result for a token does not depend on the other tokens or the number of threads, and for "int8" not on the
    instruction level. NaN in a token makes its result NaN.

    Raises RuntimeError naming the argument for other dtypes and shapes, for a permutation entry of an expert in use
    outside its range, and when an input requires grad.
    """
    refuse_grad("moe_experts_int4", hidden, topk_weights)
    return torch.ops.ferrum.moe_experts_int4(
        hidden,
        topk_ids,
        topk_weights,
        w13,
        w13_scales,
        w13_zeros,
        w13_perm,
        w13_group_size,
        w2,
        w2_scales,
        w2_zeros,
        w2_perm,
        w2_group_size,
        intermediate_size,
        activation,
    )


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
    bits: int = 4,
    zero_offset: int = 1,
) -> torch.Tensor:
    """Every row of x times the matrices of its experts, over stacked GPTQ words as they lie in a checkpoint.

    Row p of the result, of P = M * top_k, is `(x[p // top_k] @ w[e] + bias[e]) * topk_weights.flatten()[p]`, where e is
    the expert of the block in which sorted_token_ids names p, and w[e] what `gptq_dequantize` gives in fp32. How a
    routed block uses it, and what a row is that no block names, is as in `marlin_moe_gemm`. Sums are fp32 and so is
    everything after them, until one rounding; what CUDA rounds before is what `gptq_gemm` rounds there, except that
    groups need 128 in-features (64 for 8 bits) to go without.

    Args:
        x: `[M, K]`, float32, float16 or bfloat16; on CUDA rows that do not begin on a multiple of 4 bytes are copied.
        qweight: int32 `[E, K*bits/32, N]`; this, qzeros, scales and g_idx as in `gptq_gemm`, each with a leading
            dimension E.
        qzeros: int32 `[E, G, N*bits/32]`.
        scales: `[E, G, N]`, float32, float16 or bfloat16.
        g_idx: int32 `[E, K]`: each expert has an act-order of its own; None means `k // (K / G)`.
        bias: floating `[E, N]`.
        sorted_token_ids, block_ids, total_post_pad: as in `marlin_moe_gemm`, from `moe_align_block_size`.
        topk_weights: float32 with P elements in any shape, contiguous. None: no product with the router's weight.
        top_k: rows of the result per row of x, at least 1.
        block_size: 8, 16, 32, 48, 64 or 128, the one given to `moe_align_block_size`.
        bits: 2, 3, 4 or 8.
        zero_offset: 1 when qzeros hold `zero - 1` (checkpoint_format "gptq"), 0 when they hold the zero point
            ("gptq_v2").

    Returns:
        `[M * top_k, N]`, contiguous, of x's dtype.

    Raises ValueError for bits, sizes, shapes or dtypes that do not fit, and on the CPU for a g_idx outside `[0, G)`; on
    another device such in-features make the rows of their expert NaN. RuntimeError for weights that are not contiguous
    (CUDA), and when x, scales, bias or topk_weights require grad.
    """
    refuse_grad("gptq_moe_gemm", x, scales, bias, topk_weights)
    weights, blocks = (qweight, qzeros, scales, g_idx, bias), (sorted_token_ids, block_ids, total_post_pad)
    return torch.ops.ferrum.gptq_moe_gemm(x, *weights, *blocks, topk_weights, top_k, block_size, bits, zero_offset)


def marlin_moe_gemm(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    sorted_token_ids: torch.Tensor,
    block_ids: torch.Tensor,
    total_post_pad: torch.Tensor,
    topk_weights: torch.Tensor | None,
    workspace: torch.Tensor,
    top_k: int,
    block_size: int,
    out_features: int,
    group_size: int,
    bits: int = 4,
    epilogue: str = "none",
    reduction: str = "fp32",
    max_sms: int = 0,
    slots: int = 1,
) -> torch.Tensor:
    """Every row of x times the matrices of its experts, in the Marlin layout.

    Row p of the result, of P = M * top_k, is `epilogue(x[p // top_k] @ w[e] + bias[e]) * topk_weights.flatten()[p]`,
    where e is the expert of the block in which sorted_token_ids names p. Sums are fp32 and so is everything after them,
    until one rounding. How a routed block uses it:

    - gate and up: x is hidden `[T, H]`, top_k is K and p = t*K + j, the pair ids of `moe_align_block_size`;
    - down: x is what the first product gave, `[P, I]`, with top_k 1, the same ids, and topk_weights; with slots K, the
      result is the block's;
    - rows gathered beforehand (`pair_ids=False`): x is `[P, ...]` in packed order, top_k is 1.

    A row is zero when no block names it, or only a block without an expert: pairs of other ranks, which
    `moe_align_block_size` leaves out, add nothing to a sum over slots, whatever their weight.

    With slots S, row t of the result is the sum of rows t*S to t*S + S - 1, added in this order in fp32 before the one
    rounding. On CUDA the last block to finish columns of the product does it: worth it where rows are few, as it has
    float32 sums of all rows written and read.

    Args:
        x: `[M, K]`, float16 or bfloat16 (the reference takes any floating dtype), contiguous in the last dimension.
        packed: int32 `[E, R/16, N*bits/2]`; scales, zeros, perm, group_size, bits and views as in `marlin_gemm`, each
            with a leading dimension E: scales `[E, G, N]`, zeros int32 `[E, G, N*bits/32]`, perm int32 `[E, R]`.
        scales: see packed.
        zeros: see packed.
        perm: see packed.
        bias: floating `[E, columns of the product]`.
        sorted_token_ids: int32 `[C]`: block i is `[i*block_size, (i+1)*block_size)`. An entry outside `[0, P)`, such as
            the sentinel P, is padding. Every row may occur once.
        block_ids: int32 `[ceil(C/block_size)]`: the expert of each block. A block outside `[0, E)`, such as -1, has
            none: its rows are zero.
        total_post_pad: int32 `[1]`: entries of sorted_token_ids from here on are not looked at, nor their blocks.
        topk_weights: float32 with P elements in any shape, contiguous. None: no product with the router's weight.
        workspace: int32, from `marlin_workspace`; zero before the call and after it. Sums over slots need a counter for
            every 64 columns of the product (CUDA).
        top_k: rows of the result per row of x, at least 1.
        block_size: 8, 16, 32, 48, 64 or 128, the one given to `moe_align_block_size`.
        out_features: columns of the result.
        group_size: see packed.
        bits: 4 or 8.
        epilogue: "none": the product has out_features columns. "silu_mul": it has those of gate and up, interleaved
            in runs of 8 (`formats.marlin.interleave_gate_up`), `2 * out_features` with out_features rounded up to 8,
            and the result is `silu(gate) * up`.
        reduction: see `marlin_gemm`.
        max_sms: see `marlin_gemm`.
        slots: rows of the product that are added up to one of the result: a divisor of P, from 1 to 1024.

    Returns:
        `[M * top_k / slots, out_features]`, contiguous, of x's dtype.

    Raises ValueError for sizes, shapes, dtypes or strides that do not fit, and on the CPU for a perm with an entry
    outside `[-1, K)`; on another device such an entry makes a padding row. RuntimeError when x, bias or topk_weights
    require grad.
    """
    refuse_grad("marlin_moe_gemm", x, bias, topk_weights)
    return torch.ops.ferrum.marlin_moe_gemm(
        x,
        packed,
        scales,
        zeros,
        perm,
        bias,
        sorted_token_ids,
        block_ids,
        total_post_pad,
        topk_weights,
        workspace,
        top_k,
        block_size,
        out_features,
        group_size,
        bits,
        epilogue,
        reduction,
        max_sms,
        slots,
    )


def product_columns(out_features: int, epilogue: str) -> int:
    """Columns of the product behind a result of `out_features`."""
    if epilogue == "none":
        return out_features
    return 2 * (-(-out_features // marlin.GATE_RUN) * marlin.GATE_RUN)


def marlin_moe_gemm_ref(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    sorted_token_ids: torch.Tensor,
    block_ids: torch.Tensor,
    total_post_pad: torch.Tensor,
    topk_weights: torch.Tensor | None,
    workspace: torch.Tensor,
    top_k: int,
    block_size: int,
    out_features: int,
    group_size: int,
    bits: int,
    epilogue: str,
    reduction: str,
    max_sms: int,
    slots: int,
) -> torch.Tensor:
    """Computes in float64 when x is. Expert by expert; the host waits for the device."""
    op = "marlin_moe_gemm"
    if epilogue not in EPILOGUES:
        raise ValueError(f"[{op}] epilogue: expected one of {EPILOGUES}, got {epilogue!r}")
    if x.dim() != 2 or top_k < 1:
        raise ValueError(f"[{op}] x, top_k: expected (M, K) and at least 1, got {tuple(x.shape)} and {top_k}")
    experts, rows, columns = packed.shape[:1], x.shape[0] * top_k, product_columns(out_features, epilogue)
    check_product(
        op, x, packed, scales, zeros, perm, workspace, columns, group_size, bits, reduction, max_sms, tuple(experts)
    )
    check_bias(op, bias, (*experts, columns))
    if not 1 <= slots <= MAX_SLOTS or rows % slots:
        expected = f"a divisor of {rows} rows, from 1 to {MAX_SLOTS}"
        raise ValueError(f"[{op}] slots: expected {expected}, got {slots}")
    check_blocks(op, rows, sorted_token_ids, block_ids, total_post_pad, topk_weights, block_size)
    compute = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(rows, out_features, dtype=compute, device=x.device)
    of_row = expert_of_rows(rows, experts.numel(), sorted_token_ids, block_ids, total_post_pad, block_size)
    for e in range(experts.numel()):
        mine = torch.nonzero(of_row == e).flatten()
        if mine.numel() == 0:
            continue
        weight = marlin.dequantize(
            packed[e], scales[e], None if zeros is None else zeros[e], group_size, bits, compute, op
        )
        activations = gather_packed_rows(
            x[mine // top_k].to(compute), None if perm is None else perm[e], weight.shape[0]
        )
        product = activations @ weight[:, :columns]
        if bias is not None:
            product = product + bias[e].to(compute)
        if epilogue == "silu_mul":
            gate, up = marlin.split_gate_up(product)
            product = (F.silu(gate) * up)[:, :out_features]
        if topk_weights is not None:
            product = product * topk_weights.flatten()[mine].to(compute).unsqueeze(-1)
        out[mine] = product
    total, *others = out.view(rows // slots, slots, out_features).unbind(1)
    for slot in others:
        total = total + slot
    return total.to(x.dtype)


def marlin_moe_gemm_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    sorted_token_ids: torch.Tensor,
    block_ids: torch.Tensor,
    total_post_pad: torch.Tensor,
    topk_weights: torch.Tensor | None,
    workspace: torch.Tensor,
    top_k: int,
    block_size: int,
    out_features: int,
    *rest: Any,
) -> torch.Tensor:
    slots = rest[-1]
    return x.new_empty((x.shape[0] * top_k // slots, out_features))


def marlin_moe_gemm_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    workspace = torch.zeros(16, dtype=torch.int32, device=device)
    cases = (
        # (T, top-k, E, K, out), (group size, bits, block size), asymmetric, act-order, epilogue, slots
        ((5, 3, 4, 64, 128), (32, 4, 8), True, False, "none", 1),
        ((7, 2, 4, 48, 32), (-1, 4, 16), False, True, "silu_mul", 1),
        ((33, 1, 2, 32, 64), (16, 8, 32), True, True, "none", 1),
        ((0, 2, 3, 32, 64), (16, 4, 48), False, False, "none", 2),
        ((6, 2, 4, 64, 128), (32, 4, 8), False, True, "none", 2),
    )
    for (tokens, top_k, experts, width, out), shape, asymmetric, act_order, epilogue, slots in cases:
        group_size, bits, block_size = shape
        columns = product_columns(out, epilogue)
        stack = random_marlin_experts(
            experts, width, columns, group_size, bits, device, asymmetric=asymmetric, act_order=act_order
        )
        ids = torch.randint(-1, experts + 1, (tokens, top_k), device=device).to(torch.int32)
        blocks = moe_align_block_size_ref(ids, experts, block_size, True, None)
        x = torch.randn(tokens, width, device=device, dtype=dtype)
        bias = torch.randn(experts, columns, device=device, dtype=dtype) if asymmetric else None
        weights = torch.rand(tokens, top_k, device=device) if act_order else None
        sizes = (top_k, block_size, out, group_size, bits)
        yield x, *stack, bias, *blocks, weights, workspace, *sizes, epilogue, "fp32", 0, slots


def check_gptq_moe_gemm(
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
) -> tuple[int, int, int, int]:
    """(E, K, N, G); raises ValueError when dtypes or shapes do not fit together."""
    op = "gptq_moe_gemm"
    experts, in_features, out_features, groups = gptq.check_stack(op, qweight, qzeros, scales, g_idx, bits)
    if not x.is_floating_point() or x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(f"[{op}] x: expected floating (M, {in_features}), got {marlin.describe(x)}")
    if top_k < 1:
        raise ValueError(f"[{op}] top_k: expected at least 1, got {top_k}")
    if bias is not None and (not bias.is_floating_point() or bias.shape != (experts, out_features)):
        raise ValueError(f"[{op}] bias: expected floating ({experts}, {out_features}), got {marlin.describe(bias)}")
    blocks = (sorted_token_ids, block_ids, total_post_pad)
    check_blocks(op, x.shape[0] * top_k, *blocks, topk_weights, block_size)
    return experts, in_features, out_features, groups


def gptq_moe_gemm_ref(
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
    """Computes in float64 when x is. Expert by expert; the host waits for the device."""
    op, blocks = "gptq_moe_gemm", (sorted_token_ids, block_ids, total_post_pad)
    experts, _, out_features, _ = check_gptq_moe_gemm(
        x, qweight, qzeros, scales, g_idx, bias, *blocks, topk_weights, top_k, block_size, bits
    )
    compute = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape[0] * top_k, out_features, dtype=compute, device=x.device)
    of_row = expert_of_rows(out.shape[0], experts, *blocks, block_size)
    for e in range(experts):
        mine = torch.nonzero(of_row == e).flatten()
        if mine.numel() == 0:
            continue
        order = None if g_idx is None else g_idx[e]
        weight = gptq.dequantize(qweight[e], qzeros[e], scales[e], order, bits, zero_offset, op=op).to(compute)
        product = x[mine // top_k].to(compute) @ weight
        if bias is not None:
            product = product + bias[e].to(compute)
        if topk_weights is not None:
            product = product * topk_weights.flatten()[mine].to(compute).unsqueeze(-1)
        out[mine] = product
    return out.to(x.dtype)


def gptq_moe_gemm_fake(
    x: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *rest: Any
) -> torch.Tensor:
    top_k = rest[6]
    return x.new_empty((x.shape[0] * top_k, scales.shape[-1]))


def random_gptq_experts(
    num_experts: int, in_features: int, out_features: int, groups: int, bits: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random stacks of qweight, qzeros and scales."""
    each = [random_projection(in_features, out_features, groups, bits, device) for _ in range(num_experts)]
    qweight, qzeros, scales = map(torch.stack, zip(*each))
    return qweight, qzeros, scales


def gptq_moe_gemm_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    cases = (
        # T, top-k, E, K, N, groups, bits, block size, act-order, biased and weighted
        (5, 3, 4, 128, 72, 1, 4, 8, False, True),
        (7, 2, 3, 96, 45, 3, 3, 16, True, False),
        (33, 1, 2, 64, 64, 2, 8, 32, False, False),
        (20, 2, 2, 128, 40, 1, 2, 48, False, True),
        (0, 2, 3, 32, 64, 1, 4, 64, False, False),
    )
    for tokens, top_k, experts, width, out, groups, bits, block_size, act_order, weighted in cases:
        stack = random_gptq_experts(experts, width, out, groups, bits, device)
        ids = torch.randint(-1, experts + 1, (tokens, top_k), device=device).to(torch.int32)
        blocks = moe_align_block_size_ref(ids, experts, block_size, True, None)
        x = torch.randn(tokens, width, device=device, dtype=dtype)
        in_order = torch.arange(width, device=device, dtype=torch.int32) * groups // width
        orders = [in_order[torch.randperm(width, device=device)] for _ in range(experts)]
        bias = torch.randn(experts, out, device=device, dtype=dtype) if weighted else None
        weights = torch.rand(tokens, top_k, device=device) if weighted else None
        order = torch.stack(orders) if act_order else None
        yield x, *stack, order, bias, *blocks, weights, top_k, block_size, bits, int(not act_order)


def moe_experts_int4_ref(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w13_zeros: torch.Tensor | None,
    w13_perm: torch.Tensor | None,
    w13_group_size: int,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    w2_zeros: torch.Tensor | None,
    w2_perm: torch.Tensor | None,
    w2_group_size: int,
    intermediate_size: int,
    activation: str,
) -> torch.Tensor:
    check_activation("moe_experts_int4", activation)
    x = hidden.to(compute_dtype(hidden))
    slots = x.new_zeros(*topk_ids.shape, hidden.shape[1])

    def pick(tensor: torch.Tensor | None, index: Any) -> torch.Tensor | None:
        return None if tensor is None else tensor[index]

    for e in range(w13.shape[0]):
        tokens, slot = torch.where(topk_ids == e)
        if tokens.numel() == 0:
            continue
        halves = []
        for part in (0, 1):
            perm = None if w13_perm is None else w13_perm[e, min(part, w13_perm.shape[1] - 1)]
            rows = gather_channels(x[tokens], perm, w13.shape[2] * layout.LINE_ROWS)
            tiles = (e, slice(part, None, 2))
            product = multiply_packed(
                rows, w13[tiles], w13_scales[tiles], pick(w13_zeros, tiles), w13_group_size, activation
            )
            halves.append(product[:, :intermediate_size])
        activated = F.silu(halves[0]) * halves[1]
        rows = gather_channels(activated, pick(w2_perm, e), w2.shape[2] * layout.LINE_ROWS)
        product = multiply_packed(rows, w2[e], w2_scales[e], pick(w2_zeros, e), w2_group_size, activation)
        slots[tokens, slot] = product[:, : hidden.shape[1]]
    kept = (topk_ids >= 0) & (topk_ids < w13.shape[0])
    out = torch.zeros_like(x)
    for k in range(topk_ids.shape[1]):
        out = out + torch.where(kept[:, k, None], topk_weights[:, k, None].to(x.dtype) * slots[:, k], 0)
    return out.to(hidden.dtype)


def moe_experts_int4_fake(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


def random_experts(
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    group_size: int,
    *,
    asymmetric: bool = False,
    perm_parts: int = 0,
    device: str = "cpu",
) -> tuple[Any, ...]:
    """Random weights for tests and benchmarks: the arguments from `w13` to `intermediate_size`.

    perm_parts 0: no act-order; 1: gate and up share their order; 2: they do not.
    """
    columns: dict[str, list[Any]] = {"w13": [], "w2": []}
    for e in range(num_experts):
        gate, up = (
            random_matrix(
                hidden_size,
                intermediate_size,
                group_size,
                asymmetric=asymmetric,
                act_order=perm_parts > 0,
                seed=seed,
            )
            for seed in (3 * e, 3 * e + (perm_parts != 1))
        )
        if perm_parts == 1:  # the same order, other weights
            up = (up[0].flip(-1).contiguous(), up[1].flip(-1).contiguous(), up[2], up[3])
        w13 = [None if g is None or u is None else layout.interleave_tiles(g, u) for g, u in zip(gate[:3], up[:3])]
        perms = [m[3] for m in (gate, up)[:perm_parts]]
        columns["w13"].append((*w13, torch.stack(perms) if perms else None))
        columns["w2"].append(
            random_matrix(
                intermediate_size,
                hidden_size,
                group_size,
                asymmetric=asymmetric,
                act_order=perm_parts > 0,
                seed=3 * e + 2,
            )
        )

    def stack(name: str) -> tuple[Any, ...]:
        return tuple(None if column[0] is None else torch.stack(column).to(device) for column in zip(*columns[name]))

    return (*stack("w13"), group_size, *stack("w2"), group_size, intermediate_size)


def moe_experts_int4_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)
    cases = (
        # T, K, E, H, I, group size, asymmetric, perm parts
        (1, 2, 4, 128, 48, 64, False, 0),
        (5, 3, 4, 72, 40, 8, True, 0),
        (9, 2, 3, 64, 24, 32, False, 1),
        (70, 1, 2, 136, 56, 128, True, 2),
        (0, 2, 3, 64, 16, 32, False, 0),
    )
    for tokens, top_k, experts, hidden_size, intermediate_size, group_size, asymmetric, perm_parts in cases:
        weights = random_experts(
            experts,
            hidden_size,
            intermediate_size,
            group_size,
            asymmetric=asymmetric,
            perm_parts=perm_parts,
            device=device,
        )
        ids = torch.stack(
            [torch.randperm(experts + 1, generator=g)[:top_k] for _ in range(tokens)] or [torch.zeros(top_k)]
        )[:tokens]  # E itself is a skipped id
        ids = torch.where(ids == experts, torch.where(torch.arange(top_k) % 2 == 0, experts, -1), ids)
        weights_per_slot = torch.rand(tokens, top_k, generator=g)
        for activation in ACTIVATIONS:
            hidden = torch.randn(tokens, hidden_size, generator=g).to(device, dtype)
            yield hidden, ids.to(device, torch.int32), weights_per_slot.to(device), *weights, activation


register("moe_experts_int4", ref=moe_experts_int4_ref, fake=moe_experts_int4_fake, inputs=moe_experts_int4_inputs)
register(
    "marlin_moe_gemm",
    ref=marlin_moe_gemm_ref,
    fake=marlin_moe_gemm_fake,
    inputs=marlin_moe_gemm_inputs,
)
register(
    "gptq_moe_gemm",
    ref=gptq_moe_gemm_ref,
    fake=gptq_moe_gemm_fake,
    inputs=gptq_moe_gemm_inputs,
)
