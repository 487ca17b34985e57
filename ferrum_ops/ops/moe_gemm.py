"""The whole block of routed experts over int4 weights as one op.

T tokens, H hidden, I expert width, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ferrum_ops._library import refuse_grad, register
from ferrum_ops.formats import int4 as layout
from ferrum_ops.ops.int4 import (
    ACTIVATIONS,
    check_activation,
    compute_dtype,
    gather_channels,
    multiply_packed,
    random_matrix,
)


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
