"""The configuration that a GGUF file's metadata describes."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, Qwen3MoeConfig

from ferrum_models.checkpoint import CheckpointError
from ferrum_models.qwen3_moe.gguf_file import GgufCheckpoint
from ferrum_ops.formats.gguf import FLOAT_TYPES

ARCHITECTURE = "qwen3moe"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

#: Keys whose other values mean a model this one is not, and the values that mean it is.
FIXED: dict[str, tuple[Any, ...]] = {
    "expert_shared_count": (0,),
    "expert_gating_func": (0, 1),  # 1: softmax
    "expert_weights_scale": (0.0, 1.0),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
}


def qwen3_moe_config(checkpoint: GgufCheckpoint) -> Qwen3MoeConfig:
    """Raises CheckpointError for another architecture, a missing key or a value that this model has no place for."""
    architecture = checkpoint.value("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise CheckpointError(checkpoint.path, None, f"general.architecture {ARCHITECTURE!r}", repr(architecture))

    def get(key: str, types: Any = int, default: Any = None) -> Any:
        return checkpoint.value(f"{ARCHITECTURE}.{key}", types, default)

    for key, allowed in FIXED.items():
        if (found := checkpoint.metadata.get(f"{ARCHITECTURE}.{key}", allowed[0])) not in allowed:
            raise CheckpointError(checkpoint.path, None, f"{ARCHITECTURE}.{key} {allowed[0]}", repr(found))
    keys = ("block_count", "embedding_length", "attention.head_count", "expert_count", "expert_used_count")
    sizes = {key: get(key) for key in keys}
    sizes["attention.head_count_kv"] = get("attention.head_count_kv", default=sizes["attention.head_count"])
    for key, size in sizes.items():
        if not 1 <= size < 1 << 20:
            raise CheckpointError(checkpoint.path, None, f"{ARCHITECTURE}.{key} from 1 to {(1 << 20) - 1}", str(size))
    hidden, heads, kv_heads = (
        sizes[k] for k in ("embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    if heads % kv_heads:
        raise CheckpointError(
            checkpoint.path, None, f"a divisor of {heads} query heads as head_count_kv", str(kv_heads)
        )
    if sizes["expert_used_count"] > sizes["expert_count"]:
        expected = f"{ARCHITECTURE}.expert_used_count of at most {sizes['expert_count']}"
        raise CheckpointError(checkpoint.path, None, expected, str(sizes["expert_used_count"]))
    head_dim = get("attention.key_length", default=hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := get(key, default=head_dim)) != head_dim:
            raise CheckpointError(checkpoint.path, None, f"{ARCHITECTURE}.{key} {head_dim}, the key length", str(found))
    width = get("expert_feed_forward_length", default=_rows_of_experts(checkpoint))
    rope_theta = get("rope.freq_base", float, 10000.0)
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=_vocabulary(checkpoint),
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length", default=width),
        num_hidden_layers=sizes["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon", float),
        rope_parameters={"rope_theta": rope_theta, **_rope_scaling(checkpoint)},
        num_experts=sizes["expert_count"],
        num_experts_per_tok=sizes["expert_used_count"],
        moe_intermediate_size=width,
        norm_topk_prob=get("expert_weights_norm", bool, True),  # not stored by most writers, and true of the family
        tie_word_embeddings=_ties_dense_embedding(checkpoint),
        **token_ids(checkpoint),
    )


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


def _rope_scaling(checkpoint: GgufCheckpoint) -> dict[str, Any]:
    """transformers' rope_parameters for gguf's rope.scaling keys."""
    prefix = f"{ARCHITECTURE}.rope.scaling"
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
