"""vLLM's fused Marlin MoE block, bfloat16, where vllm is installed. Its tiles are Marlin's, so Ferrum packs them."""

from __future__ import annotations

import inspect

import torch

import ferrum_ops
from benchmarks.peers.ferrum_marlin import codes_of, shape_of
from benchmarks.peers.interface import Call, MoeWeights, needs
from ferrum_models.quantization.marlin import side_by_side


class VllmMoeBlock:
    def __init__(self, weights: MoeWeights) -> None:
        shape, self.weights = weights.shape, weights.with_scales(torch.bfloat16)
        up_gate = shape_of(shape.hidden, 2 * shape.width, shape.group_size)
        back = shape_of(shape.width, shape.hidden, shape.group_size)
        pairs = zip(weights.gate, weights.up)
        first = [up_gate.pack(side_by_side([codes_of(m, "cuda") for m in pair]), None) for pair in pairs]
        second = [back.pack(codes_of(matrix, "cuda"), None) for matrix in weights.down]
        self.w1, self.w2 = (weights.stack([p[0] for p in parts]) for parts in (first, second))
        self.w1_scale, self.w2_scale = (weights.stack([p[1] for p in parts]).bfloat16() for parts in (first, second))
        held = (self.w1, self.w2, self.w1_scale, self.w2_scale)
        self.expert_nbytes = sum(t.nbytes for t in held) // shape.experts
        self.workspace = ferrum_ops.marlin_workspace("cuda")

    def bind(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
        from vllm.model_executor.layers.fused_moe.fused_marlin_moe import fused_marlin_moe
        from vllm.scalar_type import scalar_types

        arguments = {
            "hidden_states": hidden.cuda().bfloat16(),
            "w1": self.w1,
            "w2": self.w2,
            "bias1": None,
            "bias2": None,
            "w1_scale": self.w1_scale,
            "w2_scale": self.w2_scale,
            "topk_weights": weights.cuda(),
            "topk_ids": ids.cuda(),
            "quant_type_id": scalar_types.uint4b8.id,
            "workspace": self.workspace,
        }
        if "gating_output" in inspect.signature(fused_marlin_moe).parameters:  # older versions ask for it
            arguments["gating_output"] = None
        return lambda: fused_marlin_moe(**arguments)

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.weights.expert(index)


class VllmMarlin:
    name = "vllm marlin"
    bound = 2e-2
    linear = None
    moe_block = VllmMoeBlock

    def available(self) -> str | None:
        return needs("vllm", cuda=True)


PEERS = (VllmMarlin(),)
