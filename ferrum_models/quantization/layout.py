"""Which layout a quantised weight gets on which device."""

from __future__ import annotations

import torch

#: layout -> what it is
LAYOUTS = {
    "int4_cpu": "packed for the CPU kernels (ferrum_ops.int4_pack)",
    "gptq": "as on disk, dequantised when used",
    "dense": "dequantised to the activation dtype while loading",
}


def pick_layout(bits: int, kernel_group_size: int | None, device: torch.device) -> str:
    """The layout of a GPTQ weight.

    `kernel_group_size` is the group size the CPU kernels would use (a multiple of 8, at most 128), or None if the
    weight's groups admit none.
    """
    if bits != 4:
        return "dense"
    if device.type == "cpu":
        return "dense" if kernel_group_size is None else "int4_cpu"
    return "gptq"
