"""A model's tensors under the names and in the format of a checkpoint: the inverse of `planner`."""

from __future__ import annotations

import torch
from torch import nn

import ferrum_ops
from ferrum_models.moe.marlin import MarlinExpertWeights
from ferrum_models.moe.weights import DenseExpertWeights, GgufExpertWeights, GptqExpertWeights, Int4ExpertWeights
from ferrum_models.quantization.marlin import Codes, MarlinShape, split
from ferrum_models.quantization.modules import ConcatLinear, GptqLinear, Int4Linear, MarlinLinear, PackedExperts
from ferrum_models.quantization.sources import Int4Tensors, SavedLinear, unpack_int4
from ferrum_models.qwen3_moe.gguf_modules import GgufEmbedding
from ferrum_models.qwen3_moe.modeling import MLP, DecoderLayer, Qwen3MoeForCausalLM, SparseMoeBlock
from ferrum_ops.formats.gptq import SUPPORTED_BITS, packed_columns, zero_offset_of

Tensors = dict[str, torch.Tensor]


def checkpoint_state_dict(model: Qwen3MoeForCausalLM) -> Tensors:
    """Every tensor of the checkpoint this model would be loaded from. Unpacks a copy of the weights."""
    config = model.config
    attention_widths = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
        "v_proj": config.num_key_value_heads,
    }
    replaced: dict[str, Tensors] = {}
    for i, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        path = f"model.layers.{i}"
        head_dim = layer.self_attn.head_dim
        parts = {f"{path}.self_attn.{name}": heads * head_dim for name, heads in attention_widths.items()}
        replaced[f"{path}.self_attn.qkv_proj"] = linear_tensors(layer.self_attn.qkv_proj, parts)
        replaced[f"{path}.self_attn.o_proj"] = linear_tensors(
            layer.self_attn.o_proj, {f"{path}.self_attn.o_proj": config.hidden_size}
        )
        if isinstance(layer.mlp, SparseMoeBlock):
            replaced[f"{path}.mlp.experts"] = expert_tensors(layer.mlp.experts, f"{path}.mlp.experts", model.dtype)
        elif isinstance(layer.mlp, MLP):
            width = config.intermediate_size
            parts = {f"{path}.mlp.{name}": width for name in ("gate_proj", "up_proj")}
            replaced[f"{path}.mlp.gate_up_proj"] = linear_tensors(layer.mlp.gate_up_proj, parts)
            replaced[f"{path}.mlp.down_proj"] = linear_tensors(
                layer.mlp.down_proj, {f"{path}.mlp.down_proj": config.hidden_size}
            )
    if isinstance(model.model.embed_tokens, GgufEmbedding):
        replaced["model.embed_tokens"] = {"model.embed_tokens.weight": model.model.embed_tokens.weight}
    if not config.tie_word_embeddings:
        replaced["lm_head"] = linear_tensors(model.lm_head, {"lm_head": config.vocab_size})
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(path + ".") for path in replaced) and not name.startswith("lm_head.")
    }
    for part in replaced.values():
        tensors |= part
    return tensors


def linear_tensors(module: nn.Module, parts: dict[str, int]) -> Tensors:
    """Tensors of a module that holds linears side by side; `parts` names them with their out-features."""
    names = list(parts)
    if isinstance(module, ConcatLinear):
        tensors: Tensors = {}
        for name, part in zip(names, module.parts):
            tensors |= linear_tensors(part, {name: parts[name]})
        return tensors
    if isinstance(module, Int4Linear):
        return _int4_linear_tensors(module)
    if isinstance(module, MarlinLinear):
        return _marlin_linear_tensors(module)
    if isinstance(module, GptqLinear):
        return _gptq_tensors(module.saved[0], {part: getattr(module, part) for part in _GPTQ_PARTS}, module.bias)
    tensors = {}
    widths = list(parts.values())
    for name, weight in zip(names, module.weight.split(widths)):
        tensors[f"{name}.weight"] = weight.detach().clone()
    if module.bias is not None:
        for name, bias in zip(names, module.bias.split(widths)):
            tensors[f"{name}.bias"] = bias.detach().clone()
    return tensors


_GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def _gptq_tensors(saved: SavedLinear, parts: Tensors, bias: torch.Tensor | None) -> Tensors:
    tensors = {f"{saved.name}.{part}": tensor.clone() for part, tensor in parts.items()}
    if not saved.has_g_idx:
        del tensors[f"{saved.name}.g_idx"]
    if saved.zero_bias is not None:
        tensors[f"{saved.name}.bias"] = torch.zeros(saved.out_features, dtype=saved.zero_bias)
    elif bias is not None:
        tensors[f"{saved.name}.bias"] = bias.clone()
    return tensors


