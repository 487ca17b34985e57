// The kernels of the sampling family. No torch here.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu {

// Rows of `size` logits; strides are in elements. A mask of bytes names the logits that may be chosen; null: all of
// them.
struct LogitRows {
  const void* logits;
  const uint8_t* mask;
  int64_t logits_stride, mask_stride;
  int64_t size;
  Dtype dtype;
};

// The largest finite value that may be chosen and the lowest index that holds it; -1 when there is none.
struct Largest {
  float value;
  int64_t index;
};

FERRUM_DECLARE_LEVELS(
    // Of columns [begin, end) of a row.
    Largest largest_of(const LogitRows& rows, int64_t row, int64_t begin, int64_t end);
    // v / penalty where v > 0, else v * penalty, for the finite v = logits[id]; ids are inside the row, may repeat and
    // count once. `values` is scratch of the same length.
    void penalize(void* logits, Dtype dtype, const int64_t* ids, int64_t count, float penalty, float* values);)

}  // namespace ferrum::cpu
