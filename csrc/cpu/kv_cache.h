// The kernels of the kv_cache family. No torch here.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu {

// Keys or values of `tokens` tokens, `heads` heads of `head_dim` elements each,
// and the int8 pool they go to: codes [slots, heads, head_dim] with one scale
// per slot and head. Strides of x are in elements.
struct QuantizedRows {
  const void* x;
  int8_t* codes;
  float* scales;
  int64_t token_stride, head_stride;
  int64_t heads, head_dim;
  Dtype dtype;
};

// Quantises one token into one slot of the pool.
FERRUM_DECLARE_LEVELS(void quantize_token(const QuantizedRows& rows, int64_t token, int64_t slot);)

}  // namespace ferrum::cpu
