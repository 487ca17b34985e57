"""The expert block over Marlin weights by dequantising them: what pays for many rows of every expert.

Kernels of PyTorch do the two grouped products. Weights are dequantised for one of them at a time, and for a part of its
columns where all of them would be large, so that the memory this takes has a bound of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

import ferrum_ops
from ferrum_ops.formats.marlin import UNIT_COLUMNS

if TYPE_CHECKING:
    from ferrum_models.moe.marlin import MarlinExpertWeights

#: Dense weights at a time, in bytes: of Qwen3-30B-A3B half of gate and up's columns, or all of down's (0.4 GB each).
DENSE_BYTES = 1 << 29
#: torch.nn.functional.grouped_mm asks for strides of 16 bytes.
ALIGNMENT = 8


@torch.compiler.assume_constant_result
def has_grouped_product(device: torch.device) -> bool:
    """Whether PyTorch's grouped product of bfloat16 reads no offsets on the host, and is known to pay.

    True of the CPU and of compute capability 9.x. On 8.x it is a loop over experts on the host, which no graph can hold
    (aten/src/ATen/native/cuda/GroupedBlas.cpp); on 10.x it has a kernel, but whether it pays there is not known.
    """
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9)


def column_chunks(columns: int, bytes_per_column: int, limit: int | None = None) -> list[slice]:
    """Parts of about equal width, of whole Marlin units but for the last, of at most `limit` bytes where a unit is."""
    limit = DENSE_BYTES if limit is None else limit
    most = max(limit // max(bytes_per_column, 1) // UNIT_COLUMNS, 1) * UNIT_COLUMNS
    parts = max(-(-columns // most), 1)
    size = max(-(-columns // (parts * UNIT_COLUMNS)), 1) * UNIT_COLUMNS
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def dequantized_experts(
    weights: MarlinExpertWeights, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """`[T, H], [T, K] int32, [T, K] float32 -> [T, H]`, without a host read where `has_grouped_product`.

    Takes at most `DENSE_BYTES` of dense weights (or one unit of 64 columns of every expert), beside its pairs' rows.
    Experts without rows are not dequantised.
    """
    tokens, hidden_size = hidden.shape
    if tokens == 0:
        return torch.empty_like(hidden)
    pairs, sources, offsets = ferrum_ops.moe_build_pairs_by_token(topk_ids, weights.num_experts)
    # Rows of skipped pairs hold token -1 and lie behind the last offset: whatever they compute, no pair points at them.
    rows = F.pad(hidden, (0, -hidden_size % ALIGNMENT))[sources.clamp_min(0)]
    width = _aligned(weights.intermediate_size)
    activated = rows.new_empty(rows.shape[0], width)
    for part in column_chunks(width, 2 * weights.num_experts * rows.shape[1] * rows.element_size()):
        gate_up = _gate_up(weights, part, rows, offsets)
        product = F.grouped_mm(rows, gate_up, offs=offsets[1:])
        ferrum_ops.silu_mul_out(product, 0, activated[:, part], 0, rows.shape[0])
    outputs = []
    for part in column_chunks(rows.shape[1], weights.num_experts * width * rows.element_size()):
        down = _stack(weights, width, part.stop - part.start, rows, weights.intermediate_size)
        _dequantize(weights, "w2", (), part, False, offsets, down[:, : weights.intermediate_size])
        product = F.grouped_mm(activated, down, offs=offsets[1:])
        outputs.append(ferrum_ops.moe_combine(product, pairs, topk_weights))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))[:, :hidden_size].contiguous()


def _gate_up(weights: MarlinExpertWeights, part: slice, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Columns `part` of gate and then of up, `[E, H, 2 * columns]`."""
    columns = part.stop - part.start
    gate_up = _stack(weights, rows.shape[1], 2 * columns, rows, weights.hidden_size)
    inside = gate_up[:, : weights.hidden_size]
    if weights.w13.shape[0] == 1:
        _dequantize(weights, "w13", (0,), slice(2 * part.start, 2 * part.stop), True, offsets, inside)
    else:
        for i, half in enumerate((inside[..., :columns], inside[..., columns:])):
            _dequantize(weights, "w13", (i,), part, False, offsets, half)
    return gate_up


def _stack(weights: MarlinExpertWeights, in_features: int, columns: int, like: torch.Tensor, used: int) -> torch.Tensor:
    """Memory for `[E, in_features, columns]`; rows behind the `used` ones multiply zeros and must be finite."""
    stack = like.new_empty(weights.num_experts, in_features, columns)
    if used < in_features:
        stack[:, used:] = 0
    return stack


def _dequantize(
    weights: MarlinExpertWeights,
    name: str,
    index: tuple[int, ...],
    part: slice,
    interleaved: bool,
    offsets: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Columns `part` of a stack, of the experts that have rows, into `out`."""
    packed, scales, zeros, perm = weights.matrix(name, index)
    bits = getattr(weights, f"{name}_bits")
    start, stop = part.start, -(-part.stop // UNIT_COLUMNS) * UNIT_COLUMNS
    ferrum_ops.marlin_dequantize_out(
        packed[..., start * bits // 2 : stop * bits // 2],
        scales[..., start:stop],
        None if zeros is None else zeros[..., start * bits // 32 : stop * bits // 32],
        perm,
        offsets,
        getattr(weights, f"{name}_group_size"),
        bits,
        interleaved,
        out,
    )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
