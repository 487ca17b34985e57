"""gemlite (github.com/mobiusml/gemlite), Triton kernels: a linear layer, bfloat16, symmetric codes less 8."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.interface import Call, Int4Matrix, needs


class GemliteLinear:
    def __init__(self, matrix: Int4Matrix) -> None:
        from gemlite import DType, GemLiteLinearTriton

        self.matrix = matrix.with_scales(torch.bfloat16)
        out_features, in_features = matrix.codes.shape
        self.layer: Any = GemLiteLinearTriton(
            W_nbits=4,
            group_size=matrix.group_size,
            in_features=in_features,
            out_features=out_features,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        self.layer.pack(matrix.codes.cuda(), self.matrix.scales.cuda(), zeros=8, bias=None)
        self.nbytes = self.layer.W_q.nbytes + self.layer.scales.nbytes

    def bind(self, x: torch.Tensor) -> Call:
        x = x.cuda().bfloat16()
        return lambda: self.layer(x)

    def dense(self) -> torch.Tensor:
        return self.matrix.dense()


class Gemlite:
    name = "gemlite"
    bound = 2e-2
    moe_block = None
    linear = GemliteLinear

    def available(self) -> str | None:
        return needs("gemlite", cuda=True)


PEERS = (Gemlite(),)
