"""What a Qwen3-MoE checkpoint becomes: every tensor of the finished model and the modules that hold the packed ones.

The checkpoint is described as a state dict of the finished model whose tensors are read, fused and packed when they are
asked for (LazyTensor), so that loading holds the packed model and one layer's worth of work, never a second copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeConfig

from ferrum_models import huge_pages
from ferrum_models.checkpoint import Checkpoint, CheckpointError, LazyGroup, LazyTensor, ReadAhead
from ferrum_models.quantization.layout import LayoutChoice, WeightFormat, pick_layout
from ferrum_models.quantization.marlin_modules import PackedModule, marlin_linear
from ferrum_models.quantization.modules import (
    ConcatLinear,
    DenseLinear,
    GptqLinear,
    Int4Linear,
    RoundedLinear,
    meta,
)
from ferrum_models.quantization.quantizer import ModulePlans
from ferrum_models.quantization.settings import GptqSettings
from ferrum_models.quantization.sources import (
    FLOATS,
    DenseSource,
    GptqSource,
    LinearSource,
    QuantizedSource,
    Shapes,
    bias_of,
    common_group_size,
    find_source,
    int4_shapes,
    same_order,
)
from ferrum_models.qwen3_moe.expert_planner import ExpertPlanner
from ferrum_models.qwen3_moe.modeling import is_sparse_layer
from ferrum_models.report import LoadReport, ModuleReport, traced
from ferrum_ops.config import RuntimeConfig
from ferrum_ops.formats import int8

#: Tensors older writers store and no model needs.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias")

#: Tensors whose values decide what is built.
CHECKED_SUFFIXES = (".g_idx", ".qzeros", ".bias")


@dataclass
class Plan:
    """Everything decided about a checkpoint before any weight is read."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)  # the finished model's state dict
    modules: ModulePlans = field(default_factory=ModulePlans)  # what to build in place of the model's own modules
    report: LoadReport = field(default_factory=LoadReport)
    dequantized: list[LinearSource] = field(default_factory=list)  # quantised on disk, dense in memory
    packed: int = 0  # number of modules that stay quantised


