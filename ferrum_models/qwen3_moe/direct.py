"""The forward pass without the modules' call machinery: what `generate` runs token by token.

transformers' forward passes through a dozen Python layers per decoder layer (hooks, output capture, mask and cache
dispatch); at one token that costs as much as small layers compute. This is the same sequence of ops, called directly,
with the same bits as a result; on a CPU a half of a layer over int4 weights in its layout or over GGUF blocks is one
op. `applies` says when it may stand in: whoever hooks into modules, asks for hidden states or attentions, pads a batch,
compiles or uses another cache or attention gets transformers' own path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import ferrum_ops
from ferrum_models.moe.profile import is_profiled
from ferrum_models.moe.registry import route_and_run
from ferrum_models.moe.weights import GgufExpertWeights, Int4ExpertWeights
from ferrum_models.quantization.modules import Int4Linear, PackedExperts
from ferrum_models.qwen3_moe.attention import KERNEL_DEVICES, NAME
from ferrum_models.qwen3_moe.cache import GrowingLayer, let_grow
from ferrum_models.qwen3_moe.gguf_modules import GgufLinear
from ferrum_models.qwen3_moe.step_cache import StepCache

if TYPE_CHECKING:
    from ferrum_models.qwen3_moe.modeling import Attention, DecoderLayer, Qwen3MoeForCausalLM

#: Arguments of forward whose truth asks for something that only transformers' path gives.
REQUESTS = ("labels", "inputs_embeds", "output_router_logits", "output_attentions", "output_hidden_states")

#: The op that is half a layer on a CPU, by the class of attention's linears and by the layout of the experts.
ATTENTION_HALVES: dict[type, str] = {Int4Linear: "decoder_attention_int4_", GgufLinear: "decoder_attention_gguf_"}
EXPERTS_HALVES = {Int4ExpertWeights.layout: "decoder_experts_int4", GgufExpertWeights.layout: "decoder_experts_gguf"}


def applies(
    model: Qwen3MoeForCausalLM,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    arguments: dict[str, Any],
) -> bool:
    """Whether `forward` computes what transformers' forward would with these arguments."""
    config = model.config
    if torch.compiler.is_compiling() or input_ids is None or input_ids.dim() != 2 or input_ids.numel() == 0:
        return False
    if any(arguments.get(name) is not None and arguments[name] is not False for name in REQUESTS):
        return False
    if not set(arguments) <= {*REQUESTS, "use_cache", "logits_to_keep", "return_dict"}:
        return False
    if config.output_router_logits or config.output_attentions or config.output_hidden_states:
        return False
    if (
        config._attn_implementation != NAME
        or config.sliding_window is not None
        or arguments.get("return_dict") is False
    ):
        return False
    device = model.model.norm.weight.device  # model.device searches the module tree; a packed embedding has no weight
    if device.type not in KERNEL_DEVICES or input_ids.device != device or is_spread(model) or is_hooked(model):
        return False
    if cache is not None and (type(cache) is not DynamicCache or cache.offloading):
        return False
    held = 0 if cache is None else cache.get_seq_length()
    if attention_mask is None:
        # Without a mask and a cache, positions that start again mean several sequences packed into one.
        return position_ids is None or cache is not None or makes_cache(model, arguments.get("use_cache"))
    length = held + input_ids.shape[1]
    return attention_mask.dim() == 2 and attention_mask.shape[1] == length and bool(attention_mask.all())


