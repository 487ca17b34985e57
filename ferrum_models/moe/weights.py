"""The weights of a layer's experts, one class per layout, all with the same three questions.

`gate_up(x, e)` and `down(x, e)` are the two projections of one expert; `fused(hidden, ids, weights)` is the whole block
without a host read. T tokens, K top-k, E experts, H hidden, I expert width, m rows of one expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F

import ferrum_ops

if TYPE_CHECKING:
    from ferrum_models.moe.streams import Lanes


@dataclass(frozen=True)
class ExpertWeights(ABC):
    """Base of every layout. Tensors have E leading; the other fields are plain values."""

    layout: ClassVar[str]
    tensor_fields: ClassVar[tuple[str, ...]]
    value_fields: ClassVar[tuple[str, ...]]
    #: Tensors that no checkpoint has, such as a workspace: made by `make_constants` for a device.
    constant_fields: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def num_experts(self) -> int: ...

    @abstractmethod
    def gate_up(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """`[m, H] -> [m, 2I]`, gate first."""

    @abstractmethod
    def down(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """`[m, I] -> [m, H]`."""

    @abstractmethod
    def fused(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """`[T, H], [T, K] int32, [T, K] float32 -> [T, H]`; ids outside `[0, E)` are skipped."""

    def routed_block_size(self, hidden: torch.Tensor, top_k: int) -> int:
        """Rows of the `Blocks` that `fused` takes as a fourth argument if the router has sorted the pairs; 0: none."""
        return 0

    @property
    def streams(self) -> int:
        """CUDA streams that the launches of `bucketed` take turns on."""
        return 1

    @property
    def host_route(self) -> bool:
        """Whether the host makes the plan of `bucketed`."""
        return False

    @property
    def one_launch(self) -> bool:
        """Whether `fused` runs as that, and not as `bucketed`."""
        return True

    @classmethod
    def make_constants(cls, values: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of `constant_fields`; `values` are the fields that are no tensors."""
        return {}

    def bucketed(
        self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, lanes: Lanes
    ) -> torch.Tensor | None:
        """The block in launches for single buckets of rows, without a host read; None if the layout has none."""
        return None

    def bucket_rows(self, rows_per_expert: list[int]) -> int | None:
        """Most rows of a bucket; None: all of an expert's."""
        return None

    def lane(self, index: int) -> ExpertWeights:
        """The weights as launches on one of several streams use them."""
        return self

    def traceable(self, dtype: torch.dtype) -> bool:
        """Whether a compiler can trace through `fused` for activations of this dtype."""
        # PyTorch's grouped_mm runs in any dtype, but its fake accepts only bfloat16.
        return dtype == torch.bfloat16

    def tensors(self) -> list[torch.Tensor | None]:
        """The tensor fields in order, for an op's arguments."""
        return [getattr(self, name) for name in self.tensor_fields]

    def spec(self) -> str:
        """Everything but the tensors, as a string. (Formatted by hand: a compiler traces through it.)"""
        return ";".join([self.layout, *(f"{name}={getattr(self, name)}" for name in self.value_fields)])

    @staticmethod
    def rebuild(tensors: list[torch.Tensor | None], spec: str) -> ExpertWeights:
        """Inverse of `tensors()` and `spec()`."""
        layout, *settings = spec.split(";")
        cls = LAYOUTS[layout]
        values = dict(setting.split("=") for setting in settings)
        typed = {name: _parse(value) for name, value in values.items()}
        return cls(**dict(zip(cls.tensor_fields, tensors)), **typed)


def _parse(value: str) -> int | bool | str:
    if value in ("True", "False"):
        return value == "True"
    return int(value) if value.lstrip("-").isdecimal() else value


def grouped_experts(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,  # [E, 2I, H]
    down: torch.Tensor,  # [E, H, I]
) -> torch.Tensor:
    """Sort by expert, two grouped matrix products, combine: dense weights, no host read."""
    if hidden.shape[0] == 0:
        return torch.empty_like(hidden)
    pairs, tokens, offsets = ferrum_ops.moe_build_pairs_by_token(topk_ids, gate_up.shape[0])
    # Rows of skipped pairs hold token -1 and lie behind the last offset: whatever they compute, no pair points at them.
    packed = hidden[tokens.clamp_min(0)]
    gate_up_rows = F.grouped_mm(packed, gate_up.transpose(1, 2), offs=offsets[1:])
    activated = ferrum_ops.silu_mul(gate_up_rows)
    rows = F.grouped_mm(activated, down.transpose(1, 2), offs=offsets[1:])
    return ferrum_ops.moe_combine(rows, pairs, topk_weights)


