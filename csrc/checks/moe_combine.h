// Argument checks of the combine family.
#pragma once

#include "checks/rows.h"

namespace ferrum {

inline void check_pair_weights(const char* op, const char* name, const Tensor& weights) {
  check_dtype(op, name, weights, ScalarType::Float);
  FERRUM_CHECK(weights.dim() == 2, op, name, "expected shape (tokens, top_k), got ", shape_string(weights));
  check_contiguous(op, name, weights);
}

// Sums of `top_k` rows of `size` elements per token. Strides are in elements.
struct SumArguments {
  int64_t tokens, top_k, size;
  int64_t num_rows, row_stride;       // of rows picked by pairs
  int64_t token_stride, slot_stride;  // of rows by token and slot
  Dtype dtype;
};

inline SumArguments check_combine(const Tensor& packed, const Tensor& pairs_by_token, const Tensor& topk_weights) {
  const char* op = "moe_combine";
  SumArguments a{};
  a.dtype = activation_dtype(op, "packed", packed);
  FERRUM_CHECK(packed.dim() == 2, op, "packed", "expected shape (rows, hidden), got ", shape_string(packed));
  check_last_contiguous(op, "packed", packed);
  check_pair_weights(op, "topk_weights", topk_weights);
  a.tokens = topk_weights.size(0);
  a.top_k = topk_weights.size(1);
  check_dtype(op, "pairs_by_token", pairs_by_token, ScalarType::Int);
  check_shape(op, "pairs_by_token", pairs_by_token, {a.tokens * a.top_k});
  check_contiguous(op, "pairs_by_token", pairs_by_token);
  a.size = packed.size(1);
  a.num_rows = packed.size(0);
  a.row_stride = packed.stride(0);
  return a;
}

inline SumArguments check_slots(const char* op, const Tensor& slots, const Tensor& weights) {
  SumArguments a{};
  a.dtype = activation_dtype(op, "slots", slots);
  FERRUM_CHECK(slots.dim() == 3, op, "slots", "expected shape (tokens, top_k, hidden), got ", shape_string(slots));
  check_last_contiguous(op, "slots", slots);
  check_pair_weights(op, "weights", weights);
  check_shape(op, "weights", weights, {slots.size(0), slots.size(1)});
  a.tokens = slots.size(0);
  a.top_k = slots.size(1);
  a.size = slots.size(2);
  a.token_stride = slots.stride(0);
  a.slot_stride = slots.stride(1);
  return a;
}

// The residual that sums over `slots` are added to.
inline void check_sum_residual(const char* op, const Tensor& residual, const Tensor& slots, const SumArguments& a) {
  check_same_dtype(op, "residual", residual, slots);
  check_shape(op, "residual", residual, {a.tokens, a.size});
  check_last_contiguous(op, "residual", residual);
  check_rows_apart(op, "residual", residual, {residual.numel() == 0 ? 0 : a.tokens, a.size, residual.stride(0)});
}

// The norm of that residual. Returns whether its weight is float32 beside other activations.
inline bool check_sum_norm(const char* op, const Tensor& residual, const Tensor& slots, const Tensor& norm_weight,
                           const Tensor& out, const SumArguments& a) {
  const bool float_weight = check_weight(op, "norm_weight", norm_weight, slots, a.size);
  check_same_dtype(op, "out", out, slots);
  check_same_shape(op, "out", out, residual);
  check_contiguous(op, "out", out);
  FERRUM_CHECK(residual.numel() == 0 || residual.const_data_ptr() != out.const_data_ptr(), op, "out",
               "expected other memory than that of residual, got the same");
  return float_weight;
}

}  // namespace ferrum
