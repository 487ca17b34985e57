#include "cpu/moe_combine.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "checks/moe_combine.h"
#include "cpu/allocate.h"

namespace ferrum::cpu {
namespace {

void run(void (*kernel)(const WeightedRows&, int64_t, int64_t), const WeightedRows& sums, int64_t tokens) {
  torch::stable::parallel_for(0, tokens, rows_per_task((sums.top_k + 1) * sums.size),
                              [&](int64_t begin, int64_t end) { kernel(sums, begin, end); });
}

WeightedRows rows_of(const SumArguments& a, const Tensor& rows, const Tensor& weights) {
  WeightedRows sums{};
  sums.rows = rows.const_data_ptr();
  sums.num_rows = a.num_rows;
  sums.row_stride = a.row_stride;
  sums.token_stride = a.token_stride;
  sums.slot_stride = a.slot_stride;
  sums.weights = data<float>(weights);
  sums.out_stride = a.size;
  sums.top_k = a.top_k;
  sums.size = a.size;
  sums.dtype = a.dtype;
  return sums;
}

Tensor moe_combine(const Tensor& packed, const Tensor& pairs_by_token, const Tensor& topk_weights) {
  const SumArguments a = check_combine(packed, pairs_by_token, topk_weights);
  Tensor out = allocate(packed, {a.tokens, a.size});
  WeightedRows sums = rows_of(a, packed, topk_weights);
  sums.pairs = data<int32_t>(pairs_by_token);
  sums.out = out.mutable_data_ptr();
  run(FERRUM_FOR_LEVEL(combine_tokens), sums, a.tokens);
  return out;
}

Tensor weighted_sum(const Tensor& slots, const Tensor& weights) {
  const SumArguments a = check_slots("weighted_sum", slots, weights);
  Tensor out = allocate(slots, {a.tokens, a.size});
  WeightedRows sums = rows_of(a, slots, weights);
  sums.out = out.mutable_data_ptr();
  run(FERRUM_FOR_LEVEL(combine_tokens), sums, a.tokens);
  return out;
}

WeightedRows rows_into(const Tensor& residual, const SumArguments& a, const Tensor& slots, const Tensor& weights) {
  WeightedRows sums = rows_of(a, slots, weights);
  sums.out = residual.mutable_data_ptr();
  sums.out_stride = residual.stride(0);
  return sums;
}

void weighted_sum_residual_(const Tensor& residual, const Tensor& slots, const Tensor& weights) {
  const char* op = "weighted_sum_residual_";
  const SumArguments a = check_slots(op, slots, weights);
  check_sum_residual(op, residual, slots, a);
  run(FERRUM_FOR_LEVEL(add_tokens), rows_into(residual, a, slots, weights), a.tokens);
}

void weighted_sum_residual_norm_(const Tensor& residual, const Tensor& slots, const Tensor& weights,
                                 const Tensor& norm_weight, const Tensor& out, double eps) {
  const char* op = "weighted_sum_residual_norm_";
  const SumArguments a = check_slots(op, slots, weights);
  check_sum_residual(op, residual, slots, a);
  NormOfSums norm{};
  norm.float_weight = check_sum_norm(op, residual, slots, norm_weight, out, a);
  norm.weight = norm_weight.const_data_ptr();
  norm.out = out.mutable_data_ptr();
  norm.eps = static_cast<float>(eps);
  const WeightedRows sums = rows_into(residual, a, slots, weights);
  const auto kernel = FERRUM_FOR_LEVEL(add_norm_tokens);
  torch::stable::parallel_for(0, a.tokens, rows_per_task((a.top_k + 2) * a.size), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(a.size));
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
