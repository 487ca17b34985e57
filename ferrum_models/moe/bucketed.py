"""Tokens gathered by expert, one launch per bucket of rows, combined."""

from __future__ import annotations

from itertools import pairwise

import torch

import ferrum_ops
from ferrum_models.moe.plan import build_device_plan, build_host_plan
from ferrum_models.moe.profile import phase
from ferrum_models.moe.streams import Lanes, lanes_of
from ferrum_models.moe.weights import ExpertWeights


def bucketed(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: ExpertWeights,
    lanes: Lanes | None = None,
) -> torch.Tensor:
    """`experts(hidden[T, H], topk_ids[T, K] int32, topk_weights[T, K] float32, weights) -> [T, H]`.

    A bucket is up to a tile of rows of one expert. A layout whose kernel reads the expert of a bucket on the device
    launches all the buckets that any routing could need, and can be captured; others, and a plan made on the host,
    read the routing back and launch those that there are. `lanes` are what launches take turns on, the device's own by
    default.
    """
    lanes = lanes_of(hidden.device, weights.streams) if lanes is None else lanes
    on_device = weights.bucketed(hidden, topk_ids, topk_weights, lanes)
    if on_device is not None:
        return on_device
    with phase("plan"):
        if weights.host_route:
            refuse_capture(hidden.device)
            plan = build_host_plan(topk_ids, weights.num_experts)  # reads the ids
        else:
            plan = build_device_plan(topk_ids, weights.num_experts)
        offsets = plan.expert_offsets.tolist()  # the one host read of a plan made on the device
        plan = plan.to(hidden.device)
        buckets = split_buckets(offsets, weights.bucket_rows([b - a for a, b in pairwise(offsets)]))
    with phase("gather"):
        packed = hidden[plan.packed_token_idx[: offsets[-1]]]
    rows = torch.empty_like(packed)
    with lanes.forked():
        for i, (expert, start, end) in enumerate(buckets):
            lane = weights.lane(i % lanes.count)
            with lanes.on(i):
                with phase("gate_up"):
                    gate_up = lane.gate_up(packed[start:end], expert)
                with phase("activation"):
                    activated = ferrum_ops.silu_mul(gate_up)
                with phase("down"):
                    rows[start:end] = lane.down(activated, expert)
    with phase("combine"):
        return ferrum_ops.moe_combine(rows, plan.pairs_by_token, topk_weights)


def split_buckets(offsets: list[int], rows: int | None) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of every bucket, of at most `rows` rows each; None: an expert is one bucket."""
    buckets = []
    for expert, (start, end) in enumerate(pairwise(offsets)):
        step = max(end - start, 1) if rows is None else rows
        buckets += [(expert, first, min(first + step, end)) for first in range(start, end, step)]
    return buckets


def refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "[bucketed] moe_host_route: expected False while a CUDA graph is captured (the plan is made on the host), "
            "got True"
        )
