"""Modules in the Marlin layout before they have weights: what they hold, how that is packed, how they are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ferrum_models import huge_pages
from ferrum_models.moe.marlin import MarlinExpertWeights
from ferrum_models.quantization.marlin import Codes, MarlinShape, interleave, side_by_side
from ferrum_models.quantization.modules import MarlinLinear, PackedExperts, meta
from ferrum_models.quantization.sources import QuantizedSource, Shapes, bias_of, in_parallel, same_order
from ferrum_ops.config import RuntimeConfig
from ferrum_ops.formats.marlin import GATE_RUN


@dataclass(frozen=True)
class PackedModule:
    shapes: Shapes
    build: Callable[[], dict[str, torch.Tensor]]  # the tensors of `shapes`
    module: Callable[[], nn.Module]  # on the meta device


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return huge_pages.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def marlin_linear(
    sources: list[QuantizedSource], device: torch.device, dtype: torch.dtype, runtime: RuntimeConfig
) -> PackedModule:
    """Linears of one input and one order of its rows, side by side. dtype: of the bias."""
    out_features = sum(s.out_features for s in sources)
    shape = MarlinShape.of(sources, out_features)
    shapes = shape.tensors(("packed", "scales", "zeros", "perm"))
    if any(s.bias_name for s in sources):
        shapes["bias"] = ((out_features,), dtype)

    def build() -> dict[str, torch.Tensor]:
        perm = shape.order(sources[0]).to(device) if shape.with_perm else None
        packed = shape.pack(side_by_side([shape.read(s, device) for s in sources]), perm)
        bias = bias_of(sources, dtype) if "bias" in shapes else None
        found = zip(("packed", "scales", "zeros", "perm", "bias"), (*packed, perm, bias))
        return {name: tensor for name, tensor in found if tensor is not None}

    def module() -> nn.Module:
        linear = MarlinLinear(
            {name: meta(*sizes) for name, sizes in shapes.items()},
            shape=shape,
            out_features=out_features,
            reduction=runtime.marlin_reduction,
            max_sms=runtime.vllm_marlin_sms or 0,
        )
        linear.saved = tuple(s.saved for s in sources)
        return linear

    return PackedModule(shapes, build, module)


def marlin_experts(
    gate: list[QuantizedSource],
    up: list[QuantizedSource],
    down: list[QuantizedSource],
    sizes: tuple[int, int, int],
    device: torch.device,
    runtime: RuntimeConfig,
) -> PackedModule:
    """The experts of one layer. sizes: hidden size, expert width, top-k."""
    count, (hidden, width, top_k) = len(gate), sizes
    # Orders of their own keep gate and up from standing side by side: two matrices instead of one.
    interleaved = all(same_order([g, u]) for g, u in zip(gate, up))
    shape13 = MarlinShape.of([*gate, *up], 2 * (-(-width // GATE_RUN) * GATE_RUN) if interleaved else width)
    shape2 = MarlinShape.of(down, hidden)
    names = {prefix: (prefix, f"{prefix}_scales", f"{prefix}_zeros", f"{prefix}_perm") for prefix in ("w13", "w2")}
    lead = (1 if interleaved else 2, count)
    shapes = shape13.tensors(names["w13"], lead) | shape2.tensors(names["w2"], (count,))

    def build() -> dict[str, torch.Tensor]:
        made = {name: _empty(*shape, device) for name, shape in shapes.items()}

        def fill(prefix: str, index: Any, shape: MarlinShape, source: QuantizedSource, codes: Codes) -> None:
            perm = shape.order(source).to(device) if shape.with_perm else None
            for name, tensor in zip(names[prefix], (*shape.pack(codes, perm), perm)):
                if tensor is not None:
                    made[name][index] = tensor

        def one(e: int) -> None:
            codes = [shape13.read(source[e], device) for source in (gate, up)]
            matrices = [interleave(*codes)] if interleaved else codes
            for part, (source, matrix) in enumerate(zip((gate, up), matrices)):
                fill("w13", (part, e), shape13, source[e], matrix)
            fill("w2", e, shape2, down[e], shape2.read(down[e], device))

        in_parallel(one, count)
        return made

    def module() -> nn.Module:
        made = {name: meta(*tensor) for name, tensor in shapes.items()}
        tensors: dict[str, Any] = {name: made.get(name) for group in names.values() for name in group}
        tensors |= dict.fromkeys(MarlinExpertWeights.constant_fields)  # made after loading
        weights = MarlinExpertWeights(
            **tensors,
            w13_group_size=shape13.group_size,
            w2_group_size=shape2.group_size,
            w13_bits=shape13.bits,
            w2_bits=shape2.bits,
            hidden_size=hidden,
            intermediate_size=width,
            top_k=top_k,
            **MarlinExpertWeights.settings(runtime),
        )
        experts = PackedExperts(weights)
        experts.saved = tuple(tuple(s.saved for s in sources) for sources in (gate, up, down))
        experts.shapes = (shape13, shape2)
        return experts

    return PackedModule(shapes, build, module)
