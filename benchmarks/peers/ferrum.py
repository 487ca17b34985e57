"""Ferrum itself, behind the interface of its peers."""

from __future__ import annotations

import torch

import ferrum_ops
from benchmarks.peers.interface import Call, Int4Matrix, MoeWeights
from ferrum_models import huge_pages
from ferrum_ops.formats import gptq, int4


def pack(matrix: Int4Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales in the layout "int4_cpu"."""
    qweight = gptq.pack_rows(matrix.codes.T.contiguous(), 4)
    return int4.pack(qweight, None, matrix.codes.shape[1]), int4.pack_groups(matrix.scales.T)


def as_loaded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where the loader puts packed weights."""
    return huge_pages.cat([tensor])


def unpack(packed: torch.Tensor, scales: torch.Tensor, out_features: int, group_size: int) -> torch.Tensor:
    """float64 `[N, K]`."""
    return int4.dequantize(packed, scales, None, None, packed.shape[1] * 8, out_features, group_size).T


class FerrumMoeBlock:
    def __init__(self, weights: MoeWeights, activation: str) -> None:
        self.shape = weights.shape
        gate, up, down = ([pack(m) for m in matrices] for matrices in (weights.gate, weights.up, weights.down))
        self.w13, self.w13_scales = (
            as_loaded(weights.stack([int4.interleave_tiles(g[i], u[i]) for g, u in zip(gate, up)])) for i in (0, 1)
        )
        self.w2, self.w2_scales = (as_loaded(weights.stack([d[i] for d in down])) for i in (0, 1))
        self.expert_nbytes = sum(t[0].nbytes for t in (self.w13, self.w13_scales, self.w2, self.w2_scales))
        self.activation = activation

    def bind(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
        group_size = self.shape.group_size
        up_gate = (self.w13, self.w13_scales, None, None, group_size)
        down = (self.w2, self.w2_scales, None, None, group_size)
        arguments = (hidden, ids, weights, *up_gate, *down, self.shape.width, self.activation)
        return lambda: ferrum_ops.moe_experts_int4(*arguments)

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up = int4.deinterleave_tiles(self.w13[index])
        gate_scales, up_scales = int4.deinterleave_tiles(self.w13_scales[index])
        width, group_size = self.shape.width, self.shape.group_size
        return (
            unpack(gate, gate_scales, width, group_size),
            unpack(up, up_scales, width, group_size),
            unpack(self.w2[index], self.w2_scales[index], self.shape.hidden, group_size),
        )


class FerrumLinear:
    def __init__(self, matrix: Int4Matrix, activation: str) -> None:
        self.packed, self.scales = map(as_loaded, pack(matrix))
        self.nbytes = self.packed.nbytes + self.scales.nbytes
        self.out_features, self.group_size, self.activation = matrix.codes.shape[0], matrix.group_size, activation

    def bind(self, x: torch.Tensor) -> Call:
        arguments = (x, self.packed, self.scales, None, None, None, self.out_features, self.group_size, self.activation)
        return lambda: ferrum_ops.int4_linear(*arguments)

    def dense(self) -> torch.Tensor:
        return unpack(self.packed, self.scales, self.out_features, self.group_size)


class Ferrum:
    """`activation` "int8" or "full"."""

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self.name = f"ferrum {activation}"
        self.bound = 3e-2 if activation == "int8" else 1e-5

    def available(self) -> str | None:
        return None

    def moe_block(self, weights: MoeWeights) -> FerrumMoeBlock:
        return FerrumMoeBlock(weights, self.activation)

    def linear(self, matrix: Int4Matrix) -> FerrumLinear:
        return FerrumLinear(matrix, self.activation)


PEERS = (Ferrum("int8"), Ferrum("full"))
