"""Qwen3-MoE on Ferrum's ops: transformers' model with the insides of its decoder layers replaced.

Configuration, embedding, the layer loop, masks, caches and `generate` are transformers'. Where the layout is not a
checkpoint's (fused q/k/v and gate/up projections, packed experts) `planner.py` and `saving.py` translate.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, Qwen3MoeConfig
from transformers import Qwen3MoeForCausalLM as HfQwen3MoeForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

import ferrum_ops
from ferrum_models.moe.plan import Blocks
from ferrum_models.moe.profile import phase, profile
from ferrum_models.moe.registry import check_implementation, route_and_run
from ferrum_models.moe.weights import DenseExpertWeights
from ferrum_models.qwen3_moe import attention, decode, direct, generation
from ferrum_models.qwen3_moe.cache import let_grow
from ferrum_models.report import LoadReport
from ferrum_ops.config import RuntimeConfig

ACTIVATIONS = ("int8", "full")


def check_activation(name: str) -> str:
    """`name` itself; raises ValueError with the known names."""
    if name not in ACTIVATIONS:
        raise ValueError(f"[activation] expected one of {ACTIVATIONS}, got {name!r}")
    return name


class RMSNorm(hf.Qwen3MoeRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return ferrum_ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class RotaryEmbedding(hf.Qwen3MoeRotaryEmbedding):
    """Tables of the positions at hand in float32: `[B*T, D/2]` cos and sin, row t for token t."""

    @property
    def is_static(self) -> bool:
        """Whether a position has the same row whatever the other positions are."""
        return "dynamic" not in self.rope_type and self.rope_type != "longrope"

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = x.shape[0]
        if not self.is_static:
            # The parent changes its frequencies with the positions. It casts to the dtype of `x`.
            cos, sin = super().forward(x.float(), position_ids)
            half = cos.shape[-1] // 2
            cos, sin = (t[..., :half].expand(batch, -1, -1).reshape(-1, half) for t in (cos, sin))
            return cos, sin
        angles = position_ids.expand(batch, -1).reshape(-1, 1).float() * self.inv_freq.float()
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1.0:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos, sin


class Attention(hf.Qwen3MoeAttention):
    """Attention with one projection for q, k and v; norm, rotary and the split in one op."""

    def __init__(self, config: Qwen3MoeConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # the parent's would allocate three projections to throw away
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = getattr(config, "sliding_window", None)
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj: nn.Module = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj: nn.Module = nn.Linear(
            self.num_heads * self.head_dim, config.hidden_size, bias=config.attention_bias
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length = hidden_states.shape[:2]
        cos, sin = position_embeddings
        heads = ferrum_ops.split_qkv_norm_rope(
            self.qkv_proj(hidden_states).flatten(0, 1),
            self.q_norm.weight,
            self.k_norm.weight,
            cos,
            sin,
            None,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.q_norm.variance_epsilon,
        )
        query, key, value = (h.view(batch, length, -1, self.head_dim).transpose(1, 2) for h in heads)
        if past_key_values is not None:
            let_grow(past_key_values)
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, hf.eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, length, -1)), weights


class MLP(nn.Module):
    """The dense feed-forward of layers without experts."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.gate_up_proj: nn.Module = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj: nn.Module = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(ferrum_ops.silu_mul(self.gate_up_proj(hidden_states)))


class Router(hf.Qwen3MoeTopKRouter):
    """Logits `[T, E]`, weights float32 `[T, K]` and ids int32 `[T, K]`, in transformers' order.

    With a block size, the pairs in `Blocks` of it as well.
    """

    def forward(self, hidden_states: torch.Tensor, block_size: int = 0) -> tuple[Any, ...]:
        with phase("route"):
            if block_size > 0:
                logits = nn.functional.linear(hidden_states, self.weight)
                ids, weights, sorted_token_ids, block_ids, total_post_pad = ferrum_ops.route_topk_align(
                    logits, self.top_k, self.norm_topk_prob, block_size
                )
                return logits, weights, ids, Blocks(sorted_token_ids, block_ids, total_post_pad, block_size)
            logits, ids, weights = ferrum_ops.router_topk_softmax(
                hidden_states, self.weight, self.top_k, self.norm_topk_prob
            )
        return logits, weights, ids


class DenseExperts(hf.Qwen3MoeExperts):
    """Experts in transformers' dense layout."""

    @property
    def weights(self) -> DenseExpertWeights:
        return DenseExpertWeights(self.gate_up_proj, self.down_proj)


