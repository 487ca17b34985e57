// The only list of op schemas, in alphabetical order. Argument orders are frozen: exported programs carry them.
// T tokens, H hidden, I expert width, E experts, K top-k (or in-features), P = T*K pairs, D head dim.
#include <torch/csrc/stable/library.h>

#include "common/library.h"

STABLE_TORCH_LIBRARY(FERRUM_NAMESPACE, m) {
  m.def("add_bias_(Tensor(a!) x, Tensor bias) -> ()");
  m.def("argmax_rows(Tensor logits, Tensor? mask=None) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_lens, float scale, bool causal=True, "
      "int window=0) -> Tensor");
  m.def(
      "decoder_attention_gguf_(Tensor hidden, Tensor norm_weight, float eps, Tensor[] qkv, int[] qkv_types, "
      "Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? positions, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens, float scale, Tensor[] o, int[] o_types, "
      "int num_heads, str activation) -> Tensor");
  m.def(
      "decoder_attention_int4_(Tensor hidden, Tensor norm_weight, float eps, "
      "Tensor qkv, Tensor qkv_scales, Tensor? qkv_zeros, Tensor? qkv_perm, Tensor? qkv_bias, int qkv_group_size, "
      "Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? positions, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens, float scale, "
      "Tensor o, Tensor o_scales, Tensor? o_zeros, Tensor? o_perm, Tensor? o_bias, int o_group_size, "
      "int num_heads, str activation) -> Tensor");
  m.def(
      "decoder_experts_gguf(Tensor attended, Tensor residual, Tensor norm_weight, float eps, "
      "Tensor router_weight, int top_k, bool renormalize, Tensor gate, Tensor up, Tensor down, int[] types, "
      "str activation) -> Tensor");
  m.def(
      "decoder_experts_int4(Tensor attended, Tensor residual, Tensor norm_weight, float eps, "
      "Tensor router_weight, int top_k, bool renormalize, "
      "Tensor w13, Tensor w13_scales, Tensor? w13_zeros, Tensor? w13_perm, int w13_group_size, "
      "Tensor w2, Tensor w2_scales, Tensor? w2_zeros, Tensor? w2_perm, int w2_group_size, "
      "int intermediate_size, str activation) -> Tensor");
  m.def("embedding_lookup(Tensor table, Tensor ids) -> Tensor");
  m.def("fused_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("fused_add_rms_norm_(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps) -> ()");
  m.def("gather_columns(Tensor x, Tensor perm) -> Tensor");
  m.def("gelu(Tensor x) -> Tensor");
  m.def("gelu_tanh_mul(Tensor gate_up) -> Tensor");
  m.def("gguf_dequantize(Tensor blocks, int type, ScalarType dtype) -> Tensor");
  m.def("gguf_linear(Tensor x, Tensor[] blocks, int[] types, Tensor? bias, str activation) -> Tensor");
  m.def("gguf_moe_linear(Tensor x, Tensor blocks, int type, Tensor topk_ids, str activation) -> Tensor");
  m.def("gguf_pack(Tensor blocks, int type) -> Tensor");
  m.def(
      "gptq_dequantize(Tensor qweight, Tensor qzeros, Tensor scales, Tensor? g_idx, int bits, int zero_offset, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "gptq_gemm(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, Tensor? g_idx, Tensor? bias, int bits, "
      "int zero_offset) -> Tensor");
  m.def(
      "gptq_moe_gemm(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, Tensor? g_idx, Tensor? bias, "
      "Tensor sorted_token_ids, Tensor block_ids, Tensor total_post_pad, Tensor? topk_weights, int top_k, "
      "int block_size, int bits, int zero_offset) -> Tensor");
  m.def(
      "int4_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
      "int out_features, int group_size, str activation) -> Tensor");
  m.def("int4_pack(Tensor qweight, Tensor? perm, int in_features) -> Tensor");
  m.def("int4_unpack(Tensor packed, Tensor? perm, int in_features, int out_features) -> Tensor");
  m.def(
      "int8_linear(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int out_features, int group_size, "
      "str activation) -> Tensor");
  m.def("kv_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_lens) -> ()");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor");
  m.def(
      "marlin_dequantize_out(Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? expert_offsets, "
      "int group_size, int bits, bool interleaved, Tensor(a!) out) -> ()");
  m.def(
      "marlin_gemm(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
      "Tensor(a!) workspace, int out_features, int group_size, int bits, str reduction, int max_sms) -> Tensor");
  m.def(
      "marlin_moe_gemm(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
      "Tensor sorted_token_ids, Tensor block_ids, Tensor total_post_pad, Tensor? topk_weights, Tensor(a!) workspace, "
      "int top_k, int block_size, int out_features, int group_size, int bits, str epilogue, str reduction, "
      "int max_sms, int slots) -> Tensor");
  m.def("marlin_permute_scales(Tensor scales, int in_features, int group_size) -> Tensor");
  m.def("marlin_repack(Tensor qweight, Tensor? perm, int in_features, int out_features, int bits) -> Tensor");
  m.def("marlin_repack_zeros(Tensor qzeros, int out_features, int bits, int zero_offset) -> Tensor");
  m.def("marlin_unpack(Tensor packed, Tensor? perm, int in_features, int out_features, int bits) -> Tensor");
  m.def("marlin_unpermute_scales(Tensor scales, int in_features, int group_size) -> Tensor");
  m.def(
      "moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, bool pair_ids, Tensor? expert_map) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("moe_build_pairs_by_token(Tensor topk_ids, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def("moe_combine(Tensor packed, Tensor pairs_by_token, Tensor topk_weights) -> Tensor");
  m.def("moe_compute_ids_tpe(Tensor topk_ids, int num_experts, int[] out_features) -> (Tensor, Tensor, Tensor)");
  m.def(
      "moe_experts_gguf(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor gate, Tensor up, Tensor down, "
      "int[] types, str activation) -> Tensor");
  m.def(
      "moe_experts_int4(Tensor hidden, Tensor topk_ids, Tensor topk_weights, "
      "Tensor w13, Tensor w13_scales, Tensor? w13_zeros, Tensor? w13_perm, int w13_group_size, "
      "Tensor w2, Tensor w2_scales, Tensor? w2_zeros, Tensor? w2_perm, int w2_group_size, "
      "int intermediate_size, str activation) -> Tensor");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor cu_seqlens_q, "
      "Tensor kv_lens, float scale, bool causal=True, int window=0, Tensor? k_scale=None, Tensor? v_scale=None) "
      "-> Tensor");
  m.def("paged_kv_write_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slot_mapping) -> ()");
  m.def(
      "paged_kv_write_int8_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scale, Tensor(d!) v_scale, Tensor k, "
      "Tensor v, Tensor slot_mapping) -> ()");
  m.def(
      "qk_norm_rope(Tensor x, Tensor? norm_weight, Tensor cos, Tensor sin, Tensor? positions, float eps, "
      "bool interleaved=False) -> Tensor");
  m.def("repetition_penalty_(Tensor(a!) logits, Tensor ids, Tensor offsets, Tensor penalty) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "route_topk_align(Tensor logits, int top_k, bool renormalize, int block_size) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("route_topk_softmax(Tensor logits, int top_k, bool renormalize) -> (Tensor, Tensor)");
  m.def("router_topk_softmax(Tensor x, Tensor weight, int top_k, bool renormalize) -> (Tensor, Tensor, Tensor)");
  m.def("scaled_add_(Tensor(a!) dst, Tensor src, float scale) -> ()");
  m.def("silu_mul(Tensor gate_up) -> Tensor");
  m.def("silu_mul.gate_up(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_mul_out(Tensor gate_up, int in_row, Tensor(a!) out, int out_row, int rows) -> ()");
  m.def(
      "split_qkv(Tensor(a) qkv, int num_heads, int num_kv_heads, int head_dim) "
      "-> (Tensor(a), Tensor(a), Tensor(a))");
  m.def(
      "split_qkv_norm_rope(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
      "Tensor? positions, int num_heads, int num_kv_heads, int head_dim, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "split_qkv_norm_rope_paged_(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
      "Tensor? positions, int num_heads, int num_kv_heads, int head_dim, float eps, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor slot_mapping) -> Tensor");
  m.def("transpose_head_to_token(Tensor(a) x) -> Tensor(a)");
  m.def("transpose_token_to_head(Tensor(a) x) -> Tensor(a)");
  m.def("weighted_sum(Tensor slots, Tensor weights) -> Tensor");
  m.def("weighted_sum_residual_(Tensor(a!) residual, Tensor slots, Tensor weights) -> ()");
  m.def(
      "weighted_sum_residual_norm_(Tensor(a!) residual, Tensor slots, Tensor weights, Tensor norm_weight, "
      "Tensor(b!) out, float eps) -> ()");
}
