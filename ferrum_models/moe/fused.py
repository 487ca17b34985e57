"""The whole block in a handful of launches, without a host read."""

from __future__ import annotations

import torch

from ferrum_models.moe.bucketed import bucketed
from ferrum_models.moe.plan import Blocks
from ferrum_models.moe.profile import phase
from ferrum_models.moe.weights import ExpertWeights


def fused(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: ExpertWeights,
    *blocks: Blocks,
) -> torch.Tensor:
    """`experts(hidden[T, H], topk_ids[T, K] int32, topk_weights[T, K] float32, weights) -> [T, H]`.

    `blocks`: the pairs as the router sorted them, where `weights.routed_block_size` asked for it.
    """
    if not weights.one_launch:
        return bucketed(hidden, topk_ids, topk_weights, weights)
    with phase("fused"):
        return weights.fused(hidden, topk_ids, topk_weights, *blocks)
