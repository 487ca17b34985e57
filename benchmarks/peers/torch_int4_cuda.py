"""torch's own int4 product on a GPU, `aten::_weight_int4pack_mm` (tinygemm): a linear layer, bfloat16."""

from __future__ import annotations

import torch

from benchmarks.peers.interface import Call, Int4Matrix, needs

#: The most K tiles of 16 that one load covers.
INNER_K_TILES = 8


class TorchInt4CudaLinear:
    def __init__(self, matrix: Int4Matrix) -> None:
        self.matrix = matrix.with_scales(torch.bfloat16)
        # Two codes per byte, the even channel in the high nibble.
        words = (matrix.codes[:, 0::2] << 4 | matrix.codes[:, 1::2]).cuda()
        self.packed = torch.ops.aten._convert_weight_to_int4pack(words, INNER_K_TILES)
        scales = self.matrix.scales.T.cuda()
        self.scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
        self.nbytes = self.packed.nbytes + self.scales_and_zeros.nbytes

    def bind(self, x: torch.Tensor) -> Call:
        x, group_size, product = x.cuda().bfloat16(), self.matrix.group_size, torch.ops.aten._weight_int4pack_mm
        return lambda: product(x, self.packed, group_size, self.scales_and_zeros)

    def dense(self) -> torch.Tensor:
        return self.matrix.dense()


class TorchInt4Cuda:
    name = "torch int4 cuda"
    bound = 2e-2
    moe_block = None
    linear = TorchInt4CudaLinear

    def available(self) -> str | None:
        return needs(cuda=True)


PEERS = (TorchInt4Cuda(),)
