// The kernels of the combine family. No torch here.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu {

// Weighted sums of `top_k` rows per token; strides are in elements.
struct WeightedRows {
  const void* rows;
  // [tokens * top_k] row of each pair, skipped outside [0, num_rows); null: rows by token and slot
  const int32_t* pairs;
  const float* weights;               // [tokens, top_k]
  void* out;                          // the sums, or what they are added to
  int64_t num_rows, row_stride;       // with pairs
  int64_t token_stride, slot_stride;  // without
  int64_t out_stride;
  int64_t top_k, size;
  Dtype dtype;
};

// RMS norm of the updated rows, to contiguous rows.
struct NormOfSums {
  const void* weight;
  void* out;
  float eps;
  bool float_weight;
};

FERRUM_DECLARE_LEVELS(
    // out = sum
    void combine_tokens(const WeightedRows& sums, int64_t begin, int64_t end);
    // out = out + sum
    void add_tokens(const WeightedRows& sums, int64_t begin, int64_t end);
    // The same, and norm.out = the norm of the sum before it is rounded. `scratch` holds one row.
    void add_norm_tokens(const WeightedRows& sums, const NormOfSums& norm, float* scratch, int64_t begin, int64_t end);)

}  // namespace ferrum::cpu
