"""One (token, slot) pair at a time: the readable oracle."""

from __future__ import annotations

import torch

import ferrum_ops
from ferrum_models.moe.profile import phase
from ferrum_models.moe.weights import ExpertWeights


def per_pair(
    hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, weights: ExpertWeights
) -> torch.Tensor:
    """`experts(hidden[T, H], topk_ids[T, K] int32, topk_weights[T, K] float32, weights) -> [T, H]`."""
    num_tokens, top_k = topk_ids.shape
    slots = hidden.new_zeros(num_tokens, top_k, hidden.shape[1])
    for token, ids in enumerate(topk_ids.tolist()):
        for slot, expert in enumerate(ids):
            if not 0 <= expert < weights.num_experts:
                continue
            with phase("gate_up"):
                gate_up = weights.gate_up(hidden[token : token + 1], expert)
            with phase("activation"):
                activated = ferrum_ops.silu_mul(gate_up)
            with phase("down"):
                slots[token, slot] = weights.down(activated, expert)[0]
    kept = (topk_ids >= 0) & (topk_ids < weights.num_experts)
    with phase("combine"):
        return ferrum_ops.weighted_sum(slots, topk_weights * kept)
