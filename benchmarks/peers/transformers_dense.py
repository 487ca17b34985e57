"""transformers' Qwen3-MoE experts over dense bfloat16 weights, by its "grouped_mm" implementation."""

from __future__ import annotations

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.peers.interface import Call, MoeWeights


class DenseMoeBlock:
    def __init__(self, weights: MoeWeights) -> None:
        shape = weights.shape
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            self.experts = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
        pairs = zip(weights.gate, weights.up)
        gate_up = [torch.cat([g.dense(torch.float32), u.dense(torch.float32)]).bfloat16() for g, u in pairs]
        self.width = shape.width
        self.experts.gate_up_proj = torch.nn.Parameter(weights.stack(gate_up), requires_grad=False)
        down = [d.dense(torch.float32).bfloat16() for d in weights.down]
        self.experts.down_proj = torch.nn.Parameter(weights.stack(down), requires_grad=False)
        self.expert_nbytes = self.experts.gate_up_proj[0].nbytes + self.experts.down_proj[0].nbytes

    def bind(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
        hidden, ids, weights = hidden.bfloat16(), ids.long(), weights.bfloat16()
        return lambda: self.experts(hidden, ids, weights)

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up = self.experts.gate_up_proj[index].double().split(self.width)
        return gate, up, self.experts.down_proj[index].double()


class TransformersDense:
    name = "transformers bf16"
    bound = 2e-2
    linear = None

    def available(self) -> str | None:
        return None

    moe_block = DenseMoeBlock


PEERS = (TransformersDense(),)
