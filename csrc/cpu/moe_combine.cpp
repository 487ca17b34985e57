#include "cpu/moe_combine.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "checks/rows.h"

namespace ferrum::cpu {
namespace {

void run(void (*kernel)(const WeightedRows&, int64_t, int64_t), const WeightedRows& sums, int64_t tokens) {
  torch::stable::parallel_for(0, tokens, rows_per_task((sums.top_k + 1) * sums.size),
                              [&](int64_t begin, int64_t end) { kernel(sums, begin, end); });
}

void check_weights(const char* op, const char* name, const Tensor& weights) {
  check_dtype(op, name, weights, ScalarType::Float);
  FERRUM_CHECK(weights.dim() == 2, op, name, "expected shape (tokens, top_k), got ", shape_string(weights));
  check_contiguous(op, name, weights);
}

Tensor moe_combine(const Tensor& packed, const Tensor& pairs_by_token, const Tensor& topk_weights) {
  const char* op = "moe_combine";
  WeightedRows sums{};
  sums.dtype = activation_dtype(op, "packed", packed);
  FERRUM_CHECK(packed.dim() == 2, op, "packed", "expected shape (rows, hidden), got ", shape_string(packed));
  check_last_contiguous(op, "packed", packed);
  check_weights(op, "topk_weights", topk_weights);
  const int64_t tokens = topk_weights.size(0);
  sums.top_k = topk_weights.size(1);
  check_dtype(op, "pairs_by_token", pairs_by_token, ScalarType::Int);
  check_shape(op, "pairs_by_token", pairs_by_token, {tokens * sums.top_k});
  check_contiguous(op, "pairs_by_token", pairs_by_token);
  sums.size = packed.size(1);
  Tensor out = torch::stable::new_empty(packed, {tokens, sums.size});
  sums.rows = packed.const_data_ptr();
  sums.num_rows = packed.size(0);
  sums.row_stride = packed.stride(0);
  sums.pairs = data<int32_t>(pairs_by_token);
  sums.weights = data<float>(topk_weights);
  sums.out = out.mutable_data_ptr();
  sums.out_stride = sums.size;
  run(FERRUM_FOR_LEVEL(combine_tokens), sums, tokens);
  return out;
}

// Everything but the output of sums over `slots`.
WeightedRows check_slots(const char* op, const Tensor& slots, const Tensor& weights) {
  WeightedRows sums{};
  sums.dtype = activation_dtype(op, "slots", slots);
  FERRUM_CHECK(slots.dim() == 3, op, "slots", "expected shape (tokens, top_k, hidden), got ", shape_string(slots));
  check_last_contiguous(op, "slots", slots);
  check_weights(op, "weights", weights);
  check_shape(op, "weights", weights, {slots.size(0), slots.size(1)});
  sums.top_k = slots.size(1);
  sums.size = slots.size(2);
  sums.rows = slots.const_data_ptr();
  sums.token_stride = slots.stride(0);
  sums.slot_stride = slots.stride(1);
  sums.weights = data<float>(weights);
  return sums;
}

Tensor weighted_sum(const Tensor& slots, const Tensor& weights) {
  WeightedRows sums = check_slots("weighted_sum", slots, weights);
  Tensor out = torch::stable::new_empty(slots, {slots.size(0), sums.size});
  sums.out = out.mutable_data_ptr();
  sums.out_stride = sums.size;
  run(FERRUM_FOR_LEVEL(combine_tokens), sums, slots.size(0));
  return out;
}

WeightedRows check_residual(const char* op, const Tensor& residual, const Tensor& slots, const Tensor& weights) {
  WeightedRows sums = check_slots(op, slots, weights);
  check_same_dtype(op, "residual", residual, slots);
  check_shape(op, "residual", residual, {slots.size(0), sums.size});
  check_last_contiguous(op, "residual", residual);
  sums.out_stride = residual.stride(0);
  check_rows_apart(op, "residual", residual,
                   {residual.numel() == 0 ? 0 : residual.size(0), sums.size, sums.out_stride});
  sums.out = residual.mutable_data_ptr();
  return sums;
}

void weighted_sum_residual_(const Tensor& residual, const Tensor& slots, const Tensor& weights) {
  const WeightedRows sums = check_residual("weighted_sum_residual_", residual, slots, weights);
  run(FERRUM_FOR_LEVEL(add_tokens), sums, residual.size(0));
}

void weighted_sum_residual_norm_(const Tensor& residual, const Tensor& slots, const Tensor& weights,
                                 const Tensor& norm_weight, const Tensor& out, double eps) {
  const char* op = "weighted_sum_residual_norm_";
  const WeightedRows sums = check_residual(op, residual, slots, weights);
  NormOfSums norm{};
  norm.float_weight = check_weight(op, "norm_weight", norm_weight, slots, sums.size);
  check_same_dtype(op, "out", out, slots);
  check_same_shape(op, "out", out, residual);
  check_contiguous(op, "out", out);
  norm.weight = norm_weight.const_data_ptr();
  norm.out = out.mutable_data_ptr();
  norm.eps = static_cast<float>(eps);
  FERRUM_CHECK(residual.numel() == 0 || sums.out != norm.out, op, "out",
               "expected other memory than that of residual, got the same");
  const auto kernel = FERRUM_FOR_LEVEL(add_norm_tokens);
  torch::stable::parallel_for(0, residual.size(0), rows_per_task((sums.top_k + 2) * sums.size),
                              [&](int64_t begin, int64_t end) {
                                std::vector<float> scratch(static_cast<size_t>(sums.size));
                                kernel(sums, norm, scratch.data(), begin, end);
                              });
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("moe_combine", TORCH_BOX(&ferrum::cpu::moe_combine));
  m.impl("weighted_sum", TORCH_BOX(&ferrum::cpu::weighted_sum));
  m.impl("weighted_sum_residual_", TORCH_BOX(&ferrum::cpu::weighted_sum_residual_));
  m.impl("weighted_sum_residual_norm_", TORCH_BOX(&ferrum::cpu::weighted_sum_residual_norm_));
}
