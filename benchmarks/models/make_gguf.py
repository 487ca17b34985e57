"""A GPTQ int4 Qwen3-MoE checkpoint as a .gguf file, so that llama.cpp runs the same model.

The weights are dequantised and written as Q8_0, expert by expert; llama.cpp's own quantiser makes the other types of
that, with its own choice of a type for each tensor. Without a tokenizer, as the checkpoint. Needs llama-cpp-python.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.peers import ggml
from ferrum_ops.formats import gptq

QUANTIZED = {"Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}


class Checkpoint:
    """Dense float32 weights of a checkpoint, read when asked for."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.files = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        self.open = {file: safe_open(directory / file, "pt") for file in set(self.files.values())}

    def tensor(self, name: str) -> torch.Tensor:
        return self.open[self.files[name]].get_tensor(name)

    def weight(self, module: str) -> torch.Tensor:
        """float32 `[N, K]`, or of whatever shape a dense tensor has."""
        if f"{module}.weight" in self.files:
            return self.tensor(f"{module}.weight").float()
        qweight, qzeros, scales = (self.tensor(f"{module}.{part}") for part in ("qweight", "qzeros", "scales"))
        offset = gptq.zero_offset_of(self.config["quantization_config"]["checkpoint_format"])
        return gptq.dequantize(qweight, qzeros, scales, self.tensor(f"{module}.g_idx"), 4, offset).T.contiguous()


@dataclass(frozen=True)
class Entry:
    name: str
    shape: tuple[int, ...]
    kind: int
    parts: Callable[[], Iterator[torch.Tensor]]  # one expert after the other, or the whole

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the bytes, or of the floats of a tensor that stays float32."""
        if self.kind == ggml.F32:
            return self.shape
        return (*self.shape[:-1], ggml.library().ggml_row_size(self.kind, self.shape[-1]))


def entries(checkpoint: Checkpoint) -> Iterator[Entry]:
    config = checkpoint.config
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]

    def whole(name: str, module: str, kind: int = ggml.Q8_0) -> Entry:
        shape = tuple(checkpoint.weight(module).shape)
        return Entry(name, shape, kind, lambda: iter([checkpoint.weight(module)]))

    yield whole("token_embd.weight", "model.embed_tokens")
    for i in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{i}", f"blk.{i}"
        for gguf_name, module in (
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("attn_q_norm", "self_attn.q_norm"),
            ("attn_k_norm", "self_attn.k_norm"),
            ("ffn_gate_inp", "mlp.gate"),
        ):
            yield whole(f"{target}.{gguf_name}.weight", f"{source}.{module}", ggml.F32)
        for gguf_name, module in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
            yield whole(f"{target}.attn_{gguf_name}.weight", f"{source}.self_attn.{module}")
        for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            names = [f"{source}.mlp.experts.{e}.{part}_proj" for e in range(experts)]
            yield Entry(
                f"{target}.ffn_{part}_exps.weight",
                (experts, *shape),
                ggml.Q8_0,
                lambda names=names: (checkpoint.weight(name) for name in names),
            )
    yield whole("output_norm.weight", "model.norm", ggml.F32)
    yield whole("output.weight", "lm_head")


def write_q8_0(checkpoint: Checkpoint, path: Path) -> None:
    import gguf

    config = checkpoint.config
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    listed = list(entries(checkpoint))
    for entry in listed:
        stored = entry.stored_shape
        dtype = np.dtype(np.float32 if entry.kind == ggml.F32 else np.uint8)
        kind = gguf.GGMLQuantizationType(entry.kind)
        writer.add_tensor_info(entry.name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in listed:
        parts = entry.parts()
        if entry.kind == ggml.F32:
            values = np.concatenate([part.numpy() for part in parts])
        else:
            values = np.concatenate([ggml.quantize(part, entry.kind) for part in parts])
        writer.write_tensor_data(values)
    writer.close()


def make_gguf(directory: Path, types: Sequence[str]) -> list[Path]:
    """Write `directory/<type>.gguf` for every type. Raises ValueError for one that is not known."""
    for kind in types:
        if kind != "Q8_0" and kind not in QUANTIZED:
            raise ValueError(f"type: expected Q8_0 or one of {list(QUANTIZED)}, got {kind!r}")
    source = directory / "Q8_0.gguf"
    write_q8_0(Checkpoint(directory), source)
    for kind in types:
        if kind != "Q8_0":
            _quantize(source, directory / f"{kind}.gguf", QUANTIZED[kind])
    if "Q8_0" not in types:
        source.unlink()
    return [directory / f"{kind}.gguf" for kind in types]


def _quantize(source: Path, target: Path, file_type: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = torch.get_num_threads()
    params.ftype = getattr(llama_cpp, file_type)
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(bytes(source), bytes(target), params)
    if status:
        raise RuntimeError(f"llama.cpp: quantising {source} to {target} failed with status {status}")
