// The dtypes of activations. No torch here.
#pragma once

#include <cstdint>

namespace ferrum {

enum class Dtype : int { float32, float16, bfloat16 };

constexpr int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace ferrum
