"""What a GGUF file becomes: every tensor of the finished model and the modules that hold blocks.

Packed tensors are views of the mapped file: loading reads none of them, and the steady state is the file's pages. With
`repack` the matrices are copied into tiles (`ferrum_ops.gguf_pack`) in memory of their own; the embedding, of which a
token reads one row, stays in the file.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeConfig

from ferrum_models.checkpoint import CheckpointError, LazyTensor
from ferrum_models.moe.weights import GgufExpertWeights
from ferrum_models.quantization.modules import ConcatLinear, DenseLinear, PackedExperts, meta
from ferrum_models.qwen3_moe.gguf_config import EMBEDDING, OUTPUT
from ferrum_models.qwen3_moe.gguf_file import GgufCheckpoint, GgufTensor
from ferrum_models.qwen3_moe.gguf_modules import GgufEmbedding, GgufLinear
from ferrum_models.qwen3_moe.modeling import is_sparse_layer
from ferrum_models.qwen3_moe.planner import Plan
from ferrum_models.report import ModuleReport
from ferrum_ops.formats import gguf_tiles
from ferrum_ops.formats.gguf import FLOAT_TYPES, QUANTIZED_TYPES


def has_packed_kernel(type: int, device: torch.device) -> bool:
    """Whether products on `device` take blocks of this type as they are."""
    return device.type == "cpu" and type in QUANTIZED_TYPES


class GgufPlanner:
    """Walks the model that the metadata describes and finds every tensor it needs.

    Raises CheckpointError for the first tensor that is missing, unexpected or of the wrong shape.
    """

    def __init__(
        self,
        config: Qwen3MoeConfig,
        checkpoint: GgufCheckpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        activation: str,
        repack: bool = False,
    ) -> None:
        self.config, self.checkpoint = config, checkpoint
        self.dtype, self.device, self.activation, self.repack = dtype, device, activation, repack
        self.used: set[str] = set()
        self.dequantized: list[GgufTensor] = []
        self.result = Plan()

    def plan(self) -> Plan:
        config = self.config
        hidden, head_dim = config.hidden_size, config.head_dim
        q_width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.embedding()
        self.dense("model.norm.weight", "output_norm", (hidden,))
        for i in range(config.num_hidden_layers):
            layer, block = f"model.layers.{i}", f"blk.{i}"
            for name, source, width in (
                ("input_layernorm", "attn_norm", hidden),
                ("post_attention_layernorm", "ffn_norm", hidden),
                ("self_attn.q_norm", "attn_q_norm", head_dim),
                ("self_attn.k_norm", "attn_k_norm", head_dim),
            ):
                self.dense(f"{layer}.{name}.weight", f"{block}.{source}", (width,))
            widths = {"attn_q": q_width, "attn_k": kv_width, "attn_v": kv_width}
            qkv = [self.tensor(f"{block}.{name}", (width, hidden)) for name, width in widths.items()]
            self.linear(f"{layer}.self_attn.qkv_proj", qkv)
            self.linear(f"{layer}.self_attn.o_proj", [self.tensor(f"{block}.attn_output", (hidden, q_width))])
            if is_sparse_layer(config, i):
                self.experts(f"{layer}.mlp.experts", block)
                self.dense(f"{layer}.mlp.gate.weight", f"{block}.ffn_gate_inp", (config.num_experts, hidden))
            else:
                width = config.intermediate_size
                gate_up = [self.tensor(f"{block}.{name}", (width, hidden)) for name in ("ffn_gate", "ffn_up")]
                self.linear(f"{layer}.mlp.gate_up_proj", gate_up)
                self.linear(f"{layer}.mlp.down_proj", [self.tensor(f"{block}.ffn_down", (hidden, width))])
        self.output()
        for name in sorted(self.checkpoint.tensors.keys() - self.used):
            tensor = self.checkpoint.tensors[name]
            raise CheckpointError(
                tensor.file.path, name, "only tensors that the configuration has a place for", "this one too"
            )
        self.warn_of_dequantized()
        return self.result

    def tensor(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        name = f"{name}.weight"
        self.used.add(name)
        return self.checkpoint.expect(name, shape)

    def packed(self, tensor: GgufTensor) -> bool:
        return has_packed_kernel(tensor.type, self.device)

    def dense(self, path: str, name: str, shape: tuple[int, ...]) -> None:
        """A tensor that the model holds dense in the activation dtype."""
        tensor = self.tensor(name, shape)
        self.result.tensors[path] = LazyTensor(shape, self.dtype, lambda: tensor.dequantize(self.dtype))

    def tiled(self, tensor: GgufTensor) -> bool:
        """Whether a matrix is repacked. One that does not divide into tiles stays in the file."""
        return self.repack and gguf_tiles.fits(tensor.shape[-2], tensor.shape[-1], tensor.type)

    def matrix(self, tensor: GgufTensor) -> tuple[tuple[int, ...], int]:
        """The shape and the type that the ops get."""
        if self.tiled(tensor):
            *outer, rows, in_features = tensor.shape
            shape = (*outer, rows // gguf_tiles.ROWS, gguf_tiles.tile_bytes(tensor.type, in_features))
            return shape, tensor.type + gguf_tiles.TILED
        return block_shape(tensor), tensor.type

    def add_matrix(self, path: str, tensor: GgufTensor) -> None:
        build = tensor.tiles if self.tiled(tensor) else tensor.blocks
        self.result.tensors[path] = LazyTensor(self.matrix(tensor)[0], torch.uint8, build)

    def add_matrix_report(self, path: str, tensors: list[GgufTensor]) -> None:
        """Bytes as they will lie in memory or in the file."""
        self.add_report(path, "gguf", tensors, sum(prod(self.matrix(t)[0]) for t in tensors))

    def add_report(self, path: str, layout: str, tensors: list[GgufTensor], nbytes: int) -> None:
        dense = sum(prod(t.shape) for t in tensors) * self.dtype.itemsize
        self.result.report.modules.append(ModuleReport(path, layout, nbytes, dense))
        self.result.packed += layout != "dense"

    def embedding(self) -> None:
        config, path = self.config, "model.embed_tokens"
        tensor = self.tensor(EMBEDDING.removesuffix(".weight"), (config.vocab_size, config.hidden_size))
        if not self.packed(tensor):
            self.note_dequantized(path, [tensor])
            self.result.tensors[f"{path}.weight"] = LazyTensor(
                tensor.shape, self.dtype, lambda: tensor.dequantize(self.dtype)
            )
            return
        shape = block_shape(tensor)
        self.result.modules[path] = lambda: GgufEmbedding(meta(shape, torch.uint8), tensor.type, self.dtype)
        self.result.tensors[f"{path}.blocks"] = LazyTensor(shape, torch.uint8, tensor.blocks)
        self.add_report(path, "gguf", [tensor], tensor.nbytes)

    def output(self) -> None:
        """The head; a file without one uses the embedding's blocks a second time."""
        if OUTPUT not in self.checkpoint.tensors and self.config.tie_word_embeddings:
            return
        name = OUTPUT if OUTPUT in self.checkpoint.tensors else EMBEDDING
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.linear("lm_head", [self.tensor(name.removesuffix(".weight"), shape)])

    def linear(self, path: str, tensors: list[GgufTensor]) -> None:
        """One module for one or more matrices of the same input."""
        if all(self.packed(t) for t in tensors):
            self.packed_linear(path, tensors)
        elif any(self.packed(t) for t in tensors):
            self.result.modules[path] = lambda: ConcatLinear([nn.Identity() for _ in tensors])
            for i, tensor in enumerate(tensors):
                self.linear(f"{path}.parts.{i}", [tensor])
        else:
            self.dense_linear(path, tensors)

    def packed_linear(self, path: str, tensors: list[GgufTensor]) -> None:
        shapes, types = zip(*(self.matrix(t) for t in tensors))
        self.result.modules[path] = lambda: GgufLinear(
            [meta(shape, torch.uint8) for shape in shapes], types, self.activation, self.dtype
        )
        for i, tensor in enumerate(tensors):
            self.add_matrix(f"{path}.blocks_{i}", tensor)
        self.add_matrix_report(path, tensors)

    def dense_linear(self, path: str, tensors: list[GgufTensor]) -> None:
        out_features, in_features = sum(t.shape[0] for t in tensors), tensors[0].shape[1]
        self.result.modules[path] = lambda: DenseLinear(
            in_features, out_features, bias=False, device="meta", dtype=self.dtype
        )
        self.result.tensors[f"{path}.weight"] = LazyTensor(
            (out_features, in_features), self.dtype, lambda: torch.cat([t.dequantize(self.dtype) for t in tensors])
        )
        self.note_dequantized(path, tensors)

    def experts(self, path: str, block: str) -> None:
        count, hidden, width = self.config.num_experts, self.config.hidden_size, self.config.moe_intermediate_size
        gate = self.tensor(f"{block}.ffn_gate_exps", (count, width, hidden))
        up = self.tensor(f"{block}.ffn_up_exps", (count, width, hidden))
        down = self.tensor(f"{block}.ffn_down_exps", (count, hidden, width))
        tensors = {"gate": gate, "up": up, "down": down}
        if not all(self.packed(t) for t in tensors.values()):
            self.dense_experts(path, gate, up, down)
            return

        def module() -> nn.Module:
            matrices = {name: self.matrix(t) for name, t in tensors.items()}
            made: dict[str, Any] = {f"{name}_blocks": meta(shape, torch.uint8) for name, (shape, _) in matrices.items()}
            made |= {f"{name}_type": type for name, (_, type) in matrices.items()}
            return PackedExperts(GgufExpertWeights(**made, activation=self.activation))

        self.result.modules[path] = module
        for name, tensor in tensors.items():
            self.add_matrix(f"{path}.{name}_blocks", tensor)
        self.add_matrix_report(path, list(tensors.values()))

    def dense_experts(self, path: str, gate: GgufTensor, up: GgufTensor, down: GgufTensor) -> None:
        count, width, hidden = gate.shape

        def gate_up_proj() -> torch.Tensor:
            stacked = torch.empty(count, 2 * width, hidden, dtype=self.dtype)
            stacked[:, :width] = gate.dequantize(self.dtype)
            stacked[:, width:] = up.dequantize(self.dtype)
            return stacked

        shape = (count, 2 * width, hidden)
        self.result.tensors[f"{path}.gate_up_proj"] = LazyTensor(shape, self.dtype, gate_up_proj)
        self.result.tensors[f"{path}.down_proj"] = LazyTensor(
            down.shape, self.dtype, lambda: down.dequantize(self.dtype)
        )
        self.note_dequantized(path, [gate, up, down])

    def note_dequantized(self, path: str, tensors: list[GgufTensor]) -> None:
        quantized = [t for t in tensors if t.type not in FLOAT_TYPES]
        self.dequantized += quantized
        if quantized:
            self.add_report(path, "dense", tensors, sum(prod(t.shape) for t in tensors) * self.dtype.itemsize)

    def warn_of_dequantized(self) -> None:
        """One warning for each type that is packed on disk and dense in memory, with what that costs."""
        for type_name in sorted({t.type_name for t in self.dequantized}):
            mine = [t for t in self.dequantized if t.type_name == type_name]
            packed = sum(t.nbytes for t in mine)
            dense = sum(prod(t.shape) for t in mine) * self.dtype.itemsize
            self.result.report.warnings.append(
                f"[load] {len(mine)} tensors of type {type_name} ({mine[0].name}, ...) have no packed kernel on "
                f"{self.device.type} (or stand beside one that has none): dequantised to "
                f"{str(self.dtype).removeprefix('torch.')}, {dense / 1e6:.1f} MB instead of {packed / 1e6:.1f} MB"
            )


def block_shape(tensor: GgufTensor) -> tuple[int, ...]:
    """The shape of `tensor.blocks()`."""
    return (*tensor.shape[:-1], tensor.nbytes // prod(tensor.shape[:-1]))
