"""Tiny Qwen3-MoE and Qwen3 GGUF files with random weights, and transformers' model holding what is in them."""

from dataclasses import dataclass, field

import gguf
import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats.gguf import FLOAT_TYPES, GGMLType

MLP = ("gate", "up", "down")


@dataclass
class Tiny:
    """Sizes, and the type of each kind of tensor by the stem of its name ("" for all others)."""

    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    layers: int = 2
    experts: int = 4  # 0: a dense Qwen3
    top_k: int = 2
    width: int = 256
    vocabulary: int = 100
    types: dict[str, int] = field(default_factory=lambda: {"": GGMLType.Q8_0})
    tied: bool = False

    def type_of(self, name):
        stem = name.removesuffix(".weight").rpartition(".")[2]
        if "norm" in stem or stem == "ffn_gate_inp":
            return self.types.get(stem, GGMLType.F32)
        return self.types.get(stem, self.types[""])

    def shapes(self):
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {"token_embd": (self.vocabulary, self.hidden), "output_norm": (self.hidden,)}
        if not self.tied:
            shapes["output"] = (self.vocabulary, self.hidden)
        for i in range(self.layers):
            stack = (self.experts, self.width, self.hidden)
            experts = {
                "ffn_gate_inp": (self.experts, self.hidden),
                "ffn_gate_exps": stack,
                "ffn_up_exps": stack,
                "ffn_down_exps": (self.experts, self.hidden, self.width),
            }
            wide = (2 * self.width, self.hidden)
            shapes |= {
                f"blk.{i}.{name}": shape
                for name, shape in {
                    "attn_norm": (self.hidden,),
                    "attn_q": (q, self.hidden),
                    "attn_k": (kv, self.hidden),
                    "attn_v": (kv, self.hidden),
                    "attn_output": (self.hidden, q),
                    "attn_q_norm": (self.head_dim,),
                    "attn_k_norm": (self.head_dim,),
                    "ffn_norm": (self.hidden,),
                    **(experts if self.experts else {"ffn_gate": wide, "ffn_up": wide, "ffn_down": wide[::-1]}),
                }.items()
            }
        return {f"{name}.weight": shape for name, shape in shapes.items()}

    @property
    def architecture(self):
        return "qwen3moe" if self.experts else "qwen3"

    def keys(self):
        experts = {
            "expert_count": self.experts,
            "expert_used_count": self.top_k,
            "expert_feed_forward_length": self.width,
        }
        return {
            "block_count": self.layers,
            "context_length": 512,
            "embedding_length": self.hidden,
            "feed_forward_length": 2 * self.width,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.freq_base": 10000.0,
            **(experts if self.experts else {}),
        }


def blocks_of(name, shape, type, seed):
    """Packed rows of random weights; norms are around 1."""
    scale = 0.5 if name.startswith("token_embd") else 0.05
    if "norm" in name:
        return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).view(torch.uint8).numpy()
    rows = int(np.prod(shape[:-1]))
    return formats.random_blocks(type, rows, shape[-1], seed=seed, scale=scale).view(*shape[:-1], -1).numpy()


def write(path, tiny, *, keys=(), drop=(), architecture=None, tensors=(), split=None):
    """Writes the file. `keys` replaces or adds metadata (without the architecture's prefix; None drops one), `drop`
    names tensors to leave out, `tensors` replaces or adds some as (name, array, type), `split` (number, count) writes
    that part of a split."""
    architecture = architecture or tiny.architecture
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (tiny.keys() | dict(keys)).items():
        if value is not None:
            name = key if key.startswith(("tokenizer.", "general.", "split.")) else f"{architecture}.{key}"
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(name, value)
    found = {}
    for seed, (name, shape) in enumerate(tiny.shapes().items()):
        found[name] = (blocks_of(name, shape, tiny.type_of(name), seed), tiny.type_of(name))
    found |= {name: (array, kind) for name, array, kind in tensors}
    names = [name for name in found if name not in drop]
    if split is not None:
        number, count = split
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(names))
        names = names[number::count]
    for name in names:
        array, kind = found[name]
        if kind in FLOAT_TYPES and kind != GGMLType.BF16:
            array = np.ascontiguousarray(array).view({GGMLType.F32: np.float32, GGMLType.F16: np.float16}[kind])
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType(int(kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path):
    """Every tensor dequantised by the package gguf, float32, by its name in the file."""
    return {
        t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32))
        for t in gguf.GGUFReader(path).tensors
    }


def transformers_model(tiny, weights, **config):
    """transformers' own class with these weights (by their names in the file), in float32."""
    settings = {
        "vocab_size": tiny.vocabulary,
        "hidden_size": tiny.hidden,
        "intermediate_size": 2 * tiny.width,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "head_dim": tiny.head_dim,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    experts = {
        "num_experts": tiny.experts,
        "num_experts_per_tok": tiny.top_k,
        "moe_intermediate_size": tiny.width,
        "norm_topk_prob": True,
    }
    if tiny.experts:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | experts | config)))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**(settings | config)))
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(tiny.layers):
        parts = {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            **({"mlp.gate": "ffn_gate_inp"} if tiny.experts else {f"mlp.{n}_proj": f"ffn_{n}" for n in MLP}),
            **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
            "self_attn.o_proj": "attn_output",
            **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
        }
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in parts.items()}
    weights = {"output.weight": weights["token_embd.weight"], **weights}
    state = {f"{ours}.weight": weights[f"{theirs}.weight"] for ours, theirs in names.items()}
    for i in range(tiny.layers if tiny.experts else 0):
        gate, up, down = (weights[f"blk.{i}.ffn_{n}_exps.weight"] for n in MLP)
        state[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"model.layers.{i}.mlp.experts.down_proj"] = down
    model.load_state_dict(state, strict=True)
    return model.eval().float()
