// Floats as unsigned integers of the same order, which one warp instruction (redux, sm_80) can compare.
#pragma once

#include "cuda/launch.h"

namespace ferrum::cuda {

constexpr float kLargestFloat = 3.402823466e+38f;

// a < b exactly where ordered(a) < ordered(b); -0 equals 0. Finite numbers lie from 0x00800000 to 0xff7fffff.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

}  // namespace ferrum::cuda
