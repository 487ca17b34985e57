"""The bucket plan: which row of the packed activations belongs to which (token, slot) pair, and the tile height."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

import ferrum_ops
from ferrum_ops.ops.moe_gemm import MAX_SLOTS

BLOCK_SIZES = (8, 16, 32, 48, 64)


@dataclass(frozen=True)
class Blocks:
    """What `moe_align_block_size` gives, and the block size it was given."""

    sorted_token_ids: torch.Tensor
    block_ids: torch.Tensor
    total_post_pad: torch.Tensor
    block_size: int


@dataclass(frozen=True)
class BucketPlan:
    """Pairs sorted by expert. P = T*K; pairs whose id lies outside `[0, E)` have no row.

    `expert_offsets` int32 [E+1]: expert e owns packed rows `[offsets[e], offsets[e+1])`.
    `packed_token_idx` int32 [P]: the token of each packed row, -1 behind the last row.
    `pairs_by_token` int32 [P]: the packed row of pair `t*K + j`, or -1.
    """

    expert_offsets: torch.Tensor
    packed_token_idx: torch.Tensor
    pairs_by_token: torch.Tensor

    def to(self, device: torch.device) -> BucketPlan:
        return BucketPlan(*(getattr(self, f.name).to(device) for f in fields(self)))


def build_device_plan(topk_ids: torch.Tensor, num_experts: int) -> BucketPlan:
    """The plan computed where the ids are, without reading them on the host."""
    pairs_by_token, packed_token_idx, expert_offsets = ferrum_ops.moe_build_pairs_by_token(topk_ids, num_experts)
    return BucketPlan(expert_offsets, packed_token_idx, pairs_by_token)


def build_host_plan(topk_ids: torch.Tensor, num_experts: int) -> BucketPlan:
    """The same plan from ids read on the host. Tensors are on the CPU."""
    top_k = topk_ids.shape[1]
    buckets: list[list[int]] = [[] for _ in range(num_experts)]
    for pair, expert in enumerate(topk_ids.flatten().tolist()):
        if 0 <= expert < num_experts:
            buckets[expert].append(pair)
    order = [pair for bucket in buckets for pair in bucket]
    pairs_by_token = [-1] * topk_ids.numel()
    for row, pair in enumerate(order):
        pairs_by_token[pair] = row
    tokens = [pair // top_k for pair in order] + [-1] * (topk_ids.numel() - len(order))
    offsets = torch.tensor([0, *map(len, buckets)]).cumsum(0)
    return BucketPlan(
        offsets.to(torch.int32),
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor(pairs_by_token, dtype=torch.int32),
    )


def pick_moe_block_size(
    pairs: int,
    rows_per_expert: list[int] | None = None,
    *,
    override: int | None = None,
    large_m: int | None = None,
    large_m_min_pairs: int = 1024,
) -> int:
    """Rows per tile of the grouped product.

    `override` wins. With the host's `rows_per_expert`: the largest of 64, 32, 16 whose padding stays within 30 % of the
    rows, else 16. Without it: 16, or `large_m` from `large_m_min_pairs` pairs on.

    Raises ValueError for an override or a `large_m` outside 8, 16, 32, 48, 64.
    """
    for name, value in (("override", override), ("large_m", large_m)):
        if value is not None and value not in BLOCK_SIZES:
            raise ValueError(f"[pick_moe_block_size] {name}: expected one of {BLOCK_SIZES}, got {value}")
    if override is not None:
        return override
    if rows_per_expert is not None:
        rows = sum(rows_per_expert)
        for block in (64, 32, 16):
            padded = sum(-(-n // block) * block for n in rows_per_expert)
            if padded - rows <= 0.3 * rows:
                return block
        return 16
    if large_m is not None and pairs >= large_m_min_pairs:
        return large_m
    return 16


#: Rows per expert, on average, from which dequantising the experts pays; see docs/tuning.md.
DEQUANTIZE_MIN_ROWS = 400
#: Rows of a block that holds one pair: the smallest tile there is.
PAIR_BLOCK = 8
#: (most rows per expert on average, rows of a block). Up to 12 the time goes into reading weights, and a block should
#: hold nearly all rows that an expert may get; beyond, into products, and padding costs more than a second block.
FUSED_BLOCKS = ((4, 8), (12, 16), (48, 32))
LARGEST_BLOCK = 64
#: Tokens up to which the last block of down's launch adds up their slots; see docs/tuning.md.
SUM_IN_DOWN_TOKENS = 16


@dataclass(frozen=True)
class FusedConfig:
    """How the block of one launch for all experts runs.

    "pairs": every pair is a block of its own, so that nothing has to be sorted. "blocks": pairs sorted by expert, every
    expert padded to whole blocks. "dense": experts dequantised, then torch's grouped product of packed rows.
    """

    path: str
    block_size: int = 0
    sum_in_down: bool = False  # the sum over a token's slots is no launch of its own


def pick_fused_config(
    tokens: int,
    top_k: int,
    num_experts: int,
    dtype: torch.dtype,
    *,
    grouped: bool = True,
    grouped_product: bool = True,
    dequantize_min_rows: int = DEQUANTIZE_MIN_ROWS,
    override: int | None = None,
    large_m: int | None = None,
    large_m_min_pairs: int = 1024,
) -> FusedConfig:
    """The path of `fused` and its block size. Depends on sizes only, never on the routing.

    One token has no two pairs on an expert: "pairs", whatever the sizes say. From `dequantize_min_rows` rows per expert
    on (0: never) bfloat16 takes "dense" where the device has a `grouped_product` (torch's, without a host read);
    `grouped` False takes it always. Everything else takes "blocks": of `override` rows, of `large_m` from
    `large_m_min_pairs` pairs on, or as many as `FUSED_BLOCKS` says.

    Raises ValueError like `pick_moe_block_size`.
    """
    pairs = tokens * top_k
    configured = pick_moe_block_size(pairs, override=override, large_m=large_m, large_m_min_pairs=large_m_min_pairs)
    if not grouped:
        return FusedConfig("dense")
    few = 0 < tokens <= SUM_IN_DOWN_TOKENS and 0 < top_k <= MAX_SLOTS
    if tokens == 1:
        return FusedConfig("pairs", PAIR_BLOCK if override is None else override, few)
    # Elsewhere than in bfloat16 torch's grouped product is a loop on the host.
    if grouped_product and dtype == torch.bfloat16 and 0 < dequantize_min_rows * num_experts <= pairs:
        return FusedConfig("dense")
    if override is not None or (large_m is not None and pairs >= large_m_min_pairs):
        return FusedConfig("blocks", configured, few)
    fitting = (block for rows, block in FUSED_BLOCKS if pairs <= rows * num_experts)
    return FusedConfig("blocks", next(fitting, LARGEST_BLOCK), few)
