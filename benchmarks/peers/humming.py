"""Humming (github.com/vllm-project/humming), compiled at run time: linear layers and indexed MoE products, bfloat16.

Its products are given Ferrum's alignment, SiLU and combination, so that what is compared is the products. Each takes
the one configuration that Humming's own heuristics choose for the number of pairs, and blocks of its height.
"""

from __future__ import annotations

import json
from typing import Any

import torch

import ferrum_ops
from benchmarks.peers.interface import Call, Int4Matrix, MoeWeights, needs
from ferrum_ops.formats import gptq

INDEXED = json.dumps({"gemm_type": "indexed"})


def make_layer(qweight: torch.Tensor, scales: torch.Tensor, group_size: int) -> Any:
    """A layer of GPTQ words `[..., K/8, N]` and scales `[..., G, N]`; a leading dimension is that of experts."""
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=qweight.shape[-1],
        shape_k=qweight.shape[-2] * 8,
        weight_config={"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True},
        num_experts=qweight.shape[0] if qweight.dim() == 3 else None,
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_tensors({"qweight": qweight.cuda(), "scales": scales.cuda().bfloat16()})
    layer.transform()
    return layer


def tuning(layer: Any, rows: int) -> dict[str, Any]:
    from humming.tune import get_heuristics_config

    return get_heuristics_config(layer.humming_config, shape_m=rows, gemm_type="indexed", device=torch.device("cuda"))


def words(matrix: Int4Matrix) -> torch.Tensor:
    return gptq.pack_rows(matrix.codes.T.contiguous(), 4)


def nbytes(layer: Any) -> int:
    return sum(tensor.nbytes for name, tensor in layer.named_parameters() if name in ("weight", "weight_scale"))


class HummingMoeBlock:
    def __init__(self, weights: MoeWeights) -> None:
        self.shape, self.weights = weights.shape, weights.with_scales(torch.bfloat16)
        up_gate = [(torch.cat([words(g), words(u)], 1), torch.cat([g.scales, u.scales]).T) for g, u in
                   zip(weights.gate, weights.up)]  # fmt: skip
        down = [(words(matrix), matrix.scales.T) for matrix in weights.down]
        self.w13, self.w2 = (
            make_layer(*(weights.stack([p[i] for p in parts]) for i in (0, 1)), self.shape.group_size)
            for parts in (up_gate, down)
        )
        self.expert_nbytes = (nbytes(self.w13) + nbytes(self.w2)) // self.shape.experts

    def bind(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
        hidden, ids, weights = hidden.cuda().bfloat16(), ids.cuda(), weights.cuda()
        top_k, experts = ids.shape[1], self.shape.experts
        configs = [tuning(layer, ids.numel()) for layer in (self.w13, self.w2)]
        heights = [config["block_shape"][0] for config in configs]

        def product(layer: Any, x: torch.Tensor, blocks: Any, top_k: int, config: Any) -> torch.Tensor:
            names = ("sorted_ids", "expert_ids", "num_tokens_padded")
            return layer(x, **dict(zip(names, blocks)), top_k=top_k, compute_config=INDEXED, tuning_config=config)

        def call() -> torch.Tensor:
            blocks = {h: ferrum_ops.moe_align_block_size(ids, experts, h) for h in dict.fromkeys(heights)}
            gate_up = product(self.w13, hidden, blocks[heights[0]], top_k, configs[0])
            activated = ferrum_ops.silu_mul(gate_up)
            slots = product(self.w2, activated, blocks[heights[1]], 1, configs[1])
            return ferrum_ops.weighted_sum(slots.view(-1, top_k, slots.shape[-1]), weights)

        return call

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.weights.expert(index)


class HummingLinear:
    def __init__(self, matrix: Int4Matrix) -> None:
        self.matrix = matrix.with_scales(torch.bfloat16)
        self.layer = make_layer(words(matrix), matrix.scales.T, matrix.group_size)
        self.nbytes = nbytes(self.layer)

    def bind(self, x: torch.Tensor) -> Call:
        x = x.cuda().bfloat16()
        return lambda: self.layer(x)

    def dense(self) -> torch.Tensor:
        return self.matrix.dense()


class Humming:
    name = "humming"
    bound = 2e-2
    moe_block = HummingMoeBlock
    linear = HummingLinear

    def available(self) -> str | None:
        return needs("humming", cuda=True)


PEERS = (Humming(),)
