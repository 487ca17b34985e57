// The kernels of the rope family. No torch here.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu {

// Heads of `head_dim` elements; strides are in elements. The output is contiguous [tokens, heads, head_dim].
struct HeadsRope {
  const void* x;
  const void* weight;  // null: no norm
  void* out;
  const float* cos;
  const float* sin;
  const void* positions;  // null: token t takes row t
  int64_t token_stride, head_stride, cos_stride, sin_stride;
  int64_t heads, head_dim;
  int64_t half;  // pairs that are rotated; elements from 2 * half on are not
  float eps;
  Dtype dtype;
  bool float_weight, long_positions, interleaved;
};

// Norm and rotation of every head of the tokens [begin, end).
FERRUM_DECLARE_LEVELS(void rope_tokens(const HeadsRope& heads, int64_t begin, int64_t end);)

}  // namespace ferrum::cpu
