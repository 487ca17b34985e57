"""torch's own int4 product on the CPU, `aten::_weight_int4pack_mm_for_cpu`: a linear layer, no experts."""

from __future__ import annotations

import torch

from benchmarks.peers.interface import Call, Int4Matrix


class TorchInt4Linear:
    def __init__(self, matrix: Int4Matrix, dtype: torch.dtype) -> None:
        self.matrix, self.dtype = matrix, dtype
        # The second argument is a tile size of the CUDA layout; the CPU's ignores it.
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.codes.int(), 1)
        scales = matrix.scales.T.to(dtype)
        self.scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
        self.nbytes = self.packed.nbytes + self.scales_and_zeros.nbytes

    def bind(self, x: torch.Tensor) -> Call:
        x, group_size = x.to(self.dtype), self.matrix.group_size
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return lambda: product(x, self.packed, group_size, self.scales_and_zeros)

    def dense(self) -> torch.Tensor:
        scales = self.scales_and_zeros[..., 0].T.double()
        return (self.matrix.codes.double() - 8) * scales.repeat_interleave(self.matrix.group_size, dim=1)


class TorchInt4:
    moe_block = None

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = f"torch int4 {str(dtype).removeprefix('torch.')}"
        self.bound = 2e-2 if dtype == torch.bfloat16 else 1e-4

    def available(self) -> str | None:
        return None

    def linear(self, matrix: Int4Matrix) -> TorchInt4Linear:
        return TorchInt4Linear(matrix, self.dtype)


PEERS = (TorchInt4(torch.float32), TorchInt4(torch.bfloat16))
