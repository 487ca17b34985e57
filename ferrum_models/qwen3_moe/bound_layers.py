"""The layers of a model as the arguments of their ops, for steps of one token on a CPU.

Between two steps only numbers change: how many tokens the cache holds, and with that the position. Behind a layer whose
weights went through the caches of the processor every Python object that is looked at comes from memory, so what does
not change is looked up once for many steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ferrum_models.qwen3_moe import direct

if TYPE_CHECKING:
    from ferrum_models.qwen3_moe.modeling import Qwen3MoeForCausalLM

_attention = torch.ops.ferrum.decoder_attention_int4_.default
_experts = torch.ops.ferrum.decoder_experts_int4.default


class BoundLayers:
    """Layers whose halves are one op each, on the buffers of a cache: `room` tokens fit.

    The cache is not told about new tokens.
    """

    def __init__(self, layers: list[tuple[tuple[Any, ...], tuple[Any, ...]]], room: int) -> None:
        self._layers, self.room = layers, room

    @classmethod
    def bind(cls, model: Qwen3MoeForCausalLM, cache: DynamicCache, held: torch.Tensor) -> BoundLayers | None:
        """With room for a token more than the cache has; None where some layer has other ops.

        held: int32 `[B]`, tokens in the cache, to be counted up by the caller; also the position of the next ones.
        """
        inner = model.model
        if not inner.rotary_emb.is_static or len(cache.layers) != len(inner.layers):
            return None
        parts = [
            (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp)
            for layer in inner.layers
        ]
        buffers = []
        for i, (norm, attention, _, mlp) in enumerate(parts):
            growing = direct.growing_layer(cache, i)
            if growing is None or not direct.is_int4_attention(attention, norm) or not direct.is_int4_experts(mlp):
                return None
            like = growing.keys
            buffers.append(growing.room_for(held.shape[0], 1, attention.num_kv_heads, attention.head_dim, like))
        room = min(keys.shape[2] for keys, _ in buffers)
        positions = torch.arange(room)[None]
        rotary = inner.rotary_emb.forward(positions, positions)
        layers = [
            (
                direct.attention_arguments(attention, norm, rotary, held, kept, held),
                direct.experts_arguments(mlp, experts_norm),
            )
            for (norm, attention, experts_norm, mlp), kept in zip(parts, buffers)
        ]
        return cls(layers, room)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """A token of each sequence, `[B, H]` -> `[B, H]`."""
        for attention, experts in self._layers:
            hidden = _experts(_attention(hidden, *attention), hidden, *experts)
        return hidden
