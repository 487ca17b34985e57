// The kernels of the combine family. No torch here.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu {

// Weighted sums of `top_k` rows per token; strides are in elements. The output is contiguous [tokens, size].
struct WeightedRows {
  const void* rows;
  const int32_t*
      pairs;  // [tokens * top_k] row of each pair, skipped outside [0, num_rows); null: rows by token and slot
  const float* weights;  // [tokens, top_k]
  void* out;
  int64_t num_rows, row_stride;       // with pairs
  int64_t token_stride, slot_stride;  // without
  int64_t top_k, size;
  Dtype dtype;
};

FERRUM_DECLARE_LEVELS(void combine_tokens(const WeightedRows& sums, int64_t begin, int64_t end);)

}  // namespace ferrum::cpu