def _int4_linear_tensors(module: Int4Linear) -> Tensors:
    tensors: Tensors = {}
    start = 0
    for saved in module.saved:
        tiles = slice(start // 16, -(-(start + saved.out_features) // 16))
        part = Int4Tensors(
            module.packed[tiles].contiguous(),
            module.scales[tiles],
            None if module.zeros is None else module.zeros[tiles],
        )
        bias = None if module.bias is None else module.bias[start : start + saved.out_features]
        tensors |= _gptq_tensors(saved, unpack_int4(part, module.perm, saved, module.group_size), bias)
        start += saved.out_features
    return tensors


def _marlin_linear_tensors(module: MarlinLinear) -> Tensors:
    tensors: Tensors = {}
    codes = module.shape.unpack(module.packed, module.scales, module.zeros, module.perm)
    start = 0
    for saved in module.saved:
        columns = slice(start, start + saved.out_features)
        zeros = None if codes.zeros is None else codes.zeros[:, columns]
        part = Codes(codes.qweight[:, columns], codes.scales[:, columns], zeros)
        bias = None if module.bias is None else module.bias[columns]
        tensors |= _gptq_tensors(saved, module.shape.restore(part, module.perm, saved), bias)
        start += saved.out_features
    return tensors


def expert_tensors(module: nn.Module, path: str, dtype: torch.dtype) -> Tensors:
    """Per-expert tensors of one layer's experts; `dtype` is that of GGUF blocks, which are saved dense."""
    weights = module.weights
    tensors: Tensors = {}
    if isinstance(weights, GgufExpertWeights):
        weights = weights.dense(dtype)
    if isinstance(weights, DenseExpertWeights):
        for e in range(weights.num_experts):
            gate, up = weights.gate_up_proj[e].chunk(2)
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", weights.down_proj[e])):
                tensors[f"{path}.{e}.{name}.weight"] = weight.detach().clone()
        return tensors
    assert isinstance(module, PackedExperts)
    gate_saved, up_saved, down_saved = module.saved
    if isinstance(weights, MarlinExpertWeights):
        for e in range(weights.num_experts):
            saved_of = {"gate": gate_saved[e], "up": up_saved[e], "down": down_saved[e]}
            for name, parts in _marlin_expert_parts(weights, e, module.shapes, saved_of).items():
                tensors |= _gptq_tensors(saved_of[name], parts, None)
        return tensors
    for e in range(weights.num_experts):
        for name, saved in (("gate", gate_saved[e]), ("up", up_saved[e]), ("down", down_saved[e])):
            if isinstance(weights, GptqExpertWeights):
                parts = {part: getattr(weights, f"{name}_{part}")[e] for part in _GPTQ_PARTS}
            else:
                assert isinstance(weights, Int4ExpertWeights)
                parts = _int4_expert_parts(weights, e, name, saved)
            tensors |= _gptq_tensors(saved, parts, None)
    return tensors


def _int4_expert_parts(weights: Int4ExpertWeights, e: int, name: str, saved: SavedLinear) -> Tensors:
    if name == "down":
        part = Int4Tensors(
            weights.w2[e], weights.w2_scales[e], None if weights.w2_zeros is None else weights.w2_zeros[e]
        )
        perm = None if weights.w2_perm is None else weights.w2_perm[e]
        return unpack_int4(part, perm, saved, weights.w2_group_size)
    which = ("gate", "up").index(name)
    tiles = slice(which, None, 2)
    part = Int4Tensors(
        weights.w13[e, tiles].contiguous(),
        weights.w13_scales[e, tiles],
        None if weights.w13_zeros is None else weights.w13_zeros[e, tiles],
    )
    perms = weights.w13_perm
    perm = None if perms is None else perms[e, min(which, perms.shape[1] - 1)]
    return unpack_int4(part, perm, saved, weights.w13_group_size)


def _marlin_expert_parts(
    weights: MarlinExpertWeights, e: int, shapes: tuple[MarlinShape, MarlinShape], saved: dict[str, SavedLinear]
) -> dict[str, Tensors]:
    """On-disk tensors of gate, up and down of one expert."""
    shape13, shape2 = shapes
    parts13 = [weights.matrix("w13", (part, e)) for part in range(weights.w13.shape[0])]
    codes = [shape13.unpack(*matrix) for matrix in parts13]
    gate, up = split(codes[0]) if len(codes) == 1 else codes
    matrix2 = weights.matrix("w2", (e,))
    return {
        "gate": shape13.restore(gate, parts13[0][3], saved["gate"]),
        "up": shape13.restore(up, parts13[-1][3], saved["up"]),
        "down": shape2.restore(shape2.unpack(*matrix2), matrix2[3], saved["down"]),
    }


def dense_state_dict(model: Qwen3MoeForCausalLM, dtype: torch.dtype) -> Tensors:
    """Every weight dequantised, under the names of an unquantised checkpoint: what transformers' own class loads."""
    tensors = checkpoint_state_dict(model)
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        qweight, qzeros, scales = (tensors.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
        g_idx = tensors.pop(f"{name}.g_idx", None)
        offset = zero_offset_of(model.config.quantization_config.to_dict().get("checkpoint_format", "gptq"))
        (bits,) = (b for b in SUPPORTED_BITS if packed_columns(qweight.shape[1], b) == qzeros.shape[1])
        weight = ferrum_ops.gptq_dequantize(qweight, qzeros, scales, g_idx, bits, offset, dtype)
        tensors[f"{name}.weight"] = weight.T.contiguous()
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
