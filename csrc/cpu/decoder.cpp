// The halves of a decoder layer over int4-packed weights and over GGUF blocks: ops of the other families, called one
// after the other without Python and the dispatcher between them.
#include "cpu/decoder.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks/rows.h"
#include "cpu/allocate.h"
#include "cpu/decoder_sum.h"

namespace ferrum::cpu {
namespace {

// multiply_qkv and multiply_o: rows and the columns of the product -> the product.
template <typename MultiplyQkv, typename MultiplyO>
Tensor attention_half(const char* op, const Tensor& hidden, const Tensor& norm_weight, double eps,
                      const MultiplyQkv& multiply_qkv, const std::optional<Tensor>& q_weight,
                      const std::optional<Tensor>& k_weight, const Tensor& cos, const Tensor& sin,
                      const std::optional<Tensor>& positions, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& cache_lens, double scale, const MultiplyO& multiply_o, int64_t num_heads) {
  check_shape(op, "hidden", hidden, {-1, -1});
  FERRUM_CHECK(k_cache.dim() == 4 && k_cache.size(0) >= 1, op, "k_cache",
               "expected shape (batch, kv_heads, capacity, head_dim) with a batch of at least 1, got ",
               shape_string(k_cache));
  const int64_t tokens = hidden.size(0), batch = k_cache.size(0), kv_heads = k_cache.size(1);
  const int64_t head_dim = k_cache.size(3), length = tokens / batch;
  FERRUM_CHECK(tokens % batch == 0, op, "hidden", "expected as many tokens for each of ", batch, " sequences, got ",
               tokens);
  FERRUM_CHECK(num_heads >= 1, op, "num_heads", "expected at least 1, got ", num_heads);
  const Tensor normed = rms_norm(hidden, norm_weight, eps);
  const Tensor heads = multiply_qkv(normed, (num_heads + 2 * kv_heads) * head_dim);
  const auto [query, key, value] =
      split_qkv_norm_rope(heads, q_weight, k_weight, cos, sin, positions, num_heads, kv_heads, head_dim, eps);
  const auto of_sequences = [&](const Tensor& t) { return reshaped(t, {batch, length, t.size(1), head_dim}); };
  kv_append_(k_cache, v_cache, of_sequences(key), of_sequences(value), cache_lens);
  Tensor kv_lens = allocate(cache_lens, {batch});
  for (int64_t b = 0; b < batch; ++b) {
    mutable_data<int32_t>(kv_lens)[b] = data<int32_t>(cache_lens)[b] + static_cast<int32_t>(length);
  }
  const Tensor attended = attention(of_sequences(query), k_cache, v_cache, kv_lens, scale, /*causal=*/true, 0);
  return multiply_o(reshaped(attended, {tokens, num_heads * head_dim}), hidden.size(1));
}

// run_experts: rows, ids and weights -> the sums over each token's experts, in a tensor of their own.
template <typename RunExperts>
Tensor experts_half(const char* op, const Tensor& attended, const Tensor& residual, const Tensor& norm_weight,
                    double eps, const Tensor& router_weight, int64_t top_k, bool renormalize,
                    const RunExperts& run_experts) {
  check_shape(op, "attended", attended, {-1, -1});
  const Dtype dtype = activation_dtype(op, "attended", attended);
  const auto [normed, sum] = fused_add_rms_norm(attended, residual, norm_weight, eps);
  const auto [logits, ids, weights] = router_topk_softmax(normed, router_weight, top_k, renormalize);
  Tensor out = run_experts(normed, ids, weights);
  void* const to = out.mutable_data_ptr();
  const void* const from = sum.const_data_ptr();
  const auto kernel = FERRUM_FOR_LEVEL(add_to);
  torch::stable::parallel_for(0, out.numel(), rows_per_task(1),
                              [&](int64_t begin, int64_t end) { kernel(to, from, dtype, begin, end); });
  return out;
}

// gguf_linear, whose blocks alone say how many columns there are.
Tensor gguf_product(const char* op, const char* name, const Tensor& rows, const std::vector<Tensor>& blocks,
                    const std::vector<int64_t>& types, const std::string& activation, int64_t columns) {
  Tensor out = gguf_linear(rows, blocks, types, std::nullopt, activation);
  FERRUM_CHECK(out.size(1) == columns, op, name, "expected ", columns, " rows of weights, got ", out.size(1));
  return out;
}

Tensor decoder_attention_gguf_(const Tensor& hidden, const Tensor& norm_weight, double eps, std::vector<Tensor> qkv,
                               std::vector<int64_t> qkv_types, std::optional<Tensor> q_weight,
                               std::optional<Tensor> k_weight, const Tensor& cos, const Tensor& sin,
                               std::optional<Tensor> positions, Tensor k_cache, Tensor v_cache,
                               const Tensor& cache_lens, double scale, std::vector<Tensor> o,
                               std::vector<int64_t> o_types, int64_t num_heads, std::string activation) {
  const char* op = "decoder_attention_gguf_";
  const auto multiply_qkv = [&](const Tensor& rows, int64_t columns) {
    return gguf_product(op, "qkv", rows, qkv, qkv_types, activation, columns);
  };
  const auto multiply_o = [&](const Tensor& rows, int64_t columns) {
    return gguf_product(op, "o", rows, o, o_types, activation, columns);
  };
  return attention_half(op, hidden, norm_weight, eps, multiply_qkv, q_weight, k_weight, cos, sin, positions, k_cache,
                        v_cache, cache_lens, scale, multiply_o, num_heads);
}

Tensor decoder_attention_int4_(const Tensor& hidden, const Tensor& norm_weight, double eps, const Tensor& qkv,
                               const Tensor& qkv_scales, std::optional<Tensor> qkv_zeros,
                               std::optional<Tensor> qkv_perm, std::optional<Tensor> qkv_bias, int64_t qkv_group_size,
                               std::optional<Tensor> q_weight, std::optional<Tensor> k_weight, const Tensor& cos,
                               const Tensor& sin, std::optional<Tensor> positions, Tensor k_cache, Tensor v_cache,
                               const Tensor& cache_lens, double scale, const Tensor& o, const Tensor& o_scales,
                               std::optional<Tensor> o_zeros, std::optional<Tensor> o_perm,
                               std::optional<Tensor> o_bias, int64_t o_group_size, int64_t num_heads,
                               std::string activation) {
  const auto multiply_qkv = [&](const Tensor& rows, int64_t columns) {
    return int4_linear(rows, qkv, qkv_scales, qkv_zeros, qkv_perm, qkv_bias, columns, qkv_group_size, activation);
  };
  const auto multiply_o = [&](const Tensor& rows, int64_t columns) {
    return int4_linear(rows, o, o_scales, o_zeros, o_perm, o_bias, columns, o_group_size, activation);
  };
  return attention_half("decoder_attention_int4_", hidden, norm_weight, eps, multiply_qkv, q_weight, k_weight, cos, sin,
                        positions, k_cache, v_cache, cache_lens, scale, multiply_o, num_heads);
}

Tensor decoder_experts_gguf(const Tensor& attended, const Tensor& residual, const Tensor& norm_weight, double eps,
                            const Tensor& router_weight, int64_t top_k, bool renormalize, const Tensor& gate,
                            const Tensor& up, const Tensor& down, std::vector<int64_t> types, std::string activation) {
  return experts_half("decoder_experts_gguf", attended, residual, norm_weight, eps, router_weight, top_k, renormalize,
                      [&](const Tensor& rows, const Tensor& ids, const Tensor& weights) {
                        return moe_experts_gguf(rows, ids, weights, gate, up, down, types, activation);
                      });
}

Tensor decoder_experts_int4(const Tensor& attended, const Tensor& residual, const Tensor& norm_weight, double eps,
                            const Tensor& router_weight, int64_t top_k, bool renormalize, const Tensor& w13,
                            const Tensor& w13_scales, std::optional<Tensor> w13_zeros, std::optional<Tensor> w13_perm,
                            int64_t w13_group_size, const Tensor& w2, const Tensor& w2_scales,
                            std::optional<Tensor> w2_zeros, std::optional<Tensor> w2_perm, int64_t w2_group_size,
                            int64_t intermediate_size, std::string activation) {
  return experts_half("decoder_experts_int4", attended, residual, norm_weight, eps, router_weight, top_k, renormalize,
                      [&](const Tensor& rows, const Tensor& ids, const Tensor& weights) {
                        return moe_experts_int4(rows, ids, weights, w13, w13_scales, w13_zeros, w13_perm,
                                                w13_group_size, w2, w2_scales, w2_zeros, w2_perm, w2_group_size,
                                                intermediate_size, activation);
                      });
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("decoder_attention_gguf_", TORCH_BOX(&ferrum::cpu::decoder_attention_gguf_));
  m.impl("decoder_attention_int4_", TORCH_BOX(&ferrum::cpu::decoder_attention_int4_));
  m.impl("decoder_experts_gguf", TORCH_BOX(&ferrum::cpu::decoder_experts_gguf));
  m.impl("decoder_experts_int4", TORCH_BOX(&ferrum::cpu::decoder_experts_int4));
}
