"""Experts in the Marlin layout: two grouped products on tensor cores, or a launch for every bucket of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import ferrum_ops
from ferrum_models.moe.dequantized import dequantized_experts, has_grouped_product
from ferrum_models.moe.plan import (
    DEQUANTIZE_MIN_ROWS,
    PAIR_BLOCK,
    Blocks,
    FusedConfig,
    pick_fused_config,
    pick_moe_block_size,
)
from ferrum_models.moe.profile import phase
from ferrum_models.moe.streams import Lanes
from ferrum_models.moe.weights import ExpertWeights, register_layout
from ferrum_ops.config import RuntimeConfig
from ferrum_ops.formats import marlin

Matrix = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


@register_layout
@dataclass(frozen=True)
class MarlinExpertWeights(ExpertWeights):
    """The Marlin layout, stacked. R >= K packed rows, C >= N columns of a matrix [K, N], G groups, S lanes.

    P is 1 where gate and up read hidden in the same order: their columns are then interleaved in one matrix
    (`formats.marlin.interleave_gate_up`). It is 2, gate and up, where act-order gave each its own.
    """

    layout = "marlin"
    constant_fields = ("workspace", "token_blocks")

    w13: torch.Tensor  # int32 [P, E, R/16, C*bits/2]
    w13_scales: torch.Tensor  # [P, E, G, C]
    w13_zeros: torch.Tensor | None  # int32 [P, E, G, C*bits/32]; None: 2**(bits - 1)
    w13_perm: torch.Tensor | None  # int32 [P, E, R]
    w2: torch.Tensor  # int32 [E, R/16, C*bits/2]
    w2_scales: torch.Tensor
    w2_zeros: torch.Tensor | None
    w2_perm: torch.Tensor | None
    workspace: torch.Tensor  # int32 [S, W], zeros between launches
    token_blocks: torch.Tensor  # int32: `sorted_token_ids` and `total_post_pad` of blocks of one token's pairs
    w13_group_size: int
    w2_group_size: int
    w13_bits: int
    w2_bits: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    # What a RuntimeConfig decides. 0: unset.
    block_size: int = 0
    large_m_block_size: int = 0
    large_m_min_pairs: int = 1024
    dequantize_min_rows: int = DEQUANTIZE_MIN_ROWS
    one_launch: bool = True
    grouped: bool = True
    pair_ids: bool = True
    host_route: bool = False
    streams: int = 1
    clear_workspace: bool = False
    reduction: str = "fp32"
    max_sms: int = 0

    @staticmethod
    def settings(config: RuntimeConfig) -> dict[str, Any]:
        """The fields that a configuration decides."""
        return {
            "block_size": config.moe_block_size or 0,
            "large_m_block_size": config.moe_large_m_block_size or 0,
            "large_m_min_pairs": config.moe_large_m_min_pairs,
            "one_launch": config.moe_fused,
            "grouped": config.vllm_moe,
            "pair_ids": config.vllm_moe_pair_ids,
            "host_route": config.moe_host_route,
            "streams": config.moe_streams,
            "clear_workspace": config.vllm_moe_zero_ws,
            "reduction": config.marlin_reduction,
            "max_sms": config.vllm_marlin_sms or 0,
        }

    @classmethod
    def make_constants(cls, values: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
        workspace = ferrum_ops.marlin_workspace(device)
        block = values["block_size"] or PAIR_BLOCK
        pairs = values["top_k"]
        blocks = torch.full((pairs, block), pairs, dtype=torch.int32)
        blocks[:, 0] = torch.arange(pairs)
        total = torch.tensor([pairs * block], dtype=torch.int32)
        return {
            "workspace": workspace.repeat(values["streams"], 1),
            "token_blocks": torch.cat([blocks.flatten(), total]).to(device),
        }

    def traceable(self, dtype: torch.dtype) -> bool:
        # Launches for single buckets are many, and grouped_mm's fake accepts only bfloat16.
        return self.one_launch and (self.grouped or dtype == torch.bfloat16)

    @property
    def num_experts(self) -> int:
        return self.w2.shape[0]

    def lane(self, index: int) -> MarlinExpertWeights:
        return replace(self, workspace=self.workspace[index : index + 1])

    def bucket_rows(self, rows_per_expert: list[int]) -> int | None:
        return pick_moe_block_size(sum(rows_per_expert), rows_per_expert, **self._block_size_arguments())

    def _block_size_arguments(self) -> dict[str, Any]:
        return {
            "override": self.block_size or None,
            "large_m": self.large_m_block_size or None,
            "large_m_min_pairs": self.large_m_min_pairs,
        }

    # Products of one expert.

    def gate_up(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        width = self.intermediate_size
        if self.w13.shape[0] == 1:
            columns = -(-width // marlin.GATE_RUN) * marlin.GATE_RUN
            parts = marlin.split_gate_up(self._linear(x, "w13", (0, expert), 2 * columns))
        else:
            parts = (self._linear(x, "w13", (0, expert), width), self._linear(x, "w13", (1, expert), width))
        return torch.cat([part[..., :width] for part in parts], dim=-1)

    def down(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return self._linear(x, "w2", (expert,), self.hidden_size)

    def matrix(self, name: str, index: tuple[Any, ...]) -> Matrix:
        """Words, scales, zeros and perm of a matrix or a stack of them."""
        zeros, perm = getattr(self, f"{name}_zeros"), getattr(self, f"{name}_perm")
        return (
            getattr(self, name)[index],
            getattr(self, f"{name}_scales")[index],
            None if zeros is None else zeros[index],
            None if perm is None else perm[index],
        )

    def _linear(self, x: torch.Tensor, name: str, index: tuple[int, ...], columns: int) -> torch.Tensor:
        packed, scales, zeros, perm = self.matrix(name, index)
        return ferrum_ops.marlin_gemm(
            x,
            packed,
            scales,
            zeros,
            perm,
            None,
            self.workspace[0],
            columns,
            getattr(self, f"{name}_group_size"),
            getattr(self, f"{name}_bits"),
            self.reduction,
            self.max_sms,
        )

    # Products of all experts.

    def _grouped(
        self,
        x: torch.Tensor,
        name: str,
        index: tuple[int, ...],
        blocks: Blocks,
        top_k: int,
        columns: int,
        epilogue: str,
        topk_weights: torch.Tensor | None = None,
        slots: int = 1,
    ) -> torch.Tensor:
        packed, scales, zeros, perm = self.matrix(name, index)
        if self.clear_workspace:
            self.workspace[0].zero_()
        return ferrum_ops.marlin_moe_gemm(
            x,
            packed,
            scales,
            zeros,
            perm,
            None,
            blocks.sorted_token_ids,
            blocks.block_ids,
            blocks.total_post_pad,
            topk_weights,
            self.workspace[0],
            top_k,
            blocks.block_size,
            columns,
            getattr(self, f"{name}_group_size"),
            getattr(self, f"{name}_bits"),
            epilogue,
            self.reduction,
            self.max_sms,
            slots,
        )

    def _activated(self, x: torch.Tensor, blocks: Blocks, top_k: int) -> torch.Tensor:
        """silu(gate) * up of every row, `[M * top_k, I]`."""
        width = self.intermediate_size
        if self.w13.shape[0] == 1:
            return self._grouped(x, "w13", (0,), blocks, top_k, width, "silu_mul")
        gate, up = (self._grouped(x, "w13", (part,), blocks, top_k, width, "none") for part in (0, 1))
        return ferrum_ops.silu_mul(gate, up)

    def _experts(self, x: torch.Tensor, blocks: Blocks, top_k: int) -> torch.Tensor:
        """Rows of x through their experts, `[M * top_k, H]`; a row that no block names is zero."""
        return self._grouped(self._activated(x, blocks, top_k), "w2", (), blocks, 1, self.hidden_size, "none")

    def _fused_config(self, hidden: torch.Tensor, top_k: int) -> FusedConfig:
        return pick_fused_config(
            hidden.shape[0],
            top_k,
            self.num_experts,
            hidden.dtype,
            grouped=self.grouped,
            grouped_product=has_grouped_product(hidden.device),
            dequantize_min_rows=self.dequantize_min_rows,
            **self._block_size_arguments(),
        )

    def routed_block_size(self, hidden: torch.Tensor, top_k: int) -> int:
        if not (self.one_launch and self.pair_ids):
            return 0
        config = self._fused_config(hidden, top_k)
        return config.block_size if config.path == "blocks" else 0

    def fused(
        self,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        blocks: Blocks | None = None,
    ) -> torch.Tensor:
        tokens, top_k = topk_ids.shape
        config = self._fused_config(hidden, top_k)
        if config.path == "dense":
            return dequantized_experts(self, hidden, topk_ids, topk_weights)
        if not self.pair_ids:
            pairs, sources, _ = ferrum_ops.moe_build_pairs_by_token(topk_ids, self.num_experts)
            blocks = Blocks(
                *ferrum_ops.moe_align_block_size(topk_ids, self.num_experts, config.block_size, pair_ids=False),
                config.block_size,
            )
            rows = self._experts(hidden[sources.clamp_min(0)], blocks, 1)
            return ferrum_ops.moe_combine(rows, pairs, topk_weights)
        if blocks is None:
            blocks = self.pair_blocks(topk_ids, config)
        if config.sum_in_down:
            activated = self._activated(hidden, blocks, top_k)
            return self._grouped(activated, "w2", (), blocks, 1, self.hidden_size, "none", topk_weights, top_k)
        rows = self._experts(hidden, blocks, top_k)
        return ferrum_ops.weighted_sum(rows.view(tokens, top_k, self.hidden_size), topk_weights)

    def pair_blocks(self, topk_ids: torch.Tensor, config: FusedConfig) -> Blocks:
        """Blocks of pair ids. Those of one token are known beforehand but for their experts, which the ids are."""
        if config.path == "pairs" and topk_ids.shape[1] == self.top_k:
            return Blocks(self.token_blocks[:-1], topk_ids.flatten(), self.token_blocks[-1:], config.block_size)
        return Blocks(
            *ferrum_ops.moe_align_block_size(topk_ids, self.num_experts, config.block_size), config.block_size
        )

    def bucketed(
        self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, lanes: Lanes
    ) -> torch.Tensor | None:
        """Two launches for every block that any routing could need; blocks without an expert are idle."""
        if self.host_route:
            return None
        with phase("plan"):
            rows = pick_moe_block_size(topk_ids.numel(), **self._block_size_arguments())
            ids, block_ids, _ = ferrum_ops.moe_align_block_size(topk_ids, self.num_experts, rows)
            capacity, pairs = ids.numel(), topk_ids.numel()
            # Where each pair stands; the sentinel's place is thrown away.
            places = torch.full((pairs + 1,), -1, dtype=torch.int32, device=ids.device)
            places.scatter_(0, ids.long(), torch.arange(capacity, dtype=torch.int32, device=ids.device))
            whole = torch.arange(rows, dtype=torch.int32, device=ids.device)
            total = torch.full((1,), rows, dtype=torch.int32, device=ids.device)
        with phase("gather"):
            packed = hidden[(ids.clamp_max(max(pairs - 1, 0)) // max(topk_ids.shape[1], 1))]
            out = torch.empty_like(packed)
        with lanes.forked():
            for i in range(capacity // rows):
                lane, bucket = self.lane(i % lanes.count), slice(i * rows, (i + 1) * rows)
                blocks = Blocks(whole, block_ids[i : i + 1], total, rows)
                with lanes.on(i):
                    with phase("gate_up"):
                        activated = lane._activated(packed[bucket], blocks, 1)
                    with phase("down"):
                        out[bucket] = lane._grouped(activated, "w2", (), blocks, 1, self.hidden_size, "none")
        with phase("combine"):
            return ferrum_ops.moe_combine(out, places[:pairs], topk_weights)

    # Dequantised.

    def dense(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights `[E, 2I, H]`, gate first, and `[E, H, I]`."""
        experts, hidden, width = self.num_experts, self.hidden_size, self.intermediate_size
        gate_up = self.w2.new_empty((experts, hidden, 2 * width), dtype=dtype)
        down = self.w2.new_empty((experts, width, hidden), dtype=dtype)
        if self.w13.shape[0] == 1:
            self._dequantize("w13", (0,), True, gate_up)
        else:
            for part in (0, 1):
                self._dequantize("w13", (part,), False, gate_up[..., part * width : (part + 1) * width])
        self._dequantize("w2", (), False, down)
        return gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()

    def _dequantize(self, name: str, index: tuple[int, ...], interleaved: bool, out: torch.Tensor) -> None:
        group_size, bits = getattr(self, f"{name}_group_size"), getattr(self, f"{name}_bits")
        ferrum_ops.marlin_dequantize_out(*self.matrix(name, index), None, group_size, bits, interleaved, out)
