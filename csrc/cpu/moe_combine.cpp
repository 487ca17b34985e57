#include "cpu/moe_combine.h"

#include <torch/csrc/stable/library.h>

#include "cpu/norm_rows.h"

namespace ferrum::cpu {
namespace {

void run(const WeightedRows& sums, int64_t tokens) {
  const auto kernel = FERRUM_FOR_LEVEL(combine_tokens);
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
  run(sums, tokens);
  return out;
}

Tensor weighted_sum(const Tensor& slots, const Tensor& weights) {
  const char* op = "weighted_sum";
  WeightedRows sums{};
  sums.dtype = activation_dtype(op, "slots", slots);
  FERRUM_CHECK(slots.dim() == 3, op, "slots", "expected shape (tokens, top_k, hidden), got ", shape_string(slots));
  check_last_contiguous(op, "slots", slots);
  check_weights(op, "weights", weights);
  check_shape(op, "weights", weights, {slots.size(0), slots.size(1)});
  sums.top_k = slots.size(1);
  sums.size = slots.size(2);
  Tensor out = torch::stable::new_empty(slots, {slots.size(0), sums.size});
  sums.rows = slots.const_data_ptr();
  sums.token_stride = slots.stride(0);
  sums.slot_stride = slots.stride(1);
  sums.weights = data<float>(weights);
  sums.out = out.mutable_data_ptr();
  run(sums, slots.size(0));
  return out;
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("moe_combine", TORCH_BOX(&ferrum::cpu::moe_combine));
  m.impl("weighted_sum", TORCH_BOX(&ferrum::cpu::weighted_sum));
}
