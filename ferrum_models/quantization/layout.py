"""Which layout a quantised weight gets on which device."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from ferrum_ops.formats import int4

#: Layouts that `from_pretrained(layout=...)` can ask for.
LAYOUTS = ("marlin", "gptq", "int4_cpu", "dense")
MARLIN_BITS = (4, 8)
MARLIN_GROUPS = (128, 64, 32, 16)


@dataclass(frozen=True)
class WeightFormat:
    """What decides the layout of linears that are packed together, beside their shape and device."""

    bits: tuple[int, ...]  # distinct
    group_sizes: tuple[int, ...]  # distinct: rows of a full group; -1: a single group
    dtype: torch.dtype  # of the activations


@dataclass(frozen=True)
class LayoutChoice:
    """`reason` says why it is not the layout that the device has kernels for, or that was asked for."""

    layout: str
    reason: str = ""


def cpu_group_size(group_sizes: tuple[int, ...], in_features: int) -> int | None:
    """Rows per scale of the CPU layout: a multiple of 8, at most 128, that divides every group. None: there is none.

    Groups of different sizes have to divide K, since the layout has no padding rows.
    """
    group_sizes = tuple(in_features if size == -1 else size for size in group_sizes)
    if len(group_sizes) > 1 and any(in_features % size for size in group_sizes):
        return None
    return int4.kernel_group_size(gcd(*group_sizes)) if group_sizes else None


def marlin_group_size(group_sizes: tuple[int, ...]) -> int | None:
    """Rows per scale of the Marlin layout: 128, 64, 32, 16, or -1 where all have a single group. None: none of them."""
    several = [size for size in group_sizes if size != -1]
    if not several:
        return -1
    return next((size for size in MARLIN_GROUPS if gcd(*several) % size == 0), None)


def pick_layout(
    weight: WeightFormat, device: torch.device, shape: tuple[int, int], requested: str | None = None
) -> LayoutChoice:
    """The layout of a GPTQ weight of `shape` (in-features, out-features).

    "marlin" is packed for tensor cores, its sizes padded to whole tiles; "int4_cpu" for the CPU kernels; "gptq" is as
    on disk; "dense" is dequantised to the activation dtype while loading. CUDA takes marlin, or gptq for what Marlin
    has no form for; the CPU takes int4_cpu, or dense; other devices take gptq. `requested` replaces the device's own
    choice, as far as the weight has such a form.
    """
    own = {"cuda": "marlin", "cpu": "int4_cpu"}.get(device.type, "gptq")
    wanted = own if requested is None else requested
    if wanted == "dense":
        return LayoutChoice("dense")
    if len(weight.bits) > 1:
        return LayoutChoice("dense", f"{_either(weight.bits)} bits side by side")
    if wanted == "gptq":
        return LayoutChoice("gptq")
    if wanted == "int4_cpu":
        if weight.bits != (4,):
            return LayoutChoice("dense", f"{weight.bits[0]}-bit codes")
        if cpu_group_size(weight.group_sizes, shape[0]) is None:
            return LayoutChoice("dense", f"groups of {_either(weight.group_sizes)} rows")
        return LayoutChoice("int4_cpu")
    if weight.bits[0] not in MARLIN_BITS:
        return LayoutChoice("gptq", f"Marlin has {_either(MARLIN_BITS)} bits, not {weight.bits[0]}")
    if marlin_group_size(weight.group_sizes) is None:
        sizes = f"Marlin has groups of {_either(MARLIN_GROUPS)} rows or one group"
        return LayoutChoice("gptq", f"{sizes}, not of {_either(weight.group_sizes)}")
    if device.type == "cuda" and weight.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(weight.dtype).removeprefix("torch.")
        return LayoutChoice("gptq", f"Marlin has float16 and bfloat16 activations, not {dtype}")
    return LayoutChoice("marlin")


def _either(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))
