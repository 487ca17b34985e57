"""The MoE implementations by name, behind one signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ferrum_models.moe.bucketed import bucketed
from ferrum_models.moe.fused import fused
from ferrum_models.moe.per_pair import per_pair
from ferrum_models.moe.plan import Blocks
from ferrum_models.moe.weights import ExpertWeights

Implementation = Callable[..., torch.Tensor]

#: name -> `experts(hidden[T, H], topk_ids[T, K] int32, topk_weights[T, K] float32, weights) -> [T, H]`.
#: "fused" takes `Blocks` as well, where `weights.routed_block_size` asks for them.
IMPLEMENTATIONS: dict[str, Implementation] = {"fused": fused, "bucketed": bucketed, "per_pair": per_pair}


def check_implementation(name: str) -> str:
    """`name` itself; raises ValueError with the known names."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"[moe_implementation] expected one of {sorted(IMPLEMENTATIONS)}, got {name!r}")
    return name


# bucketed and per_pair read expert counts on the host, which a compiler cannot trace. Behind an op it need not: a
# compiled model calls the same Python, with no graph break. (cudagraph_unsafe: the host read.)
_library = torch.library.Library("ferrum_models", "DEF")
_library.define(
    "moe_experts(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor?[] tensors, str spec, "
    "str implementation) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def _moe_experts(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    tensors: list[torch.Tensor | None],
    spec: str,
    implementation: str,
) -> torch.Tensor:
    weights = ExpertWeights.rebuild(tensors, spec)
    return IMPLEMENTATIONS[implementation](hidden, topk_ids, topk_weights, weights)


_library.impl("moe_experts", _moe_experts, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ferrum_models::moe_experts", lambda hidden, *_: hidden.new_empty(hidden.shape), lib=_library
)


def run_experts(
    name: str,
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: ExpertWeights,
    *blocks: Blocks,
) -> torch.Tensor:
    """The named implementation; inside a compiled graph, an untraceable one as a single op."""
    if torch.compiler.is_compiling() and not (name == "fused" and weights.traceable(hidden.dtype)):
        return torch.ops.ferrum_models.moe_experts(
            hidden, topk_ids, topk_weights, weights.tensors(), weights.spec(), name
        )
    return IMPLEMENTATIONS[name](hidden, topk_ids, topk_weights, weights, *blocks)


def route_and_run(
    name: str, hidden: torch.Tensor, router: Callable[..., tuple[Any, ...]], top_k: int, weights: ExpertWeights
) -> torch.Tensor:
    """The named implementation of what `router(hidden, block_size)` chooses: logits, weights, ids and any blocks."""
    block_size = weights.routed_block_size(hidden, top_k) if name == "fused" else 0
    _, topk_weights, topk_ids, *blocks = router(hidden, block_size)
    return run_experts(name, hidden, topk_ids, topk_weights, weights, *blocks)
