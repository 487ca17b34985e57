// The kernels of the activation family. No torch here.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu {

// Rows of `size` elements; strides are in elements.
struct GatedRows {
  const void* gate;
  const void* up;
  void* out;
  int64_t gate_stride, up_stride, out_stride;
  int64_t size;
  Dtype dtype;
};

// out = silu(gate) * up, out = gelu_tanh(gate) * up
FERRUM_DECLARE_LEVELS(void silu_mul_rows(const GatedRows& rows, int64_t begin, int64_t end);
                      void gelu_tanh_mul_rows(const GatedRows& rows, int64_t begin, int64_t end);)

using GatedKernel = void (*)(const GatedRows&, int64_t, int64_t);

}  // namespace ferrum::cpu
