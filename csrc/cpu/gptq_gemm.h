// The gptq_gemm kernels. No torch here.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu {

// out = x @ w + bias with w as in a checkpoint; see ferrum_ops/formats/gptq.py
// for the words.
struct GptqGemm {
  const float* x;  // [ceil(in_features / kGptqTileRows), rows, kGptqTileRows]: see gptq_pack_x
  int64_t rows;
  const int32_t* qweight;
  const int32_t* qzeros;
  const void* scales;
  const int32_t* g_idx;  // group of each in-feature, all inside [0, groups)
  const void* bias;      // or null
  void* out;             // rows of out_features
  int64_t in_features, out_features, groups;
  int64_t zero_words;  // per group in qzeros
  int64_t bits;
  bool zeros_less_one;  // qzeros hold zero - 1
  Dtype scale_dtype, bias_dtype, out_dtype;
};

// In-features of one tile of weights, a multiple of every packing period.
constexpr int64_t kGptqTileRows = 64;

// One task computes a block of columns for a block of rows. The width is a
// multiple of every packing period, so that a block starts on a word of qzeros.
// Zero points and scales of a block, a tile of weights in fp32 and the sums of
// all its rows stay in a core's own caches.
constexpr int64_t kGptqBlockColumns = 64;
constexpr int64_t kGptqBlockRows = 192;

// Floats of scratch that one task needs.
inline int64_t gptq_scratch_floats(int64_t groups) {
  return (2 * groups + kGptqTileRows + kGptqBlockRows) * kGptqBlockColumns;
}

FERRUM_DECLARE_LEVELS(
    // Rows [begin, end), at most kGptqBlockRows, and kGptqBlockColumns columns
    // from `column` on. A row's result depends on nothing but the row: each
    // weight is formed in fp32, sums run over ascending in-features in runs of
    // 64 that are added up in order, whatever else is in the batch.
    void gptq_gemm_block(const GptqGemm& gemm, int64_t column, int64_t begin, int64_t end, float* scratch);
    // One row of x to fp32, cut into runs of kGptqTileRows, each behind the
    // same run of the row before: read by columns, rows that lie a power of two
    // apart would fall on the same cache lines.
    void gptq_pack_x(const void* x, Dtype dtype, int64_t in_features, int64_t row, int64_t rows, float* packed);)

}  // namespace ferrum::cpu