class Planner:
    """Walks the model that a configuration describes and finds every tensor it needs in the checkpoint.

    Raises CheckpointError for the first tensor that is missing, unexpected or of the wrong shape or dtype.
    """

    def __init__(
        self,
        config: Qwen3MoeConfig,
        checkpoint: Checkpoint,
        settings: GptqSettings | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        activation: str,
        quantize: str | None,
        lm_head: str | None,
        layout: str | None,
        runtime: RuntimeConfig,
    ) -> None:
        self.config, self.checkpoint, self.settings = config, checkpoint, settings
        self.dtype, self.device, self.activation, self.quantize = dtype, device, activation, quantize
        self.lm_head_format = lm_head  # "int8" or "int4": rounded while loading
        self.runtime = runtime
        self.requested = "gptq" if layout is None and runtime.triton_int4 and device.type == "cuda" else layout
        self.reasons: dict[str, list[str]] = {}  # why modules did not get the layout they were meant to have
        self.used: set[str] = set()
        self.read_ahead = ReadAhead(checkpoint)
        self.result = Plan()
        self.experts = ExpertPlanner(self)

    def plan(self) -> Plan:
        config = self.config
        # Looked at below, tensor by tensor: tens of thousands of small reads, which a disk serves best at once.
        self.checkpoint.read_ahead(name for name in self.checkpoint.entries if name.endswith(CHECKED_SUFFIXES))
        hidden = config.hidden_size
        head_dim = config.head_dim or hidden // config.num_attention_heads
        q_width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.dense("model.embed_tokens.weight", (config.vocab_size, hidden))
        self.dense("model.norm.weight", (hidden,))
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}"
            attention = f"{layer}.self_attn"
            for norm, width in (
                (f"{layer}.input_layernorm", hidden),
                (f"{layer}.post_attention_layernorm", hidden),
                (f"{attention}.q_norm", head_dim),
                (f"{attention}.k_norm", head_dim),
            ):
                self.dense(f"{norm}.weight", (width,))
            widths = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
            self.linear(
                f"{attention}.qkv_proj",
                [self.source(f"{attention}.{name}", hidden, width) for name, width in widths.items()],
            )
            self.linear(f"{attention}.o_proj", [self.source(f"{attention}.o_proj", q_width, hidden)])
            if is_sparse_layer(config, i):
                self.experts.plan(f"{layer}.mlp.experts")
                self.router(f"{layer}.mlp.gate")
            else:
                width = config.intermediate_size
                gate_up = [self.source(f"{layer}.mlp.{name}", hidden, width) for name in ("gate_proj", "up_proj")]
                self.linear(f"{layer}.mlp.gate_up_proj", gate_up)
                self.linear(f"{layer}.mlp.down_proj", [self.source(f"{layer}.mlp.down_proj", width, hidden)])
        self.lm_head()
        self.check_unexpected()
        self.summarize()
        return self.result

    def source(self, name: str, in_features: int, out_features: int, round_allowed: bool = True) -> LinearSource:
        round_to_int4 = self.quantize == "int4" and round_allowed
        found = find_source(self.checkpoint, name, in_features, out_features, self.settings, round_to_int4)
        self.used.update(found.tensor_names)
        return found

    def dense(self, name: str, shape: tuple[int, ...]) -> None:
        """A tensor that the model holds as the checkpoint does, in the activation dtype."""
        self.checkpoint.expect(name, shape, FLOATS)
        self.used.add(name)
        self.result.tensors[name] = LazyTensor(shape, self.dtype, lambda: self.checkpoint.read(name).to(self.dtype))

    def router(self, name: str) -> None:
        """The router stays dense; a writer that quantised it all the same is dequantised."""
        source = self.source(name, self.config.hidden_size, self.config.num_experts, round_allowed=False)
        shape = (self.config.num_experts, self.config.hidden_size)
        self.result.tensors[f"{name}.weight"] = LazyTensor(shape, self.dtype, lambda: source.weight(self.dtype))
        self.note_dequantized([source])

    def lm_head(self) -> None:
        name, shape = "lm_head", (self.config.vocab_size, self.config.hidden_size)
        if self.config.tie_word_embeddings:
            if f"{name}.qweight" in self.checkpoint:
                raise CheckpointError(
                    self.checkpoint.file_of(f"{name}.qweight"),
                    f"{name}.qweight",
                    "no quantised lm_head in a model with tie_word_embeddings",
                    "one",
                )
            self.used.add(f"{name}.weight")  # some writers store the tied copy
            if self.lm_head_format is not None:
                raise ValueError(
                    f"[lm_head] expected None for a model with tie_word_embeddings, got {self.lm_head_format!r}"
                )
            return
        source = self.source(name, shape[1], shape[0], round_allowed=False)
        if self.lm_head_format is None:
            self.linear(name, [source])
        else:
            self.rounded_linear(name, source, self.lm_head_format)

    # Linears.

    def linear(self, path: str, sources: list[LinearSource]) -> None:
        """One module for one or more linears of the same input, fused where their formats allow it."""
        if all(isinstance(s, DenseSource) or self.layout([s]).layout == "dense" for s in sources):
            self.note(path, self.layout(sources))
            self.dense_linear(path, sources)
            return
        quantized = [s for s in sources if isinstance(s, QuantizedSource)]
        choice = self.layout(sources)
        if choice.layout == "int4_cpu" and same_order(quantized) and _whole_tiles(quantized):
            self.int4_linear(path, quantized)
            return
        if choice.layout == "marlin" and same_order(quantized):
            self.add_packed(path, "marlin", quantized, marlin_linear(quantized, self.device, self.dtype, self.runtime))
            return
        if len(sources) > 1:
            self.result.modules[path] = lambda: ConcatLinear([nn.Identity() for _ in sources])
            for i, source in enumerate(sources):
                self.linear(f"{path}.parts.{i}", [source])
            return
        (source,) = sources
        assert isinstance(source, QuantizedSource)
        self.note(path, choice)
        self.gptq_linear(path, source)

    def layout(self, sources: Sequence[LinearSource]) -> LayoutChoice:
        """The one layout of sources that are packed together."""
        quantized = [s for s in sources if isinstance(s, QuantizedSource)]
        if len(quantized) < len(sources):
            return LayoutChoice("dense")
        weight = WeightFormat(
            tuple(sorted({s.bits for s in quantized})), tuple(sorted({s.grouping for s in quantized})), self.dtype
        )
        shape = (sources[0].in_features, sum(s.out_features for s in sources))
        return pick_layout(weight, self.device, shape, self.requested)

    def note(self, path: str, choice: LayoutChoice) -> None:
        """Remember why a module has the layout it has, for `summarize`."""
        if choice.reason and choice.layout != "dense":  # dense ones have a warning of their own
            self.reasons.setdefault(f"{choice.layout} layout: {choice.reason}", []).append(path)

    def add_group(
        self, path: str, shapes: Shapes, sources: Sequence[LinearSource], build: Callable[[], dict[str, torch.Tensor]]
    ) -> None:
        build = traced(path, build) if self.runtime.moe_load_trace else build
        build = self.read_ahead.before([name for source in sources for name in source.tensor_names], build)
        group = LazyGroup(shapes, build)
        self.result.tensors.update({f"{path}.{name}": t for name, t in group.tensors().items()})

    def add_packed(self, path: str, layout: str, sources: Sequence[LinearSource], packed: PackedModule) -> None:
        self.result.modules[path] = packed.module
        self.add_group(path, packed.shapes, sources, packed.build)
        self.add_report(path, layout, list(sources), _nbytes(packed.shapes))

    def add_report(self, path: str, layout: str, sources: list[LinearSource], nbytes: int) -> None:
        dense = sum(s.in_features * s.out_features for s in sources) * self.dtype.itemsize
        self.result.report.modules.append(ModuleReport(path, layout, nbytes, dense))
        self.result.packed += layout != "dense"

    def dense_linear(self, path: str, sources: list[LinearSource]) -> None:
        in_features, out_features = sources[0].in_features, sum(s.out_features for s in sources)
        has_bias = any(s.bias_name for s in sources) or (self.config.attention_bias and ".self_attn." in path)
        self.result.modules[path] = lambda: DenseLinear(
            in_features, out_features, bias=has_bias, device="meta", dtype=self.dtype
        )
        self.result.tensors[f"{path}.weight"] = LazyTensor(
            (out_features, in_features),
            self.dtype,
            lambda: torch.cat([s.weight(self.dtype) for s in sources]),
        )
        if has_bias:
            self.result.tensors[f"{path}.bias"] = LazyTensor(
                (out_features,), self.dtype, lambda: bias_of(sources, self.dtype)
            )
        self.note_dequantized(sources)

    def int4_linear(self, path: str, sources: list[QuantizedSource]) -> None:
        in_features, out_features = sources[0].in_features, sum(s.out_features for s in sources)
        group_size = common_group_size(sources)
        assert group_size is not None
        perm, with_zeros = sources[0].perm, any(s.asymmetric for s in sources)
        has_bias = any(s.bias_name for s in sources)
        rows = in_features if perm is None else perm.shape[0]
        tiles = -(-out_features // 16)
        shapes = int4_shapes("", (), tiles, rows, group_size, with_zeros)
        if perm is not None:
            shapes["perm"] = ((rows,), torch.int32)
        if has_bias:
            shapes["bias"] = ((out_features,), self.dtype)

        def build() -> dict[str, torch.Tensor]:
            parts = [s.int4(perm, group_size, with_zeros) for s in sources]
            tensors = {
                "packed": huge_pages.cat([p.packed for p in parts]),
                "scales": torch.cat([p.scales for p in parts]),
            }
            if with_zeros:
                tensors["zeros"] = torch.cat([p.zeros for p in parts if p.zeros is not None])
            if perm is not None:
                tensors["perm"] = perm
            if has_bias:
                tensors["bias"] = bias_of(list(sources), self.dtype)
            return tensors

        def module() -> nn.Module:
            made = {name: meta(*shape) for name, shape in shapes.items()}
            linear = Int4Linear(
                made["packed"],
                made["scales"],
                made.get("zeros"),
                made.get("perm"),
                made.get("bias"),
                in_features=in_features,
                out_features=out_features,
                group_size=group_size,
                activation=self.activation,
            )
            linear.saved = tuple(s.saved for s in sources)
            return linear

        self.add_packed(path, "int4_cpu", sources, PackedModule(shapes, build, module))

    def rounded_linear(self, path: str, source: LinearSource, weight_format: str) -> None:
        """A dense linear rounded to "int8" or "int4" while loading."""
        if not isinstance(source, DenseSource):
            raise ValueError(
                f"[{path}] expected None for a checkpoint whose {path} is quantised already, got {weight_format!r}"
            )
        if self.device.type != "cpu":
            raise ValueError(f"[{path}] expected None on {self.device.type}, got {weight_format!r}, a layout for CPUs")
        bits = int(weight_format.removeprefix("int"))
        in_features, out_features, size = source.in_features, source.out_features, RoundedLinear.group_size
        shapes = int4_shapes("", (), -(-out_features // 16), in_features, size, with_zeros=False)
        if bits == 8:
            shapes["packed"] = ((*shapes["packed"][0][:2], int8.LINE_BYTES), torch.uint8)
        if source.bias_name is not None:
            shapes["bias"] = ((out_features,), self.dtype)

        def build() -> dict[str, torch.Tensor]:
            bias = source.bias(self.dtype)
            return source.rounded(bits, size) | ({} if bias is None else {"bias": bias})

        def module() -> nn.Module:
            made = {name: meta(*shape) for name, shape in shapes.items()}
            return RoundedLinear(
                made["packed"],
                made["scales"],
                made.get("bias"),
                bits=bits,
                in_features=in_features,
                out_features=out_features,
                activation=self.activation,
                dtype=self.dtype,
            )

        self.result.modules[path] = module
        self.add_group(path, shapes, [source], build)
        # Saved dense, so it is no reason for a quantization_config: not among `packed`.
        dense = in_features * out_features * self.dtype.itemsize
        self.result.report.modules.append(ModuleReport(path, f"{weight_format}_cpu", _nbytes(shapes), dense))

    def gptq_linear(self, path: str, source: QuantizedSource) -> None:
        shapes = source.shapes()
        if source.bias_name is not None:
            shapes["bias"] = ((source.out_features,), self.dtype)

        def build() -> dict[str, torch.Tensor]:
            bias = source.bias(self.dtype)
            return source.tensors() | ({} if bias is None else {"bias": bias})

        def module() -> nn.Module:
            made = {name: meta(*shape) for name, shape in shapes.items()}
            linear = GptqLinear(
                made["qweight"],
                made["qzeros"],
                made["scales"],
                made["g_idx"],
                made.get("bias"),
                bits=source.bits,
                zero_offset=source.zero_offset,
            )
            linear.saved = (source.saved,)
            return linear

        self.add_packed(path, "gptq", [source], PackedModule(shapes, build, module))

    # What is left.

    def note_dequantized(self, sources: list[Any]) -> None:
        quantized = [s for s in sources if isinstance(s, GptqSource)]
        self.result.dequantized += quantized

    def check_unexpected(self) -> None:
        for name in sorted(self.checkpoint.entries.keys() - self.used):
            if not name.endswith(IGNORED_SUFFIXES):
                entry = self.checkpoint.entries[name]
                raise CheckpointError(
                    entry.file, name, "only tensors that the configuration has a place for", "this one too"
                )

    def summarize(self) -> None:
        """A warning for layouts that were not meant, and one for weights that are quantised on disk only."""
        for reason, paths in self.reasons.items():
            self.result.report.warnings.append(f"[load] {len(paths)} modules ({paths[0]}, ...) have the {reason}")
        by_bits: dict[int, list[GptqSource]] = {}
        for source in self.result.dequantized:
            assert isinstance(source, GptqSource)
            by_bits.setdefault(source.bits, []).append(source)
        for bits, sources in sorted(by_bits.items()):
            packed = sum(s.nbytes for s in sources)
            dense = sum(s.in_features * s.out_features for s in sources) * self.dtype.itemsize
            self.add_report(f"{len(sources)} linears of {bits} bits", "dense", list(sources), dense)
            self.result.report.warnings.append(
                f"[load] {len(sources)} {bits}-bit linears ({sources[0].name}, ...) have no packed kernel for their "
                f"bits or groups: dequantised to {str(self.dtype).removeprefix('torch.')}, "
                f"{dense / 1e6:.1f} MB instead of {packed / 1e6:.1f} MB"
            )


def _whole_tiles(sources: Sequence[QuantizedSource]) -> bool:
    """Whether every linear but the last fills whole tiles of the CPU layout."""
    return all(source.out_features % 16 == 0 for source in sources[:-1])


def _nbytes(shapes: Shapes) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
