"""Ferrum's ops: `torch.ops.ferrum.*` and the functions that document them."""

from ferrum_ops import triton
from ferrum_ops._library import CPU_ISA_LEVELS, OPS, backends, cpu_isa, use_cpu_isa
from ferrum_ops.config import RuntimeConfig
from ferrum_ops.ops.activation import gelu_tanh_mul, silu_mul, silu_mul_out
from ferrum_ops.ops.attention import attention, paged_attention
from ferrum_ops.ops.decoder import (
    decoder_attention_gguf_,
    decoder_attention_int4_,
    decoder_experts_gguf,
    decoder_experts_int4,
)
from ferrum_ops.ops.elementwise import (
    add_bias_,
    embedding_lookup,
    gather_columns,
    gelu,
    layer_norm,
    scaled_add_,
    split_qkv,
    transpose_head_to_token,
    transpose_token_to_head,
)
from ferrum_ops.ops.gguf import gguf_dequantize, gguf_linear, gguf_moe_linear, gguf_pack, moe_experts_gguf
from ferrum_ops.ops.gptq import gptq_dequantize, gptq_gemm
from ferrum_ops.ops.int4 import int4_linear, int4_pack, int4_unpack, int8_linear
from ferrum_ops.ops.kv_cache import kv_append_, paged_kv_write_, paged_kv_write_int8_
from ferrum_ops.ops.marlin import (
    marlin_dequantize_out,
    marlin_gemm,
    marlin_permute_scales,
    marlin_repack,
    marlin_repack_zeros,
    marlin_unpack,
    marlin_unpermute_scales,
    marlin_workspace,
)
from ferrum_ops.ops.moe_combine import moe_combine, weighted_sum, weighted_sum_residual_, weighted_sum_residual_norm_
from ferrum_ops.ops.moe_gemm import gptq_moe_gemm, marlin_moe_gemm, moe_experts_int4
from ferrum_ops.ops.moe_routing import (
    moe_align_block_size,
    moe_build_pairs_by_token,
    moe_compute_ids_tpe,
    route_topk_align,
    route_topk_softmax,
    router_topk_softmax,
)
from ferrum_ops.ops.norm import fused_add_rms_norm, fused_add_rms_norm_, rms_norm
from ferrum_ops.ops.rope import qk_norm_rope, split_qkv_norm_rope, split_qkv_norm_rope_paged_
from ferrum_ops.ops.sampling import argmax_rows, repetition_penalty_

triton.attach()

__all__ = [
    "CPU_ISA_LEVELS",
    "OPS",
    "RuntimeConfig",
    "add_bias_",
    "argmax_rows",
    "attention",
    "backends",
    "cpu_isa",
    "decoder_attention_gguf_",
    "decoder_attention_int4_",
    "decoder_experts_gguf",
    "decoder_experts_int4",
    "embedding_lookup",
    "fused_add_rms_norm",
    "fused_add_rms_norm_",
    "gather_columns",
    "gelu",
    "gelu_tanh_mul",
    "gguf_dequantize",
    "gguf_linear",
    "gguf_moe_linear",
    "gguf_pack",
    "gptq_dequantize",
    "gptq_gemm",
    "gptq_moe_gemm",
    "int4_linear",
    "int4_pack",
    "int4_unpack",
    "int8_linear",
    "kv_append_",
    "layer_norm",
    "marlin_dequantize_out",
    "marlin_gemm",
    "marlin_moe_gemm",
    "marlin_permute_scales",
    "marlin_repack",
    "marlin_repack_zeros",
    "marlin_unpack",
    "marlin_unpermute_scales",
    "marlin_workspace",
    "moe_align_block_size",
    "moe_build_pairs_by_token",
    "moe_combine",
    "moe_compute_ids_tpe",
    "moe_experts_gguf",
    "moe_experts_int4",
    "paged_attention",
    "paged_kv_write_",
    "paged_kv_write_int8_",
    "qk_norm_rope",
    "repetition_penalty_",
    "rms_norm",
    "route_topk_align",
    "route_topk_softmax",
    "router_topk_softmax",
    "scaled_add_",
    "silu_mul",
    "silu_mul_out",
    "split_qkv",
    "split_qkv_norm_rope",
    "split_qkv_norm_rope_paged_",
    "transpose_head_to_token",
    "transpose_token_to_head",
    "use_cpu_isa",
    "weighted_sum",
    "weighted_sum_residual_",
    "weighted_sum_residual_norm_",
]
