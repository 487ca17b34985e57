// The halves of a decoder layer over int4-packed weights: ops of the other families, called one after the other without
// Python and the dispatcher between them.
#include "cpu/decoder.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks/rows.h"
#include "cpu/allocate.h"
#include "cpu/decoder_sum.h"

namespace ferrum::cpu {
namespace {

Tensor decoder_attention_int4_(const Tensor& hidden, const Tensor& norm_weight, double eps, const Tensor& qkv,
                               const Tensor& qkv_scales, std::optional<Tensor> qkv_zeros,
                               std::optional<Tensor> qkv_perm, std::optional<Tensor> qkv_bias, int64_t qkv_group_size,
                               std::optional<Tensor> q_weight, std::optional<Tensor> k_weight, const Tensor& cos,
                               const Tensor& sin, std::optional<Tensor> positions, Tensor k_cache, Tensor v_cache,
                               const Tensor& cache_lens, double scale, const Tensor& o, const Tensor& o_scales,
                               std::optional<Tensor> o_zeros, std::optional<Tensor> o_perm,
                               std::optional<Tensor> o_bias, int64_t o_group_size, int64_t num_heads,
                               std::string activation) {
  const char* op = "decoder_attention_int4_";
  check_shape(op, "hidden", hidden, {-1, -1});
  FERRUM_CHECK(k_cache.dim() == 4 && k_cache.size(0) >= 1, op, "k_cache",
               "expected shape (batch, kv_heads, capacity, head_dim) with a batch of at least 1, got ",
               shape_string(k_cache));
  const int64_t tokens = hidden.size(0), batch = k_cache.size(0), kv_heads = k_cache.size(1);
  const int64_t head_dim = k_cache.size(3), length = tokens / batch;
  FERRUM_CHECK(tokens % batch == 0, op, "hidden", "expected as many tokens for each of ", batch, " sequences, got ",
               tokens);
  FERRUM_CHECK(num_heads >= 1, op, "num_heads", "expected at least 1, got ", num_heads);
  const int64_t width = (num_heads + 2 * kv_heads) * head_dim;
  const Tensor normed = rms_norm(hidden, norm_weight, eps);
  const Tensor heads =
      int4_linear(normed, qkv, qkv_scales, qkv_zeros, qkv_perm, qkv_bias, width, qkv_group_size, activation);
  const auto [query, key, value] =
      split_qkv_norm_rope(heads, q_weight, k_weight, cos, sin, positions, num_heads, kv_heads, head_dim, eps);
  const auto of_sequences = [&](const Tensor& t) { return reshaped(t, {batch, length, t.size(1), head_dim}); };
  kv_append_(k_cache, v_cache, of_sequences(key), of_sequences(value), cache_lens);
  Tensor kv_lens = allocate(cache_lens, {batch});
  for (int64_t b = 0; b < batch; ++b) {
    mutable_data<int32_t>(kv_lens)[b] = data<int32_t>(cache_lens)[b] + static_cast<int32_t>(length);
  }
  const Tensor attended = attention(of_sequences(query), k_cache, v_cache, kv_lens, scale, /*causal=*/true, 0);
  return int4_linear(reshaped(attended, {tokens, num_heads * head_dim}), o, o_scales, o_zeros, o_perm, o_bias,
                     hidden.size(1), o_group_size, activation);
}

Tensor decoder_experts_int4(const Tensor& attended, const Tensor& residual, const Tensor& norm_weight, double eps,
                            const Tensor& router_weight, int64_t top_k, bool renormalize, const Tensor& w13,
                            const Tensor& w13_scales, std::optional<Tensor> w13_zeros, std::optional<Tensor> w13_perm,
                            int64_t w13_group_size, const Tensor& w2, const Tensor& w2_scales,
                            std::optional<Tensor> w2_zeros, std::optional<Tensor> w2_perm, int64_t w2_group_size,
                            int64_t intermediate_size, std::string activation) {
  const char* op = "decoder_experts_int4";
  check_shape(op, "attended", attended, {-1, -1});
  const Dtype dtype = activation_dtype(op, "attended", attended);
  const auto [normed, sum] = fused_add_rms_norm(attended, residual, norm_weight, eps);
  const auto [logits, ids, weights] = router_topk_softmax(normed, router_weight, top_k, renormalize);
  Tensor out = moe_experts_int4(normed, ids, weights, w13, w13_scales, w13_zeros, w13_perm, w13_group_size, w2,
                                w2_scales, w2_zeros, w2_perm, w2_group_size, intermediate_size, activation);
  void* const to = out.mutable_data_ptr();
  const void* const from = sum.const_data_ptr();
  const auto kernel = FERRUM_FOR_LEVEL(add_to);
  torch::stable::parallel_for(0, out.numel(), rows_per_task(1),
                              [&](int64_t begin, int64_t end) { kernel(to, from, dtype, begin, end); });
  return out;
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("decoder_attention_int4_", TORCH_BOX(&ferrum::cpu::decoder_attention_int4_));
  m.impl("decoder_experts_int4", TORCH_BOX(&ferrum::cpu::decoder_experts_int4));
}
