"""What the experts of a layer become: one layout for all their projections."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ferrum_models import huge_pages
from ferrum_models.checkpoint import CheckpointError, LazyTensor
from ferrum_models.moe.weights import GptqExpertWeights, Int4ExpertWeights
from ferrum_models.quantization.marlin_modules import PackedModule, marlin_experts
from ferrum_models.quantization.modules import PackedExperts, meta
from ferrum_models.quantization.row_order import same_rows, stack_perms
from ferrum_models.quantization.sources import (
    Int4Tensors,
    QuantizedSource,
    common_group_size,
    in_parallel,
    int4_shapes,
)

if TYPE_CHECKING:
    from ferrum_models.qwen3_moe.planner import Planner


class ExpertPlanner:
    """The experts' part of a Planner, to which it adds modules and tensors."""

    def __init__(self, planner: Planner) -> None:
        self.planner, self.result = planner, planner.result
        self.config, self.checkpoint = planner.config, planner.checkpoint
        self.dtype, self.device = planner.dtype, planner.device
        self.runtime, self.activation = planner.runtime, planner.activation

    def plan(self, path: str) -> None:
        hidden, width = self.config.hidden_size, self.config.moe_intermediate_size
        count = self.config.num_experts
        if f"{path}.gate_up_proj" in self.checkpoint:  # already stacked, as transformers holds them in memory
            self.planner.dense(f"{path}.gate_up_proj", (count, 2 * width, hidden))
            self.planner.dense(f"{path}.down_proj", (count, hidden, width))
            return
        self.check_count(path)

        def projection(name: str, in_features: int, out_features: int) -> list[Any]:
            return [self.planner.source(f"{path}.{e}.{name}", in_features, out_features) for e in range(count)]

        gate, up = projection("gate_proj", hidden, width), projection("up_proj", hidden, width)
        down = projection("down_proj", width, hidden)
        for source in (*gate, *up, *down):
            if source.bias_name is not None:
                raise CheckpointError(
                    self.checkpoint.file_of(source.bias_name),
                    source.bias_name,
                    "experts without bias",
                    "a bias",
                )
        self.packed(path, gate, up, down)

    def packed(self, path: str, gate: list[Any], up: list[Any], down: list[Any]) -> None:
        """The experts in the one layout that suits all their projections, the device's own, as on disk, or dense."""
        choices = [self.planner.layout([*gate, *up]), self.planner.layout(down)]
        layouts = {choice.layout for choice in choices}
        choice = next((c for c in choices if c.reason), choices[0])
        if layouts == {"int4_cpu"} and same_rows([*gate, *up]) and same_rows(down):
            self.int4(path, gate, up, down)
        elif layouts == {"marlin"}:
            sizes = (
                self.config.hidden_size,
                self.config.moe_intermediate_size,
                self.config.num_experts_per_tok,
            )
            packed = marlin_experts(gate, up, down, sizes, self.device, self.runtime)
            self.planner.add_packed(path, "marlin", [*gate, *up, *down], packed)
        elif layouts <= {"gptq", "marlin"} and _same_tensors(gate, up, down):
            self.planner.note(path, choice)
            self.gptq(path, gate, up, down)
        else:
            self.dense(path, gate, up, down)

    @cached_property
    def indices(self) -> dict[str, set[int]]:
        """Path of each layer's experts -> the numbers that occur there."""
        found: dict[str, set[int]] = {}
        for name in self.checkpoint.entries:
            path, experts, rest = name.rpartition(".experts.")
            if experts and (index := rest.partition(".")[0]).isdecimal():
                found.setdefault(f"{path}.experts", set()).add(int(index))
        return found

    def check_count(self, path: str) -> None:
        found = self.indices.get(path, set())
        expected = self.config.num_experts
        if found != set(range(expected)):
            raise CheckpointError(
                self.checkpoint.directory,
                path,
                f"experts 0 to {expected - 1} (config num_experts)",
                _ranges(found),
            )

    def dense(self, path: str, gate: Any, up: Any, down: Any) -> None:
        count, hidden, width = len(gate), self.config.hidden_size, self.config.moe_intermediate_size

        def gate_up_proj() -> torch.Tensor:
            stacked = torch.empty(count, 2 * width, hidden, dtype=self.dtype)
            for e in range(count):
                stacked[e, :width], stacked[e, width:] = (
                    gate[e].weight(self.dtype),
                    up[e].weight(self.dtype),
                )
            return stacked

        def down_proj() -> torch.Tensor:
            return torch.stack([source.weight(self.dtype) for source in down])

        self.result.tensors[f"{path}.gate_up_proj"] = LazyTensor((count, 2 * width, hidden), self.dtype, gate_up_proj)
        self.result.tensors[f"{path}.down_proj"] = LazyTensor((count, hidden, width), self.dtype, down_proj)
        self.planner.note_dequantized([*gate, *up, *down])

    def int4(
        self, path: str, gate: list[QuantizedSource], up: list[QuantizedSource], down: list[QuantizedSource]
    ) -> None:
        count, hidden, width = len(gate), self.config.hidden_size, self.config.moe_intermediate_size
        group13, group2 = common_group_size([*gate, *up]), common_group_size(down)
        assert group13 is not None and group2 is not None
        perms13 = stack_perms([gate, up])
        perms2 = stack_perms([down])
        zeros13, zeros2 = (any(s.asymmetric for s in group) for group in ([*gate, *up], down))
        rows13 = hidden if perms13 is None else perms13.shape[-1]
        rows2 = width if perms2 is None else perms2.shape[-1]
        width_tiles, hidden_tiles = -(-width // 16), -(-hidden // 16)
        shapes = int4_shapes("w13", (count,), 2 * width_tiles, rows13, group13, zeros13)
        shapes |= int4_shapes("w2", (count,), hidden_tiles, rows2, group2, zeros2)
        if perms13 is not None:
            shapes["w13_perm"] = (tuple(perms13.shape), torch.int32)
        if perms2 is not None:
            perms2 = perms2[:, 0].contiguous()
            shapes["w2_perm"] = (tuple(perms2.shape), torch.int32)

        def build() -> dict[str, torch.Tensor]:
            made = {name: huge_pages.empty(*shape) for name, shape in shapes.items()}

            def fill(prefix: str, index: Any, part: Int4Tensors) -> None:
                made[prefix][index] = part.packed
                made[f"{prefix}_scales"][index] = part.scales
                if part.zeros is not None:
                    made[f"{prefix}_zeros"][index] = part.zeros

            def one(e: int) -> None:
                for which, source in enumerate((gate[e], up[e])):
                    perm = None if perms13 is None else perms13[e, min(which, perms13.shape[1] - 1)]
                    fill("w13", (e, slice(which, None, 2)), source.int4(perm, group13, zeros13))
                fill("w2", e, down[e].int4(None if perms2 is None else perms2[e], group2, zeros2))

            in_parallel(one, count)
            if perms13 is not None:
                made["w13_perm"] = perms13
            if perms2 is not None:
                made["w2_perm"] = perms2
            return made

        def module() -> nn.Module:
            made = {name: meta(*shape) for name, shape in shapes.items()}
            weights = Int4ExpertWeights(
                w13=made["w13"],
                w13_scales=made["w13_scales"],
                w13_zeros=made.get("w13_zeros"),
                w13_perm=made.get("w13_perm"),
                w2=made["w2"],
                w2_scales=made["w2_scales"],
                w2_zeros=made.get("w2_zeros"),
                w2_perm=made.get("w2_perm"),
                w13_group_size=group13,
                w2_group_size=group2,
                hidden_size=hidden,
                intermediate_size=width,
                activation=self.activation,
            )
            experts = PackedExperts(weights)
            experts.saved = tuple(tuple(s.saved for s in sources) for sources in (gate, up, down))
            return experts

        self.planner.add_packed(path, "int4_cpu", [*gate, *up, *down], PackedModule(shapes, build, module))

    def gptq(
        self, path: str, gate: list[QuantizedSource], up: list[QuantizedSource], down: list[QuantizedSource]
    ) -> None:
        projections = {"gate": gate, "up": up, "down": down}
        shapes = {
            f"{name}_{part}": ((len(sources), *shape), dtype)
            for name, sources in projections.items()
            for part, (shape, dtype) in sources[0].shapes().items()
        }

        def build() -> dict[str, torch.Tensor]:
            made = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}

            def one(e: int) -> None:
                for name, sources in projections.items():
                    for part, tensor in sources[e].tensors().items():
                        made[f"{name}_{part}"][e] = tensor

            in_parallel(one, len(gate))
            return made

        def module() -> nn.Module:
            made = {name: meta(*shape) for name, shape in shapes.items()}
            experts = PackedExperts(GptqExpertWeights(**made, bits=gate[0].bits, zero_offset=gate[0].zero_offset))
            experts.saved = tuple(tuple(s.saved for s in sources) for sources in (gate, up, down))
            return experts

        self.planner.add_packed(path, "gptq", [*gate, *up, *down], PackedModule(shapes, build, module))


def _same_tensors(*projections: list[QuantizedSource]) -> bool:
    """Whether the on-disk tensors of each projection can be stacked, and all have one meaning."""
    sources = [source for experts in projections for source in experts]
    one_meaning = len({(s.bits, s.zero_offset) for s in sources}) == 1
    return one_meaning and all(s.shapes() == experts[0].shapes() for experts in projections for s in experts)


def _ranges(found: set[int]) -> str:
    return f"{len(found)} experts, {min(found)} to {max(found)}" if found else "no experts"