def makes_cache(model: Qwen3MoeForCausalLM, use_cache: bool | None) -> bool:
    """Whether a forward pass without a cache starts one."""
    return bool(model.config.use_cache if use_cache is None else use_cache)


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate moves tensors between devices during the forward pass."""
    return len(set(getattr(model, "hf_device_map", {"": 0}).values())) > 1


def is_hooked(model: Qwen3MoeForCausalLM) -> bool:
    """Whether somebody watches the modules that are passed by here.

    transformers' own hooks, which stay once hidden states were asked for, collect nothing unless they are asked again.
    """
    layers = model.model.layers
    known = model.__dict__.get("_hooks")
    if known is None or known[0] is not layers:
        hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        known = model.__dict__["_hooks"] = (layers, hooks)
    watchers = (hook for hooks in known[1] if hooks for hook in hooks.values())
    return any(not (hook.__module__ or "").startswith("transformers.") for hook in watchers)


def forward(
    model: Qwen3MoeForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    use_cache: bool | None,
    logits_to_keep: int | torch.Tensor,
) -> MoeCausalLMOutputWithPast:
    if cache is None and makes_cache(model, use_cache):
        cache = DynamicCache(config=model.config)
    batch, tokens = input_ids.shape
    held = 0
    if cache is not None:
        let_grow(cache)
        held = cache.get_seq_length()
    if position_ids is None:
        position_ids = torch.arange(held, held + tokens, device=input_ids.device).unsqueeze(0)
    lengths = torch.full((2, batch), held, dtype=torch.int32, device=input_ids.device)
    lengths[1] += tokens
    hidden = hidden_states(model, input_ids, position_ids, cache, lengths)
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = model.lm_head(hidden if isinstance(kept, slice) and kept.start == 0 else hidden[:, kept, :])
    return MoeCausalLMOutputWithPast(logits=logits, past_key_values=cache)


def hidden_states(
    model: Qwen3MoeForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Cache | StepCache | None,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """`[B, n]` -> `[B, n, H]`, normed. lengths int32 `[2, B]`: tokens of a sequence in the cache before and after."""
    inner = model.model
    hidden = inner.embed_tokens(input_ids)
    rotary = inner.rotary_emb.forward(hidden, position_ids)
    hidden = hidden.flatten(0, 1)
    before_and_after = lengths.unbind()
    for i, layer in enumerate(inner.layers):
        hidden = decoder_layer(layer, hidden, rotary, cache, i, before_and_after)
    return inner.norm.forward(hidden).view(*input_ids.shape, -1)


def decoder_layer(
    layer: DecoderLayer,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    cache: Cache | StepCache | None,
    index: int,
    lengths: Sequence[torch.Tensor],
) -> torch.Tensor:
    """`[T, H]` -> `[T, H]`."""
    parts: dict[str, Any] = layer._modules
    norm, module = parts["input_layernorm"], parts["self_attn"]
    growing = growing_layer(cache, index)
    half = attention_half(module, norm) if growing is not None and hidden.is_cpu else None
    if growing is not None and half is not None:
        attended = packed_attention(half, module, norm, hidden, rotary, growing, lengths[0])
    else:
        attended = attention(module, norm.forward(hidden), rotary, cache, index, lengths)
    norm, mlp = parts["post_attention_layernorm"], parts["mlp"]
    half = experts_half(mlp) if hidden.is_cpu else None
    if half is not None:
        return getattr(ferrum_ops, half)(attended, hidden, *experts_arguments(mlp, norm))
    normed, residual = ferrum_ops.fused_add_rms_norm(attended, hidden, norm.weight, norm.variance_epsilon)
    if "experts" not in mlp._modules:
        return residual + mlp.forward(normed)
    router, weights = mlp._modules["gate"], mlp._modules["experts"].weights
    return residual + route_and_run(mlp.implementation, normed, router.forward, router.top_k, weights)


def growing_layer(cache: Cache | StepCache | None, index: int) -> GrowingLayer | None:
    """The layer of a cache whose buffers grow; None for other caches, and where the layer is not there yet."""
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    return layer if isinstance(layer, GrowingLayer) else None


def attention_half(module: Any, norm: Any) -> str | None:
    """The op that on a CPU computes this module: its linears packed alike, one eps for all norms."""
    qkv, o = module._modules["qkv_proj"], module._modules["o_proj"]
    alike = (
        type(qkv) is type(o)
        and type(qkv) in ATTENTION_HALVES
        and qkv.activation == o.activation
        and module._modules["q_norm"].variance_epsilon == norm.variance_epsilon
    )
    return ATTENTION_HALVES[type(qkv)] if alike else None


def packed_attention(
    half: str,
    module: Any,
    norm: Any,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    cache: GrowingLayer,
    held: torch.Tensor,
) -> torch.Tensor:
    """`attention` of the normed rows, as one op. held int32 `[B]`: tokens in the cache."""
    batch, length = held.shape[0], cache.get_seq_length()
    tokens = hidden.shape[0] // batch
    buffers = cache.room_for(batch, tokens, module.num_kv_heads, module.head_dim, hidden)
    arguments = attention_arguments(module, norm, rotary, None, buffers, held)
    attended = getattr(ferrum_ops, half)(hidden, *arguments)
    cache.hold(length + tokens)
    return attended


def attention_arguments(
    module: Any,
    norm: Any,
    rotary: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor | None,
    buffers: tuple[torch.Tensor, torch.Tensor],
    held: torch.Tensor,
) -> tuple[Any, ...]:
    """What the op of `attention_half` takes behind the rows."""
    parts = module._modules
    qkv, o = parts["qkv_proj"], parts["o_proj"]
    return (
        norm.weight,
        norm.variance_epsilon,
        *qkv.op_weights,
        parts["q_norm"].weight,
        parts["k_norm"].weight,
        *rotary,
        positions,
        *buffers,
        held,
        module.scaling,
        *o.op_weights,
        module.num_heads,
        qkv.activation,
    )


def experts_half(mlp: Any) -> str | None:
    """The op that on a CPU computes this block: its experts packed, run by "fused", its phases not timed."""
    experts = mlp._modules.get("experts")
    if type(experts) is not PackedExperts or mlp.implementation != "fused" or is_profiled():
        return None
    return EXPERTS_HALVES.get(experts.layout)


def experts_arguments(mlp: Any, norm: Any) -> tuple[Any, ...]:
    """What the op of `experts_half` takes behind the rows: of norm, router and experts."""
    gate, experts = mlp._modules["gate"], mlp._modules["experts"].weights
    return (
        norm.weight,
        norm.variance_epsilon,
        gate.weight,
        gate.top_k,
        gate.norm_topk_prob,
        *experts.op_arguments,
    )


def attention(
    module: Any,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    cache: Cache | StepCache | None,
    index: int,
    lengths: Sequence[torch.Tensor],
) -> torch.Tensor:
    """`[T, H]` -> `[T, H]`, the keys and values appended to the cache."""
    this: Attention = module
    parts: dict[str, Any] = this._modules
    q_norm = parts["q_norm"]
    heads = ferrum_ops.split_qkv_norm_rope(
        parts["qkv_proj"](hidden),
        q_norm.weight,
        parts["k_norm"].weight,
        *rotary,
        None,
        this.num_heads,
        this.num_kv_heads,
        this.head_dim,
        q_norm.variance_epsilon,
    )
    batch = lengths[0].shape[0]
    query, key, value = (h.view(batch, -1, h.shape[1], this.head_dim) for h in heads)
    if isinstance(cache, StepCache):
        out = cache.attend(index, query, key, value, lengths, this.scaling)
        return parts["o_proj"](out.view(hidden.shape[0], -1))
    if cache is None:
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
    elif (growing := growing_layer(cache, index)) is not None:
        keys, values = growing.append(key, value, lengths[0])
    else:
        keys, values = cache.update(key.transpose(1, 2), value.transpose(1, 2), index)
    out = ferrum_ops.attention(query, keys, values, lengths[1], this.scaling)
    return parts["o_proj"](out.view(hidden.shape[0], -1))
