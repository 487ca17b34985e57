"""The configuration that a GGUF file's metadata describes."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, Qwen3MoeConfig

from ferrum_models.checkpoint import CheckpointError
from ferrum_models.qwen3_moe.gguf_file import GgufCheckpoint
from ferrum_ops.formats.gguf import FLOAT_TYPES

#: llama.cpp's names of what this model is. Dense Qwen3 is Qwen3-MoE without a sparse layer. (Llama is not: it has no
#: norms of queries and keys, and its rows of q and k are in another order in these files.)
MOE, DENSE = "qwen3moe", "qwen3"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

#: Keys whose other values mean a model this one is not, and the values that mean it is.
FIXED: dict[str, tuple[Any, ...]] = {
    "expert_shared_count": (0,),
    "expert_gating_func": (0, 1),  # 1: softmax
    "expert_weights_scale": (0.0, 1.0),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
}
#: Sizes that a file must have, and those that experts add.
SIZES = ("block_count", "embedding_length", "attention.head_count")
EXPERT_SIZES = ("expert_count", "expert_used_count")


def qwen3_moe_config(checkpoint: GgufCheckpoint) -> Qwen3MoeConfig:
    """Raises CheckpointError for another architecture, a missing key or a value that this model has no place for."""
    architecture = checkpoint.value("general.architecture", str)
    if architecture not in (MOE, DENSE):
        raise CheckpointError(checkpoint.path, None, f"general.architecture {MOE!r} or {DENSE!r}", repr(architecture))

    def get(key: str, types: Any = int, default: Any = None) -> Any:
        return checkpoint.value(f"{architecture}.{key}", types, default)

    for key, allowed in FIXED.items():
        if (found := checkpoint.metadata.get(f"{architecture}.{key}", allowed[0])) not in allowed:
            raise CheckpointError(checkpoint.path, None, f"{architecture}.{key} {allowed[0]}", repr(found))
    sizes = {key: get(key) for key in (*SIZES, *(EXPERT_SIZES if architecture == MOE else ()))}
    sizes["attention.head_count_kv"] = get("attention.head_count_kv", default=sizes["attention.head_count"])
    for key, size in sizes.items():
        if not 1 <= size < 1 << 20:
            raise CheckpointError(checkpoint.path, None, f"{architecture}.{key} from 1 to {(1 << 20) - 1}", str(size))
    hidden, heads, kv_heads = (
        sizes[k] for k in ("embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    if heads % kv_heads:
        raise CheckpointError(
            checkpoint.path, None, f"a divisor of {heads} query heads as head_count_kv", str(kv_heads)
        )
    head_dim = get("attention.key_length", default=hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := get(key, default=head_dim)) != head_dim:
            raise CheckpointError(checkpoint.path, None, f"{architecture}.{key} {head_dim}, the key length", str(found))
    rope_theta = get("rope.freq_base", float, 10000.0)
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=_vocabulary(checkpoint),
        hidden_size=hidden,
        num_hidden_layers=sizes["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon", float),
        rope_parameters={"rope_theta": rope_theta, **_rope_scaling(checkpoint, f"{architecture}.rope.scaling")},
        tie_word_embeddings=_ties_dense_embedding(checkpoint),
        **(_experts(checkpoint) if architecture == MOE else _no_experts(checkpoint, sizes["block_count"])),
        **token_ids(checkpoint),
    )


def _experts(checkpoint: GgufCheckpoint) -> dict[str, Any]:
    def get(key: str, types: Any = int, default: Any = None) -> Any:
        return checkpoint.value(f"{MOE}.{key}", types, default)

    count, used = get("expert_count"), get("expert_used_count")
    if used > count:
        raise CheckpointError(checkpoint.path, None, f"{MOE}.expert_used_count of at most {count}", str(used))
    width = get("expert_feed_forward_length", default=_rows_of_experts(checkpoint))
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "intermediate_size": get("feed_forward_length", default=width),
        "norm_topk_prob": get("expert_weights_norm", bool, True),  # not stored by most, and true of the family
    }


def _no_experts(checkpoint: GgufCheckpoint, layers: int) -> dict[str, Any]:
    """Of a model all of whose layers are dense."""
    return {
        "mlp_only_layers": list(range(layers)),
        "intermediate_size": checkpoint.value(f"{DENSE}.feed_forward_length", int),
    }


def _ties_dense_embedding(checkpoint: GgufCheckpoint) -> bool:
    """Whether the output is the embedding's very parameter. (The planner shares a packed embedding as blocks.)"""
    embedding = checkpoint.tensors.get(EMBEDDING)
    return OUTPUT not in checkpoint.tensors and embedding is not None and embedding.type in FLOAT_TYPES


def _vocabulary(checkpoint: GgufCheckpoint) -> int:
    embedding = checkpoint.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        found = "no such tensor" if embedding is None else str(embedding.shape)
        raise CheckpointError(checkpoint.path, EMBEDDING, "a tensor of shape (vocabulary, embedding_length)", found)
    return embedding.shape[0]


def _rows_of_experts(checkpoint: GgufCheckpoint) -> int | None:
    gate = checkpoint.tensors.get("blk.0.ffn_gate_exps.weight")
    return gate.shape[1] if gate is not None and len(gate.shape) == 3 else None


def _rope_scaling(checkpoint: GgufCheckpoint, prefix: str) -> dict[str, Any]:
    """transformers' rope_parameters for gguf's rope.scaling keys."""
    kind = checkpoint.value(f"{prefix}.type", str, "none")
    if kind == "none":
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise CheckpointError(checkpoint.path, None, f"{prefix}.type none, linear or yarn", repr(kind))
    scaling: dict[str, Any] = {"rope_type": kind, "factor": checkpoint.value(f"{prefix}.factor", float)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = checkpoint.value(f"{prefix}.original_context_length", int)
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if f"{prefix}.{key}" in checkpoint.metadata:
                scaling[name] = checkpoint.value(f"{prefix}.{key}", float)
        for key in ("attn_factor", "yarn_attn_factor"):  # ggml multiplies yarn's own factor with it
            if (found := checkpoint.value(f"{prefix}.{key}", float, 1.0)) != 1.0:
                raise CheckpointError(checkpoint.path, None, f"{prefix}.{key} 1.0", repr(found))
    return scaling


def token_ids(checkpoint: GgufCheckpoint) -> dict[str, int]:
    """bos, eos and pad token ids as the configuration names them, those that the file has."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: checkpoint.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: value for name, value in ids.items() if isinstance(value, int)}


def generation_config(checkpoint: GgufCheckpoint) -> GenerationConfig:
    return GenerationConfig(**token_ids(checkpoint))
