"""Qwen3-MoE on Ferrum's ops, loaded and used like a transformers model."""

from ferrum_models.checkpoint import CheckpointError
from ferrum_models.qwen3_moe.decode import DecodeGraph
from ferrum_models.qwen3_moe.modeling import Qwen3MoeForCausalLM
from ferrum_models.report import LoadReport

__all__ = ["CheckpointError", "DecodeGraph", "LoadReport", "Qwen3MoeForCausalLM"]