class SparseMoeBlock(nn.Module):
    """Router and experts. `experts` holds one layout's tensors; `implementation` names how they are run."""

    def __init__(self, config: Qwen3MoeConfig, implementation: str) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts: nn.Module = DenseExperts(config)
        self.implementation = implementation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = hidden_states.flatten(0, -2)
        out = route_and_run(self.implementation, hidden, self.gate, self.gate.top_k, self.experts.weights)
        return out.view_as(hidden_states)


class DecoderLayer(hf.Qwen3MoeDecoderLayer):
    def __init__(self, config: Qwen3MoeConfig, layer_idx: int, implementation: str) -> None:
        nn.Module.__init__(self)  # the parent's would allocate the modules replaced here
        self.hidden_size = config.hidden_size
        self.self_attn = Attention(config, layer_idx)
        self.mlp: nn.Module = (
            SparseMoeBlock(config, implementation) if is_sparse_layer(config, layer_idx) else MLP(config)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        norm = self.post_attention_layernorm
        normed, residual = ferrum_ops.fused_add_rms_norm(attended, hidden_states, norm.weight, norm.variance_epsilon)
        return residual + self.mlp(normed)


def is_sparse_layer(config: Qwen3MoeConfig, layer_idx: int) -> bool:
    """Whether the layer has experts (the rule of transformers' Qwen3MoeDecoderLayer)."""
    sparse = config.num_experts > 0 and (layer_idx + 1) % config.decoder_sparse_step == 0
    return sparse and layer_idx not in config.mlp_only_layers


class OutputProjection(nn.Linear):
    """Takes the rows that `logits_to_keep` leaves: for rows with gaps F.linear copies the weight for every sequence."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.contiguous())


class Qwen3MoeForCausalLM(HfQwen3MoeForCausalLM):
    """Qwen3-MoE for inference with packed experts.

    `from_pretrained` loads a GPTQ or dense safetensors checkpoint, or a GGUF file, whose packed tensors stay views of
    the mapped file: it must not be changed or shortened while the model lives. Everything else, `generate`, caches,
    attention implementations, `save_pretrained`, is transformers'.
    """

    def __init__(
        self,
        config: Qwen3MoeConfig,
        moe_implementation: str = "fused",
        runtime_config: RuntimeConfig | None = None,
    ) -> None:
        check_implementation(moe_implementation)
        if config.hidden_act != "silu":
            raise ValueError(f"[Qwen3MoeForCausalLM] hidden_act: expected 'silu', got {config.hidden_act!r}")
        if config._attn_implementation is None:
            config._attn_implementation = attention.NAME
        super().__init__(config)
        self.lm_head.__class__ = OutputProjection  # in place: its weight may be the embedding's
        self.model.layers = nn.ModuleList(
            DecoderLayer(config, i, moe_implementation) for i in range(config.num_hidden_layers)
        )
        self.model.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.model.rotary_emb = RotaryEmbedding(config=config)
        self.load_report: LoadReport | None = None
        self.runtime_config = RuntimeConfig() if runtime_config is None else runtime_config
        #: The recorded steps of the last `generate`, where `runtime_config.cuda_graph` asks for them.
        self.decode_graph: decode.DecodeGraph | None = None
        self.post_init()
        self.requires_grad_(False)  # its ops have no backward: calling it needs no torch.no_grad()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, pickled or not: without the recorded steps, which read this model's tensors where they lie."""
        return self.__dict__ | {"decode_graph": None}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        moe_implementation: str = "fused",
        activation: str = "int8",
        quantize: str | None = None,
        lm_head: str | None = None,
        layout: str | None = None,
        gguf_repack: bool | None = None,
        runtime_config: RuntimeConfig | None = None,
        **kwargs: Any,
    ) -> Qwen3MoeForCausalLM:
        """Load a checkpoint directory, packing quantised weights for the device they will run on.

        Args:
            pretrained_model_name_or_path: directory with GPTQ or dense safetensors, a GGUF file (of a split model, any
                part) or a directory with one, or a model id, with `gguf_file="..."` for a file in its repository.
            moe_implementation: "fused", "bucketed" or "per_pair".
            activation: CPU kernels: "int8" quantises activations per group of 128, "full" keeps them.
            quantize: "int4" packs the linears and experts of a dense checkpoint while loading (round to nearest,
                groups of 128); None leaves them dense.
            lm_head: on a CPU, "int8" or "int4" rounds a dense lm_head while loading (to nearest, groups of 128): every
                token reads a half or a quarter of what bfloat16 takes. Saved dense again, with the rounded values.
            layout: of the quantised weights: "marlin" (tensor cores; a reference elsewhere), "gptq" (as on disk),
                "int4_cpu" or "dense"; None picks the device's own, marlin on CUDA and int4_cpu on the CPU. What a
                layout has no form for takes another one, and a warning says why.
            gguf_repack: True copies a GGUF file's packed matrices into tiles while loading (`ferrum_ops.gguf_pack`):
                about as many bytes, in memory of their own, the same results and faster. False leaves them in the
                mapped file: nothing is read while loading. None: True on a CPU with kernels for tiles (AVX512).
            runtime_config: the knobs of this model, kept as `model.runtime_config`; None takes them from FERRUM_*
                variables.
            kwargs: as in transformers: `dtype` (of the activations), `device_map`, `attn_implementation`, `config`, ...

        Raises:
            CheckpointError: the files do not hold exactly the tensors the configuration asks for.
            ValueError: unknown names above, or a FERRUM_* variable that is unknown or malformed.
        """
        from ferrum_models.qwen3_moe.loading import load_pretrained

        return load_pretrained(
            super().from_pretrained,
            pretrained_model_name_or_path,
            *model_args,
            moe_implementation=check_implementation(moe_implementation),
            activation=check_activation(activation),
            quantize=quantize,
            lm_head=lm_head,
            layout=layout,
            gguf_repack=gguf_repack,
            runtime_config=RuntimeConfig() if runtime_config is None else runtime_config,
            **kwargs,
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As in transformers. Where only logits and cache are asked for, the ops are called directly (direct.py)."""
        arguments = {
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "output_router_logits": output_router_logits,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        if direct.applies(self, input_ids, attention_mask, position_ids, past_key_values, arguments):
            return direct.forward(self, input_ids, position_ids, past_key_values, use_cache, logits_to_keep)
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **arguments)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the runtime configuration's `cuda_graph` and `moe_profile`.

        On CUDA `cuda_graph` records decode steps and replays them: `decode_graph` did, or its `fallback` says why not.
        `moe_profile` prints where the MoE blocks' time went to stderr.
        """
        if not self.runtime_config.moe_profile:
            return super().generate(*args, **kwargs)
        with profile() as times:
            output = super().generate(*args, **kwargs)
        print(times, file=sys.stderr)
        return output

    def _validate_generation_mode(self, generation_mode: Any, *args: Any, **kwargs: Any) -> None:
        super()._validate_generation_mode(generation_mode, *args, **kwargs)
        generation.check_mode(self, generation_mode)

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The loop of `generate` for greedy decoding and sampling."""
        steps = generation.steps_for(self, input_ids, stopping_criteria, generation_config, synced_gpus, model_kwargs)
        if steps is not None:
            mask = model_kwargs.get("attention_mask")
            return generation.generate(
                steps, input_ids, logits_processor, stopping_criteria, generation_config, streamer, mask
            )
        return super()._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )

    def set_moe_implementation(self, name: str) -> None:
        """Switch every MoE block to "fused", "bucketed" or "per_pair"."""
        check_implementation(name)
        for module in self.modules():
            if isinstance(module, SparseMoeBlock):
                module.implementation = name

    def set_activation(self, name: str) -> None:
        """Switch every CPU-packed layer to "int8" or "full" activations."""
        check_activation(name)
        for module in self.modules():
            if hasattr(module, "set_activation") and module is not self:
                module.set_activation(name)

    def memory_footprint(self) -> int:
        """Bytes of all parameters and buffers."""
        tensors = {t.data_ptr(): t for t in (*self.parameters(), *self.buffers())}  # tied tensors count once
        return sum(t.nbytes for t in tensors.values())

    def state_dict_to_save(self) -> dict[str, torch.Tensor]:
        """The tensors under the names and in the format of the checkpoint this model came from."""
        from ferrum_models.qwen3_moe.saving import checkpoint_state_dict

        return checkpoint_state_dict(self)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As in transformers; packed weights are written in the format they came from (GPTQ), GGUF blocks dense."""
        quantized = getattr(self, "hf_quantizer", None) is not None  # which then supplies the tensors itself
        if kwargs.get("state_dict") is None and not quantized:
            kwargs["state_dict"] = self.state_dict_to_save()
        self._weight_conversions: list[Any] = []  # names are the checkpoint's already
        super().save_pretrained(save_directory, **kwargs)
