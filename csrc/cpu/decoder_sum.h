// The kernel of the decoder family. No torch here.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu {

// to[i] += from[i] for i in [begin, end), summed in float32 and rounded once.
FERRUM_DECLARE_LEVELS(void add_to(void* to, const void* from, Dtype dtype, int64_t begin, int64_t end);)

}  // namespace ferrum::cpu
