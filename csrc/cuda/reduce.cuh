// Sums over a warp and over the threads of one row of a block, in an order that does not depend on timing.
#pragma once

#include "cuda/launch.h"

namespace ferrum::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// The sum over the threadIdx.x of each threadIdx.y, in every one of its threads. blockDim.x is a multiple of 32; every
// thread of the block takes part. `scratch` holds one float per warp of the block and may be reused after a barrier.
__device__ __forceinline__ float row_sum(float value, float* scratch) {
  value = warp_sum(value);
  const unsigned warps = blockDim.x / 32;
  if (warps == 1) {
    return value;
  }
  float* const sums = scratch + threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = value;
  }
  __syncthreads();
  float total = 0.0f;
  for (unsigned i = 0; i < warps; ++i) {
    total += sums[i];
  }
  return total;
}

}  // namespace ferrum::cuda
