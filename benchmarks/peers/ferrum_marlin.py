"""Ferrum on a GPU: the Marlin layout, bfloat16 activations. On a CPU its references, for tests."""

from __future__ import annotations

import torch

import ferrum_ops
from benchmarks.peers.interface import Call, Int4Matrix, MoeWeights, needs
from ferrum_models.moe.marlin import MarlinExpertWeights
from ferrum_models.quantization.marlin import Codes, MarlinShape, interleave
from ferrum_ops.config import RuntimeConfig
from ferrum_ops.formats import gptq


def codes_of(matrix: Int4Matrix, device: str) -> Codes:
    """As GPTQ has them."""
    qweight = gptq.pack_rows(matrix.codes.T.contiguous(), 4)
    return Codes(qweight.to(device), matrix.scales.T.contiguous().to(device), None)


def shape_of(in_features: int, out_features: int, group_size: int) -> MarlinShape:
    rows, columns = -(-in_features // 64) * 64, -(-out_features // 64) * 64
    return MarlinShape(4, in_features, rows, columns, group_size, False, False, torch.float16)


class MarlinMoeBlock:
    def __init__(self, weights: MoeWeights, device: str) -> None:
        self.weights, self.device, shape = weights, device, weights.shape
        up_gate = shape_of(shape.hidden, 2 * shape.width, shape.group_size)
        back = shape_of(shape.width, shape.hidden, shape.group_size)
        pairs = zip(weights.gate, weights.up)
        first = [up_gate.pack(interleave(*(codes_of(m, device) for m in pair)), None) for pair in pairs]
        second = [back.pack(codes_of(matrix, device), None) for matrix in weights.down]
        w13, w13_scales = (weights.stack([p[i] for p in first])[None] for i in (0, 1))
        w2, w2_scales = (weights.stack([p[i] for p in second]) for i in (0, 1))
        self.expert_nbytes = sum(t.nbytes for t in (w13, w13_scales, w2, w2_scales)) // shape.experts
        values = {
            "w13_group_size": shape.group_size,
            "w2_group_size": shape.group_size,
            "w13_bits": 4,
            "w2_bits": 4,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.width,
            "top_k": shape.top_k,
            **MarlinExpertWeights.settings(RuntimeConfig()),
        }
        constants = MarlinExpertWeights.make_constants(values, torch.device(device))
        tensors = {"w13": w13, "w13_scales": w13_scales, "w2": w2, "w2_scales": w2_scales, **constants}
        absent = dict.fromkeys(("w13_zeros", "w13_perm", "w2_zeros", "w2_perm"))
        self.experts = MarlinExpertWeights(**tensors, **absent, **values)

    def bind(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
        hidden, ids, weights = hidden.to(self.device, torch.bfloat16), ids.to(self.device), weights.to(self.device)
        return lambda: self.experts.fused(hidden, ids, weights)

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.weights.expert(index)  # codes and float16 scales as they are


class MarlinLinear:
    def __init__(self, matrix: Int4Matrix, device: str) -> None:
        self.matrix, self.device = matrix, device
        self.shape = shape_of(matrix.codes.shape[1], matrix.codes.shape[0], matrix.group_size)
        self.words, self.scales, _ = self.shape.pack(codes_of(matrix, device), None)
        self.workspace = ferrum_ops.marlin_workspace(device)
        self.nbytes = self.words.nbytes + self.scales.nbytes

    def bind(self, x: torch.Tensor) -> Call:
        x = x.to(self.device, torch.bfloat16)
        sizes = (self.matrix.codes.shape[0], self.shape.group_size)
        return lambda: ferrum_ops.marlin_gemm(x, self.words, self.scales, None, None, None, self.workspace, *sizes)

    def dense(self) -> torch.Tensor:
        return self.matrix.dense()


class FerrumMarlin:
    name = "ferrum marlin"
    bound = 2e-2

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    def available(self) -> str | None:
        return needs(cuda=self.device == "cuda")

    def moe_block(self, weights: MoeWeights) -> MarlinMoeBlock:
        return MarlinMoeBlock(weights, self.device)

    def linear(self, matrix: Int4Matrix) -> MarlinLinear:
        return MarlinLinear(matrix, self.device)


PEERS = (FerrumMarlin(),)
