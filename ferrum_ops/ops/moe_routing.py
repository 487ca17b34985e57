"""Which experts a token goes to, and the orders of (token, slot) pairs that the grouped products read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ferrum_ops._checks import check_activation, check_shape, compute_dtype, expect
from ferrum_ops._library import refuse_grad, register, register_kernel
from ferrum_ops.formats.marlin import describe

MAX_EXPERTS = 1024
BLOCK_SIZES = (8, 16, 32, 48, 64, 128)
#: Rows and output columns that one threadgroup of Metal's grouped product computes.
DISPATCH_TILE = (32, 64)


def route_topk_softmax(logits: torch.Tensor, top_k: int, renormalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` experts of every token and their weights: softmax over all experts, then the largest.

    Experts come in descending order of their logits, equal logits in ascending order of their ids. The softmax is
    float32. With `renormalize` the weights are divided by their sum (1/K each if that sum is not positive).

    Any logits are routed: before everything else +Inf becomes the largest and NaN and -Inf the lowest finite float32,
    so ids of a token are always distinct and its weights finite.

    Args:
        logits: `[T, E]`, float32, float16 or bfloat16, E <= 1024; rows contiguous, any row stride.
        top_k: K, `1 <= K <= E`.
        renormalize: `norm_topk_prob` of the Qwen3-MoE configuration.

    Returns:
        ids int32 `[T, K]` and weights float32 `[T, K]`.

    Raises:
        RuntimeError: other dtypes, shapes or strides, K outside `[1, E]`, or logits that require grad while autograd
            is on.
    """
    refuse_grad("route_topk_softmax", logits)
    return torch.ops.ferrum.route_topk_softmax(logits, top_k, renormalize)


def _check_route(logits: torch.Tensor, top_k: int, op: str = "route_topk_softmax") -> None:
    check_activation(op, "logits", logits)
    expect(
        logits.dim() == 2 and logits.shape[1] <= MAX_EXPERTS,
        op,
        "logits",
        f"shape (tokens, experts) with at most {MAX_EXPERTS} experts",
        tuple(logits.shape),
    )
    rows = logits.numel() == 0 or logits.shape[1] == 1 or logits.stride(1) == 1
    expect(rows, op, "logits", "a contiguous last dimension", f"strides {tuple(logits.stride())}")
    expect(1 <= top_k <= logits.shape[1], op, "top_k", f"1 <= top_k <= {logits.shape[1]}", top_k)


def route_topk_softmax_ref(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    _check_route(logits, top_k)
    limit = torch.finfo(torch.float32).max
    finite = logits.to(compute_dtype(logits.dtype)).nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
    ids = finite.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = finite.softmax(-1).gather(1, ids)
    if renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / total, 1.0 / top_k)
    return ids.int(), weights


