// The kernels of the norm family. No torch here.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu {

// Rows of `size` elements; strides are in elements. Without a residual both of its pointers are null. An output may be
// the input of the same name.
struct NormRows {
  const void* x;
  const void* residual;
  const void* weight;
  void* out;
  void* residual_out;
  int64_t x_stride, residual_stride, out_stride, residual_out_stride;
  int64_t size;
  float eps;
  Dtype dtype;
  bool float_weight;
};

FERRUM_DECLARE_LEVELS(void norm_rows(const NormRows& rows, int64_t begin, int64_t end);)

}  // namespace ferrum::cpu
