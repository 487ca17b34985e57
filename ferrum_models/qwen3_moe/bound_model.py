"""A model with the arguments of its ops, for steps of one token on a CPU.

Between two steps only numbers change: how many tokens the cache holds, and with that the position. Behind a layer whose
weights went through the caches of the processor every Python object that is looked at comes from memory, so what does
not change is looked up once for many steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ferrum_models.quantization.modules import Int4Linear, RoundedLinear
from ferrum_models.qwen3_moe import direct
from ferrum_models.qwen3_moe.gguf_modules import GgufEmbedding, GgufLinear

if TYPE_CHECKING:
    from ferrum_models.qwen3_moe.modeling import Qwen3MoeForCausalLM

_ops = torch.ops.ferrum

OfRows = Callable[[torch.Tensor], torch.Tensor]

#: What attention added to rows `[B, H]`, and these, to the rows behind the layer.
RunExperts = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class BoundModel:
    """Layers whose halves are one op each, on the buffers of a cache: `room` tokens fit; and what is around them.

    The cache is not told about new tokens.
    """

    def __init__(self, embed: OfRows, layers: list[tuple[OfRows, RunExperts]], head: OfRows, room: int) -> None:
        self._embed, self._layers, self._head, self.room = embed, layers, head, room

    @classmethod
    def bind(cls, model: Qwen3MoeForCausalLM, cache: DynamicCache, held: torch.Tensor) -> BoundModel | None:
        """With room for a token more than the cache has; None where some layer has other ops.

        held: int32 `[B]`, tokens in the cache before the next step and with that its positions, to be counted up by the
        caller.
        """
        inner = model.model
        if not inner.rotary_emb.is_static or len(cache.layers) != len(inner.layers):
            return None
        buffers = []
        for i, layer in enumerate(inner.layers):
            growing, attention = direct.growing_layer(cache, i), layer.self_attn
            if growing is None:
                return None
            heads, head_dim = attention.num_kv_heads, attention.head_dim
            buffers.append(growing.room_for(held.shape[0], 1, heads, head_dim, growing.keys))
        room = min(keys.shape[2] for keys, _ in buffers)
        positions = torch.arange(room)[None]
        rotary = inner.rotary_emb.forward(positions, positions)
        layers = []
        for layer, kept in zip(inner.layers, buffers):
            attend = bind_attention(layer.self_attn, layer.input_layernorm, rotary, kept, held)
            experts = bind_experts(layer.mlp, layer.post_attention_layernorm)
            if attend is None or experts is None:
                return None
            layers.append((attend, experts))
        return cls(bind_embedding(inner.embed_tokens), layers, bind_head(inner.norm, model.lm_head), room)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """A token of each sequence, int64 `[B]`, to logits `[B, V]`."""
        hidden = self._embed(input_ids)
        for attend, run_experts in self._layers:
            hidden = run_experts(attend(hidden), hidden)
        return self._head(hidden)


def bind_embedding(module: Any) -> OfRows:
    if type(module) is not GgufEmbedding:
        return module
    blocks, arguments = module.blocks, (module.type, module.dtype)
    rows_of, dequantize = torch.ops.aten.embedding.default, _ops.gguf_dequantize.default
    return lambda ids: dequantize(rows_of(blocks, ids), *arguments)


def bind_head(norm: Any, module: Any) -> OfRows:
    norm_arguments = (norm.weight, norm.variance_epsilon)
    rms_norm = _ops.rms_norm.default
    linear, arguments = module, ()
    if isinstance(module, GgufLinear | Int4Linear | RoundedLinear):
        linear, arguments = getattr(_ops, module.op).default, module.op_arguments
    return lambda hidden: linear(rms_norm(hidden, *norm_arguments), *arguments)


def bind_attention(
    module: Any,
    norm: Any,
    rotary: tuple[torch.Tensor, torch.Tensor],
    buffers: tuple[torch.Tensor, torch.Tensor],
    held: torch.Tensor,
) -> OfRows | None:
    name = direct.attention_half(module, norm)
    if name is None:
        return None
    half = getattr(_ops, name).default
    arguments = direct.attention_arguments(module, norm, rotary, held, buffers, held)
    return lambda hidden: half(hidden, *arguments)


def bind_experts(mlp: Any, norm: Any) -> RunExperts | None:
    name = direct.experts_half(mlp)
    if name is None:
        return None
    half = getattr(_ops, name).default
    arguments = direct.experts_arguments(mlp, norm)
    return lambda attended, hidden: half(attended, hidden, *arguments)