def route_topk_softmax_fake(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    _check_route(logits, top_k)
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


def route_topk_softmax_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for tokens, experts, top_k in ((0, 8, 2), (1, 128, 8), (5, 63, 4), (3, 100, 100), (7, 127, 1), (2, 1024, 33)):
        yield randn(tokens, experts), top_k, True
    yield randn(6, 300)[:, 17:145], 8, False
    yield torch.randint(-2, 3, (9, 64), device=device).to(dtype), 8, True  # many ties
    yield 300 * randn(4, 128), 8, True  # all but one probability underflow
    odd = randn(6, 40)
    odd[0], odd[1], odd[2] = torch.nan, torch.inf, -torch.inf
    odd[3, 5], odd[3, 9], odd[3, 20] = torch.nan, torch.inf, -torch.inf
    odd[4, ::2] = torch.nan
    odd[5, 1:38] = -torch.inf
    yield odd, 8, True
    yield odd, 8, False


def router_topk_softmax(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, renormalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The router of a layer: `logits = x @ weight.T`, and what `route_topk_softmax` makes of them.

    Logits are summed in float32 and rounded once to x's dtype; the rounded ones are routed. On a CPU a token's results
    have the same bits for any number of threads and whatever else is in the batch.

    Args:
        x: `[T, H]`, float32, float16 or bfloat16; rows contiguous, any row stride.
        weight: `[E, H]`, contiguous, of x's dtype, E <= 1024.
        top_k: K, `1 <= K <= E`.
        renormalize: `norm_topk_prob` of the Qwen3-MoE configuration.

    Returns:
        logits `[T, E]` of x's dtype, ids int32 `[T, K]` and weights float32 `[T, K]`.

    Raises:
        RuntimeError: other dtypes, shapes or strides, K outside `[1, E]`, or x or weight that require grad while
            autograd is on.
    """
    refuse_grad("router_topk_softmax", x, weight)
    return torch.ops.ferrum.router_topk_softmax(x, weight, top_k, renormalize)


def _check_router(x: torch.Tensor, weight: torch.Tensor, top_k: int) -> None:
    op = "router_topk_softmax"
    check_activation(op, "x", x)
    expect(x.dim() == 2, op, "x", "shape (tokens, hidden)", tuple(x.shape))
    rows = x.numel() == 0 or x.shape[1] == 1 or x.stride(1) == 1
    expect(rows, op, "x", "a contiguous last dimension", f"strides {tuple(x.stride())}")
    expect(
        weight.dim() == 2 and weight.shape[0] <= MAX_EXPERTS,
        op,
        "weight",
        f"shape (experts, hidden) with at most {MAX_EXPERTS} experts",
        tuple(weight.shape),
    )
    expect(weight.dtype == x.dtype, op, "weight", str(x.dtype), weight.dtype)
    check_shape(op, "weight", weight, (weight.shape[0], x.shape[1]))
    expect(weight.is_contiguous(), op, "weight", "a contiguous tensor", f"strides {tuple(weight.stride())}")
    expect(1 <= top_k <= weight.shape[0], op, "top_k", f"1 <= top_k <= {weight.shape[0]}", top_k)


def router_topk_softmax_ref(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_router(x, weight, top_k)
    compute = compute_dtype(x.dtype)
    logits = (x.to(compute) @ weight.to(compute).T).to(x.dtype)
    return logits, *route_topk_softmax_ref(logits, top_k, renormalize)


def router_topk_softmax_cuda(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The BLAS's product and the routing kernel: at a GPU's rates a product of its own gains nothing."""
    _check_router(x, weight, top_k)
    logits = torch.nn.functional.linear(x, weight)
    return logits, *torch.ops.ferrum.route_topk_softmax(logits, top_k, renormalize)


def router_topk_softmax_fake(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_router(x, weight, top_k)
    logits = x.new_empty((x.shape[0], weight.shape[0]))
    return logits, *route_topk_softmax_fake(logits, top_k, renormalize)


def router_topk_softmax_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def integers(*shape: int, largest: int = 3) -> torch.Tensor:
        """Products of these have logits that every dtype holds, so that rounding decides no choice of experts."""
        return torch.randint(-largest, largest + 1, shape, device=device).to(dtype)

    for tokens, hidden, experts, top_k in (
        (0, 64, 8, 2), (1, 63, 128, 8), (5, 16, 13, 4), (9, 1, 3, 3), (37, 24, 20, 5), (2, 0, 4, 2)
    ):  # fmt: skip
        yield integers(tokens, hidden), integers(experts, hidden, largest=2), top_k, True
    yield integers(6, 100)[:, 17:49], integers(9, 32, largest=1), 4, False


def moe_build_pairs_by_token(
    topk_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stable counting sort of the pairs `p = t*K + j` by expert: the packed order of the bucketed experts.

    A pair whose id lies outside `[0, E)` (padding, an expert of another rank) has no packed row.

    Args:
        topk_ids: int32 `[T, K]`, contiguous.
        num_experts: E, at least 1.

    Returns:
        - pairs_by_token int32 `[T*K]`: the packed row of each pair, or -1.
        - packed_token_idx int32 `[T*K]`: the token of each packed row, -1 behind the last row.
        - expert_offsets int32 `[E+1]`: expert e owns packed rows `[offsets[e], offsets[e+1])`.

    Raises:
        RuntimeError: other dtypes, shapes or strides, or E < 1; on CUDA also E > 49152.
    """
    return torch.ops.ferrum.moe_build_pairs_by_token(topk_ids, num_experts)


def _check_ids(op: str, topk_ids: torch.Tensor, num_experts: int) -> None:
    expect(topk_ids.dtype == torch.int32, op, "topk_ids", "int32", topk_ids.dtype)
    expect(topk_ids.dim() == 2, op, "topk_ids", "shape (tokens, top_k)", tuple(topk_ids.shape))
    expect(topk_ids.is_contiguous(), op, "topk_ids", "a contiguous tensor", f"strides {tuple(topk_ids.stride())}")
    expect(num_experts >= 1, op, "num_experts", "at least 1", num_experts)


def _sort_pairs(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat ids `[P]` -> pairs in expert order `[P]`, the expert of each (E for none) `[P]`, rows per expert `[E]`."""
    keys = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).long()
    sorted_keys, order = keys.sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=ids.device)
    return order, sorted_keys, torch.searchsorted(sorted_keys, bounds).diff()


def _exclusive_sum(counts: torch.Tensor) -> torch.Tensor:
    """`[n]` -> `[n+1]`: where each of n consecutive segments starts, and where the last one ends."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def moe_build_pairs_by_token_ref(
    topk_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_ids("moe_build_pairs_by_token", topk_ids, num_experts)
    order, sorted_keys, counts = _sort_pairs(topk_ids.flatten(), num_experts)
    rows = torch.arange(order.numel(), device=order.device)
    kept = sorted_keys < num_experts
    pairs_by_token = torch.empty_like(order).scatter_(0, order, torch.where(kept, rows, -1))
    tokens = torch.where(kept, order // max(topk_ids.shape[1], 1), -1)
    return pairs_by_token.int(), tokens.int(), _exclusive_sum(counts).int()


def moe_build_pairs_by_token_fake(
    topk_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_ids("moe_build_pairs_by_token", topk_ids, num_experts)
    pairs = topk_ids.shape[0] * topk_ids.shape[1]
    return topk_ids.new_empty((pairs,)), topk_ids.new_empty((pairs,)), topk_ids.new_empty((num_experts + 1,))


def _sample_ids(device: str) -> Iterator[tuple[torch.Tensor, int]]:
    for tokens, top_k, experts in ((0, 8, 128), (1, 8, 128), (63, 4, 60), (100, 2, 7), (127, 1, 1), (3, 0, 5)):
        yield torch.randint(0, experts, (tokens, top_k), device=device).int(), experts
    ids = torch.randint(-2, 20, (40, 6), device=device).int()  # -2, -1 and 16..19 have no row
    ids[ids == 3] = 4  # an expert without tokens
    yield ids, 16
    yield torch.full((5, 2), -1, device=device, dtype=torch.int32), 4


def moe_build_pairs_by_token_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    yield from _sample_ids(device)


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    pair_ids: bool = True,
    expert_map: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs sorted by expert, every expert padded to whole blocks: the order of a grouped matrix product.

    Within an expert entries keep the order of the pairs `p = t*K + j`; an expert without pairs takes no block. Pairs
    whose (mapped) id lies outside `[0, E)` are left out. With P = T*K, the capacity is
    `min(P * block_size, P + E * (block_size - 1))` rounded up to whole blocks: a bound on what any routing needs, so
    that shapes do not depend on the ids.

    Args:
        topk_ids: int32 `[T, K]`, contiguous.
        num_experts: E, at least 1.
        block_size: 8, 16, 32, 48, 64 or 128 rows.
        pair_ids: True: an entry is the pair p. False: it is the packed row of p as `moe_build_pairs_by_token` numbers
            it for the same `topk_ids` and E.
        expert_map: int32 `[E]`, contiguous: the local id of each expert, or -1 for one of another rank. Blocks are
            then sorted by, and hold, local ids.

    Returns:
        - sorted_token_ids int32 `[capacity]`: entries; P (the sentinel) in padding and behind the last block.
        - block_ids int32 `[capacity / block_size]`: the expert of each block; -1 behind the last one.
        - total_post_pad int32 `[1]`: how many of sorted_token_ids belong to blocks.

    Raises:
        RuntimeError: other dtypes, shapes or strides, another block size, or E < 1; on CUDA also E > 49152.
    """
    return torch.ops.ferrum.moe_align_block_size(topk_ids, num_experts, block_size, pair_ids, expert_map)


def align_capacity(pairs: int, num_experts: int, block_size: int) -> int:
    """Length of `sorted_token_ids`: a multiple of block_size that no routing of that many pairs exceeds."""
    capacity = min(pairs * block_size, pairs + num_experts * (block_size - 1))
    return (capacity + block_size - 1) // block_size * block_size


def _check_block_size(op: str, block_size: int) -> None:
    expect(block_size in BLOCK_SIZES, op, "block_size", f"one of {BLOCK_SIZES}", block_size)


def _check_align(topk_ids: torch.Tensor, num_experts: int, block_size: int, expert_map: torch.Tensor | None) -> None:
    op = "moe_align_block_size"
    _check_ids(op, topk_ids, num_experts)
    _check_block_size(op, block_size)
    if expert_map is not None:
        expect(expert_map.dtype == torch.int32, op, "expert_map", "int32", expert_map.dtype)
        check_shape(op, "expert_map", expert_map, (num_experts,))
        contiguous = expert_map.is_contiguous()
        expect(contiguous, op, "expert_map", "a contiguous tensor", f"strides {expert_map.stride()}")


def moe_align_block_size_ref(
    topk_ids: torch.Tensor, num_experts: int, block_size: int, pair_ids: bool, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_align(topk_ids, num_experts, block_size, expert_map)
    ids = topk_ids.flatten()
    entries = torch.arange(ids.numel(), device=ids.device)
    if not pair_ids:
        entries = moe_build_pairs_by_token_ref(topk_ids, num_experts)[0].long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < num_experts)
        ids = torch.where(known, expert_map[torch.where(known, ids, 0).long()], -1)
    order, sorted_keys, counts = _sort_pairs(ids, num_experts)
    blocks = (counts + block_size - 1) // block_size
    first_block, first_row = _exclusive_sum(blocks), _exclusive_sum(counts)

    capacity = align_capacity(ids.numel(), num_experts, block_size)
    rank = torch.arange(ids.numel(), device=ids.device) - first_row[sorted_keys]
    places = torch.where(sorted_keys < num_experts, first_block[sorted_keys] * block_size + rank, capacity)
    sorted_token_ids = torch.full((capacity + 1,), ids.numel(), device=ids.device)
    sorted_token_ids.scatter_(0, places, entries[order])
    block = torch.arange(capacity // block_size, device=ids.device)
    block_ids = torch.searchsorted(first_block[1:].contiguous(), block, right=True)
    block_ids = torch.where(block < first_block[-1], block_ids, -1)
    return sorted_token_ids[:capacity].int(), block_ids.int(), (first_block[-1:] * block_size).int()


def moe_align_block_size_fake(
    topk_ids: torch.Tensor, num_experts: int, block_size: int, pair_ids: bool, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_align(topk_ids, num_experts, block_size, expert_map)
    capacity = align_capacity(topk_ids.shape[0] * topk_ids.shape[1], num_experts, block_size)
    return (
        topk_ids.new_empty((capacity,)),
        topk_ids.new_empty((capacity // block_size,)),
        topk_ids.new_empty((1,)),
    )


def moe_align_block_size_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for i, (ids, experts) in enumerate(_sample_ids(device)):
        expert_map = torch.full((experts,), -1, dtype=torch.int32, device=device)
        expert_map[::2] = torch.arange((experts + 1) // 2, device=device).int()
        yield ids, experts, BLOCK_SIZES[i % 6], True, None
        yield ids, experts, BLOCK_SIZES[(i + 1) % 6], False, None
        yield ids, experts, BLOCK_SIZES[(i + 2) % 6], i % 2 == 0, expert_map


def route_topk_align(
    logits: torch.Tensor, top_k: int, renormalize: bool, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route_topk_softmax`, and its pairs in blocks as `moe_align_block_size` sorts them: what both give, bit for bit.

    On CUDA one launch instead of two up to 16 tokens with up to 2048 pairs.

    Args:
        logits: `[T, E]`, float32, float16 or bfloat16, E <= 1024; rows contiguous, any row stride.
        top_k: K, `1 <= K <= E`.
        renormalize: `norm_topk_prob` of the Qwen3-MoE configuration.
        block_size: 8, 16, 32, 48, 64 or 128 rows.

    Returns:
        - ids int32 `[T, K]` and weights float32 `[T, K]` of `route_topk_softmax`.
        - sorted_token_ids, block_ids and total_post_pad of `moe_align_block_size(ids, E, block_size)`.

    Raises:
        RuntimeError: other dtypes, shapes or strides, K outside `[1, E]`, another block size, or logits that require
            grad while autograd is on.
    """
    refuse_grad("route_topk_align", logits)
    return torch.ops.ferrum.route_topk_align(logits, top_k, renormalize, block_size)


def _check_route_align(logits: torch.Tensor, top_k: int, block_size: int) -> None:
    _check_route(logits, top_k, "route_topk_align")
    _check_block_size("route_topk_align", block_size)


def route_topk_align_ref(
    logits: torch.Tensor, top_k: int, renormalize: bool, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_route_align(logits, top_k, block_size)
    ids, weights = route_topk_softmax_ref(logits, top_k, renormalize)
    ids = ids.contiguous()
    return ids, weights, *moe_align_block_size_ref(ids, logits.shape[1], block_size, True, None)


def route_topk_align_fake(
    logits: torch.Tensor, top_k: int, renormalize: bool, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_route_align(logits, top_k, block_size)
    ids, weights = route_topk_softmax_fake(logits, top_k, renormalize)
    return ids, weights, *moe_align_block_size_fake(ids, logits.shape[1], block_size, True, None)


def route_topk_align_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for i, (logits, top_k, renormalize) in enumerate(route_topk_softmax_inputs(device, dtype)):
        yield logits, top_k, renormalize, BLOCK_SIZES[i % 6]
    yield torch.randn(17, 16, device=device).to(dtype), 3, True, 8  # two launches


def moe_compute_ids_tpe(
    topk_ids: torch.Tensor, num_experts: int, out_features: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs `p = t*K + j` of every expert as one row each, and how large a grid their products need.

    What a grouped product with an indirect dispatch reads (llama.cpp's Metal `mul_mm_id`): a fixed grid of E rows that
    needs no host read of the counts. Pairs whose id lies outside `[0, E)` are in no row.

    Args:
        topk_ids: int32 `[T, K]`, contiguous.
        num_experts: E, at least 1.
        out_features: columns M of each product that will be dispatched, such as `(2 * I, H)`.

    Returns:
        - tokens_per_expert int32 `[E]`: pairs of each expert.
        - ids_per_expert int32 `[E, T*K]`: its pairs in ascending order, -1 behind the last.
        - dispatch int32 `[len(out_features), 3]`: threadgroups
          `(max(1, ceil(max(tokens_per_expert) / 32)), ceil(M / 64), E)` of each product, in tiles of 32 rows and 64
          columns.

    Raises:
        RuntimeError: other dtypes, shapes or strides, E < 1, or an M below 1.
    """
    return torch.ops.ferrum.moe_compute_ids_tpe(topk_ids, num_experts, list(out_features))


def _check_ids_tpe(topk_ids: torch.Tensor, num_experts: int, out_features: Sequence[int]) -> None:
    op = "moe_compute_ids_tpe"
    _check_ids(op, topk_ids, num_experts)
    for features in out_features:
        expect(features >= 1, op, "out_features", "at least 1", features)


def moe_compute_ids_tpe_ref(
    topk_ids: torch.Tensor, num_experts: int, out_features: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_ids_tpe(topk_ids, num_experts, out_features)
    pairs = topk_ids.numel()
    order, sorted_keys, counts = _sort_pairs(topk_ids.flatten(), num_experts)
    rank = torch.arange(pairs, device=order.device) - _exclusive_sum(counts)[sorted_keys]
    # One row more than experts, for pairs that have none.
    ids_per_expert = torch.full((num_experts + 1, pairs), -1, device=order.device)
    ids_per_expert[sorted_keys, rank] = order
    rows, columns = DISPATCH_TILE
    row_tiles = ((counts.max() + rows - 1) // rows).clamp_min(1)
    grid = torch.tensor(
        [[0, (features + columns - 1) // columns, num_experts] for features in out_features], device=order.device
    ).view(-1, 3)
    grid = torch.cat((row_tiles.expand(len(out_features), 1), grid[:, 1:]), 1)
    return counts.int(), ids_per_expert[:-1].int().contiguous(), grid.int()


def moe_compute_ids_tpe_fake(
    topk_ids: torch.Tensor, num_experts: int, out_features: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_ids_tpe(topk_ids, num_experts, out_features)
    pairs = topk_ids.shape[0] * topk_ids.shape[1]
    return (
        topk_ids.new_empty((num_experts,)),
        topk_ids.new_empty((num_experts, pairs)),
        topk_ids.new_empty((len(out_features), 3)),
    )


def moe_compute_ids_tpe_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for i, (ids, experts) in enumerate(_sample_ids(device)):
        yield ids, experts, [[1536, 2048], [], [1], [64, 65, 127]][i % 4]


def check_blocks(
    op: str,
    rows: int,
    sorted_token_ids: torch.Tensor,
    block_ids: torch.Tensor,
    total_post_pad: torch.Tensor,
    topk_weights: torch.Tensor | None,
    block_size: int,
) -> None:
    """Raise ValueError unless these are what `moe_align_block_size` gives, and weights of `rows` rows."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"[{op}] block_size: expected one of {BLOCK_SIZES}, got {block_size}")
    blocks = -(-sorted_token_ids.numel() // block_size)
    for name, ids, size in (
        ("sorted_token_ids", sorted_token_ids, sorted_token_ids.numel()),
        ("block_ids", block_ids, blocks),
        ("total_post_pad", total_post_pad, 1),
    ):
        if ids.dtype != torch.int32 or ids.shape != (size,) or not ids.is_contiguous():
            raise ValueError(f"[{op}] {name}: expected contiguous int32 ({size},), got {describe(ids)}")
    if topk_weights is not None:
        # float64 only where a test computes all in it.
        fits = topk_weights.dtype in (torch.float32, torch.float64) and topk_weights.numel() == rows
        if not fits or not topk_weights.is_contiguous():
            got = describe(topk_weights)
            raise ValueError(f"[{op}] topk_weights: expected contiguous float32 with {rows} elements, got {got}")


def expert_of_rows(
    rows: int,
    num_experts: int,
    sorted_token_ids: torch.Tensor,
    block_ids: torch.Tensor,
    total_post_pad: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """int64 `[rows]`: the expert of the block that names each row; -1 where none does, or one without an expert."""
    place = torch.arange(sorted_token_ids.numel(), device=sorted_token_ids.device)
    expert = block_ids.long()[place // block_size]
    named = (sorted_token_ids >= 0) & (sorted_token_ids < rows) & (place < total_post_pad)
    used = named & (expert >= 0) & (expert < num_experts)
    of_row = torch.full((rows + 1,), -1, device=sorted_token_ids.device)  # entries that count for nothing go behind
    return of_row.scatter(0, torch.where(used, sorted_token_ids, rows).long(), expert)[:rows]


register(
    "route_topk_softmax",
    ref=route_topk_softmax_ref,
    fake=route_topk_softmax_fake,
    inputs=route_topk_softmax_inputs,
)
register(
    "router_topk_softmax",
    ref=router_topk_softmax_ref,
    fake=router_topk_softmax_fake,
    inputs=router_topk_softmax_inputs,
)
register_kernel("router_topk_softmax", "CUDA", router_topk_softmax_cuda)
register(
    "moe_build_pairs_by_token",
    ref=moe_build_pairs_by_token_ref,
    fake=moe_build_pairs_by_token_fake,
    inputs=moe_build_pairs_by_token_inputs,
)
register(
    "moe_align_block_size",
    ref=moe_align_block_size_ref,
    fake=moe_align_block_size_fake,
    inputs=moe_align_block_size_inputs,
)
register(
    "route_topk_align",
    ref=route_topk_align_ref,
    fake=route_topk_align_fake,
    inputs=route_topk_align_inputs,
)
register(
    "moe_compute_ids_tpe",
    ref=moe_compute_ids_tpe_ref,
    fake=moe_compute_ids_tpe_fake,
    inputs=moe_compute_ids_tpe_inputs,
)
