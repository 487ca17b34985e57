"""Tokens gathered by expert, one product per active expert, combined."""

from __future__ import annotations

from itertools import pairwise

import torch

import ferrum_ops
from ferrum_models.moe.plan import build_device_plan
from ferrum_models.moe.profile import phase
from ferrum_models.moe.weights import ExpertWeights


def bucketed(
    hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, weights: ExpertWeights
) -> torch.Tensor:
    """`experts(hidden[T, H], topk_ids[T, K] int32, topk_weights[T, K] float32, weights) -> [T, H]`."""
    with phase("plan"):
        plan = build_device_plan(topk_ids, weights.num_experts)
        offsets = plan.expert_offsets.tolist()  # the one host read of this implementation
    with phase("gather"):
        packed = hidden[plan.packed_token_idx[: offsets[-1]]]
    rows = torch.empty_like(packed)
    for expert, (start, end) in enumerate(pairwise(offsets)):
        if start == end:
            continue
        with phase("gate_up"):
            gate_up = weights.gate_up(packed[start:end], expert)
        with phase("activation"):
            activated = ferrum_ops.silu_mul(gate_up)
        with phase("down"):
            rows[start:end] = weights.down(activated, expert)
    with phase("combine"):
        return ferrum_ops.moe_combine(rows, plan.pairs_by_token, topk_weights)
