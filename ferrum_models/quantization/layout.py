"""Which layout a quantised weight gets on which device."""

from __future__ import annotations

import torch


def pick_layout(bits: int, kernel_group_size: int | None, device: torch.device) -> str:
    """The layout of a GPTQ weight.

    "int4_cpu" is packed for the CPU kernels, "gptq" as on disk and dequantised when used, "dense" dequantised to the
    activation dtype while loading.

    `kernel_group_size` is the group size the CPU kernels would use (a multiple of 8, at most 128), or None if the
    weight's groups admit none.
    """
    if bits != 4:
        return "dense"
    if device.type == "cpu":
        return "dense" if kernel_group_size is None else "int4_cpu"
    return "gptq"
