// Ops of other families that the halves of a decoder layer are made of, defined in the files of those families.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace ferrum::cpu {

using torch::stable::Tensor;

Tensor attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_lens, double scale,
                 bool causal, int64_t window);
std::tuple<Tensor, Tensor> fused_add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                              double eps);
Tensor gguf_linear(const Tensor& x, std::vector<Tensor> blocks, std::vector<int64_t> types, std::optional<Tensor> bias,
                   std::string activation);
Tensor int4_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, std::optional<Tensor> zeros,
                   std::optional<Tensor> perm, std::optional<Tensor> bias, int64_t out_features, int64_t group_size,
                   std::string activation);
void kv_append_(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& cache_lens);
Tensor moe_experts_gguf(const Tensor& hidden, const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& gate,
                        const Tensor& up, const Tensor& down, std::vector<int64_t> types, std::string activation);
Tensor moe_experts_int4(const Tensor& hidden, const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& w13,
                        const Tensor& w13_scales, std::optional<Tensor> w13_zeros, std::optional<Tensor> w13_perm,
                        int64_t w13_group_size, const Tensor& w2, const Tensor& w2_scales,
                        std::optional<Tensor> w2_zeros, std::optional<Tensor> w2_perm, int64_t w2_group_size,
                        int64_t intermediate_size, std::string activation);
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
std::tuple<Tensor, Tensor, Tensor> router_topk_softmax(const Tensor& x, const Tensor& weight, int64_t top_k,
                                                       bool renormalize);
std::tuple<Tensor, Tensor, Tensor> split_qkv_norm_rope(const Tensor& qkv, const std::optional<Tensor>& q_weight,
                                                       const std::optional<Tensor>& k_weight, const Tensor& cos,
                                                       const Tensor& sin, const std::optional<Tensor>& positions,
                                                       int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                                       double eps);

}  // namespace ferrum::cpu
