"""The layers of a model with the arguments of their ops, for steps of one token on a CPU.

Between two steps only numbers change: how many tokens the cache holds, and with that the position. Behind a layer whose
weights went through the caches of the processor every Python object that is looked at comes from memory, so what does
not change is looked up once for many steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ferrum_models.qwen3_moe import direct
from ferrum_models.qwen3_moe.gguf_modules import GgufLinear

if TYPE_CHECKING:
    from ferrum_models.qwen3_moe.modeling import Qwen3MoeForCausalLM

_ops = torch.ops.ferrum

#: Rows `[B, H]` to what attention adds to them, and both to the rows behind the layer.
Attend = Callable[[torch.Tensor], torch.Tensor]
RunExperts = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class BoundLayers:
    """Layers with int4 or GGUF weights, on the buffers of a cache: `room` tokens fit.

    The cache is not told about new tokens.
    """

    def __init__(self, layers: list[tuple[Attend, RunExperts]], room: int) -> None:
        self._layers, self.room = layers, room

    @classmethod
    def bind(cls, model: Qwen3MoeForCausalLM, cache: DynamicCache, lengths: torch.Tensor) -> BoundLayers | None:
        """With room for a token more than the cache has; None where some layer has other ops.

        lengths: int32 `[2, B]`, tokens in the cache before and after the next step, to be counted up by the caller; the
        first are the positions too.
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
            buffers.append(growing.room_for(lengths.shape[1], 1, heads, head_dim, growing.keys))
        room = min(keys.shape[2] for keys, _ in buffers)
        positions = torch.arange(room)[None]
        rotary = inner.rotary_emb.forward(positions, positions)
        layers = []
        for layer, kept in zip(inner.layers, buffers):
            attend = bind_attention(layer.self_attn, layer.input_layernorm, rotary, kept, lengths)
            experts = bind_experts(layer.mlp, layer.post_attention_layernorm)
            if attend is None or experts is None:
                return None
            layers.append((attend, experts))
        return cls(layers, room)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """A token of each sequence, `[B, H]` -> `[B, H]`."""
        for attend, run_experts in self._layers:
            hidden = run_experts(attend(hidden), hidden)
        return hidden


def bind_attention(
    module: Any,
    norm: Any,
    rotary: tuple[torch.Tensor, torch.Tensor],
    buffers: tuple[torch.Tensor, torch.Tensor],
    lengths: torch.Tensor,
) -> Attend | None:
    held, after = lengths.unbind()
    if direct.is_int4_attention(module, norm):
        arguments = direct.attention_arguments(module, norm, rotary, held, buffers, held)
        half = _ops.decoder_attention_int4_.default
        return lambda hidden: half(hidden, *arguments)
    if type(module.qkv_proj) is not GgufLinear or type(module.o_proj) is not GgufLinear:
        return None
    norm_arguments = (norm.weight, norm.variance_epsilon)
    qkv, o = module.qkv_proj.arguments(), module.o_proj.arguments()
    heads = (
        *(module.q_norm.weight, module.k_norm.weight, *rotary, held),
        *(module.num_heads, module.num_kv_heads, module.head_dim, module.q_norm.variance_epsilon),
    )
    scaling = module.scaling
    rms_norm, linear, split = _ops.rms_norm.default, _ops.gguf_linear.default, _ops.split_qkv_norm_rope.default
    append, attention = _ops.kv_append_.default, _ops.attention.default

    def attend(hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = split(linear(rms_norm(hidden, *norm_arguments), *qkv), *heads)
        append(*buffers, key[:, None], value[:, None], held)
        out = attention(query[:, None], *buffers, after, scaling)
        return linear(out.flatten(1), *o)

    return attend


def bind_experts(mlp: Any, norm: Any) -> RunExperts | None:
    if direct.is_int4_experts(mlp):
        arguments = direct.experts_arguments(mlp, norm)
        half = _ops.decoder_experts_int4.default
        return lambda attended, hidden: half(attended, hidden, *arguments)
    if not direct.is_gguf_experts(mlp):
        return None
    norm_arguments = (norm.weight, norm.variance_epsilon)
    routing = (mlp.gate.weight, mlp.gate.top_k, mlp.gate.norm_topk_prob)
    weights = mlp.experts.weights.arguments()
    add_norm, route = _ops.fused_add_rms_norm.default, _ops.router_topk_softmax.default
    experts = _ops.moe_experts_gguf.default

    def run_experts(attended: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        normed, residual = add_norm(attended, hidden, *norm_arguments)
        _, ids, topk_weights = route(normed, *routing)
        return residual.add_(experts(normed, ids, topk_weights, *weights))

    return run_experts
