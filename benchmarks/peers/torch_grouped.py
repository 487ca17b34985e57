"""torch's grouped matrix product over dense bfloat16 weights, sorted and combined by Ferrum's ops."""

from __future__ import annotations

import torch

from benchmarks.peers.interface import Call, MoeWeights, needs
from ferrum_models.moe.weights import DenseExpertWeights


class GroupedMoeBlock:
    def __init__(self, weights: MoeWeights, device: str) -> None:
        self.device, self.width = device, weights.shape.width

        def stack(matrices: list[torch.Tensor]) -> torch.Tensor:
            return weights.stack([matrix.to(device, torch.bfloat16) for matrix in matrices])

        pairs = zip(weights.gate, weights.up)
        gate_up = stack([torch.cat([g.dense(torch.float32), u.dense(torch.float32)]) for g, u in pairs])
        self.experts = DenseExpertWeights(gate_up, stack([d.dense(torch.float32) for d in weights.down]))
        self.expert_nbytes = gate_up[0].nbytes + self.experts.down_proj[0].nbytes

    def bind(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
        hidden, ids, weights = hidden.to(self.device, torch.bfloat16), ids.to(self.device), weights.to(self.device)
        return lambda: self.experts.fused(hidden, ids, weights)

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up = self.experts.gate_up_proj[index].double().cpu().split(self.width)
        return gate, up, self.experts.down_proj[index].double().cpu()


class TorchGrouped:
    name = "torch bf16 grouped_mm"
    bound = 2e-2
    linear = None

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    def available(self) -> str | None:
        return needs(cuda=self.device == "cuda")

    def moe_block(self, weights: MoeWeights) -> GroupedMoeBlock:
        return GroupedMoeBlock(weights, self.device)


PEERS = (TorchGrouped(),)