LAYOUTS: dict[str, type[ExpertWeights]] = {}

Weights = TypeVar("Weights", bound=type[ExpertWeights])


def register_layout(cls: Weights) -> Weights:
    """Class decorator: sorts the fields into tensors and values, and makes the layout known to `rebuild`."""
    cls.tensor_fields = tuple(f.name for f in fields(cls) if "Tensor" in str(f.type))
    cls.value_fields = tuple(f.name for f in fields(cls) if f.name not in cls.tensor_fields)
    LAYOUTS[cls.layout] = cls
    return cls


@register_layout
@dataclass(frozen=True)
class DenseExpertWeights(ExpertWeights):
    """Dense weights as transformers holds them."""

    layout = "dense"
    gate_up_proj: torch.Tensor  # [E, 2I, H], gate first
    down_proj: torch.Tensor  # [E, H, I]

    @property
    def num_experts(self) -> int:
        return self.gate_up_proj.shape[0]

    def gate_up(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(x, self.gate_up_proj[expert])

    def down(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(x, self.down_proj[expert])

    def fused(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return grouped_experts(hidden, topk_ids, topk_weights, self.gate_up_proj, self.down_proj)


@register_layout
@dataclass(frozen=True)
class GptqExpertWeights(ExpertWeights):
    """GPTQ tensors as on disk, stacked: on request, and where there is no packed kernel. Dequantised when used."""

    layout = "gptq"
    gate_qweight: torch.Tensor  # int32 [E, H*bits/32, I]
    gate_qzeros: torch.Tensor  # int32 [E, G, I*bits/32]
    gate_scales: torch.Tensor  # float16 [E, G, I]
    gate_g_idx: torch.Tensor  # int32 [E, H]
    up_qweight: torch.Tensor
    up_qzeros: torch.Tensor
    up_scales: torch.Tensor
    up_g_idx: torch.Tensor
    down_qweight: torch.Tensor  # int32 [E, I*bits/32, H]
    down_qzeros: torch.Tensor
    down_scales: torch.Tensor
    down_g_idx: torch.Tensor
    bits: int
    zero_offset: int  # 1: qzeros hold zero - 1 (GPTQ v1); 0: v2

    @property
    def num_experts(self) -> int:
        return self.gate_qweight.shape[0]

    def _weight(self, projection: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """`[in, out]` of one projection of one expert."""
        qweight, qzeros, scales, g_idx = (
            getattr(self, f"{projection}_{part}")[expert] for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        return ferrum_ops.gptq_dequantize(qweight, qzeros, scales, g_idx, self.bits, self.zero_offset, dtype)

    def gate_up(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        gate, up = x @ self._weight("gate", expert, x.dtype), x @ self._weight("up", expert, x.dtype)
        return torch.cat([gate, up], dim=-1)

    def down(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return x @ self._weight("down", expert, x.dtype)

    def fused(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        def stack(projection: str) -> torch.Tensor:
            return torch.stack([self._weight(projection, e, hidden.dtype).T for e in range(self.num_experts)])

        gate_up = torch.cat([stack("gate"), stack("up")], dim=1)
        return grouped_experts(hidden, topk_ids, topk_weights, gate_up, stack("down"))


@register_layout
@dataclass(frozen=True)
class Int4ExpertWeights(ExpertWeights):
    """The CPU layout of `ferrum_ops.int4_pack`: 16 output columns in the lanes, gate and up tiles alternating."""

    layout = "int4_cpu"
    w13: torch.Tensor  # uint8 [E, 2*I_pad/16, H_packed/8, 64]
    w13_scales: torch.Tensor  # float16 [E, 2*I_pad/16, G, 16]
    w13_zeros: torch.Tensor | None  # uint8 like the scales; None: every zero point is 8
    w13_perm: torch.Tensor | None  # int32 [E, 1 or 2, H_packed]: input channel of each packed row
    w2: torch.Tensor  # uint8 [E, H_pad/16, I_packed/8, 64]
    w2_scales: torch.Tensor
    w2_zeros: torch.Tensor | None
    w2_perm: torch.Tensor | None  # int32 [E, I_packed]
    w13_group_size: int
    w2_group_size: int
    hidden_size: int
    intermediate_size: int
    activation: str  # "int8" or "full"

    def traceable(self, dtype: torch.dtype) -> bool:
        return True

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    def gate_up(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        width = self.w13.shape[1] * 8  # I rounded up to whole tiles
        perm = None if self.w13_perm is None else self.w13_perm[expert]

        def linear(tiles: slice, columns: int, tile_perm: torch.Tensor | None) -> torch.Tensor:
            return ferrum_ops.int4_linear(
                x,
                self.w13[expert, tiles].contiguous(),
                self.w13_scales[expert, tiles].contiguous(),
                None if self.w13_zeros is None else self.w13_zeros[expert, tiles].contiguous(),
                tile_perm,
                None,
                columns,
                self.w13_group_size,
                self.activation,
            )

        if perm is not None and perm.shape[0] == 2:  # gate and up were quantised in different orders
            gate, up = (linear(slice(p, None, 2), self.intermediate_size, perm[p]) for p in (0, 1))
            return torch.cat([gate, up], dim=-1)
        tiles = linear(slice(None), 2 * width, None if perm is None else perm[0])
        gate_up = tiles.view(-1, width // 16, 2, 16).transpose(1, 2).reshape(-1, 2, width)
        return gate_up[..., : self.intermediate_size].reshape(-1, 2 * self.intermediate_size)

    def down(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return ferrum_ops.int4_linear(
            x,
            self.w2[expert],
            self.w2_scales[expert],
            None if self.w2_zeros is None else self.w2_zeros[expert],
            None if self.w2_perm is None else self.w2_perm[expert],
            None,
            self.hidden_size,
            self.w2_group_size,
            self.activation,
        )

    def fused(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return ferrum_ops.moe_experts_int4(hidden, topk_ids, topk_weights, *self.op_arguments)

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """What the ops on these weights take, from `w13` on."""
        return (
            self.w13,
            self.w13_scales,
            self.w13_zeros,
            self.w13_perm,
            self.w13_group_size,
            self.w2,
            self.w2_scales,
            self.w2_zeros,
            self.w2_perm,
            self.w2_group_size,
            self.intermediate_size,
            self.activation,
        )


@register_layout
@dataclass(frozen=True)
class GgufExpertWeights(ExpertWeights):
    """GGUF blocks as they lie in the file, or in tiles (`ferrum_ops.gguf_pack`)."""

    layout = "gguf"
    gate_blocks: torch.Tensor  # uint8 [E, I, bytes of H weights] or, in tiles, [E, I/16, bytes]
    up_blocks: torch.Tensor  # like gate_blocks
    down_blocks: torch.Tensor  # uint8 [E, H, bytes of I weights]
    gate_type: int  # ggml's numbers, for tiles plus TILED
    up_type: int
    down_type: int
    activation: str  # "int8" or "full"

    def traceable(self, dtype: torch.dtype) -> bool:
        return True

    @property
    def num_experts(self) -> int:
        return self.gate_blocks.shape[0]

    def gate_up(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        blocks = [self.gate_blocks[expert], self.up_blocks[expert]]
        return ferrum_ops.gguf_linear(x, blocks, [self.gate_type, self.up_type], None, self.activation)

    def down(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return ferrum_ops.gguf_linear(x, [self.down_blocks[expert]], [self.down_type], None, self.activation)

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """What the ops on these weights take, from `gate` on."""
        types = [self.gate_type, self.up_type, self.down_type]
        return self.gate_blocks, self.up_blocks, self.down_blocks, types, self.activation

    def fused(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return ferrum_ops.moe_experts_gguf(hidden, topk_ids, topk_weights, *self.op_arguments)

    def dense(self, dtype: torch.dtype) -> DenseExpertWeights:
        """The weights dequantised."""
        gate = ferrum_ops.gguf_dequantize(self.gate_blocks, self.gate_type, dtype)
        up = ferrum_ops.gguf_dequantize(self.up_blocks, self.up_type, dtype)
        down = ferrum_ops.gguf_dequantize(self.down_blocks, self.down_type, dtype)
        return DenseExpertWeights(torch.cat([gate, up], dim=1), down)
