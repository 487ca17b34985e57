// Sums, maxima and running sums over a warp and over a block, in an order that does not depend on timing. Every thread
// of the block takes part, and the block has a multiple of 32 threads. `scratch` is shared memory, one element for each
// warp; it may be used again after a barrier.
#pragma once

#include "cuda/launch.h"

namespace ferrum::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// Of numbers and NaNs, the largest number.
template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// The sum over lanes 0 ... this one.
template <typename T>
__device__ __forceinline__ T warp_inclusive_sum(T value) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned offset = 1; offset < 32; offset *= 2) {
    const T before = __shfl_up_sync(kFullWarp, value, offset);
    value += lane >= offset ? before : T(0);
  }
  return value;
}

// The sum over the threadIdx.x of each threadIdx.y, in every one of its threads. blockDim.x is a multiple of 32.
template <typename T>
__device__ __forceinline__ T row_sum(T value, T* scratch) {
  value = warp_sum(value);
  const unsigned warps = blockDim.x / 32;
  if (warps == 1) {
    return value;
  }
  T* const sums = scratch + threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = value;
  }
  __syncthreads();
  T total(0);
  for (unsigned i = 0; i < warps; ++i) {
    total += sums[i];
  }
  return total;
}

// The same for the maximum.
template <typename T>
__device__ __forceinline__ T row_max(T value, T* scratch) {
  value = warp_max(value);
  const unsigned warps = blockDim.x / 32;
  if (warps == 1) {
    return value;
  }
  T* const maxima = scratch + threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) {
    maxima[threadIdx.x / 32] = value;
  }
  __syncthreads();
  T best = maxima[0];
  for (unsigned i = 1; i < warps; ++i) {
    best = max(best, maxima[i]);
  }
  return best;
}

template <typename T>
struct RunningSum {
  T exclusive;  // over the threads before this one
  T total;      // over all
};

// Running sum over the threads of a one-dimensional block.
template <typename T>
__device__ __forceinline__ RunningSum<T> block_running_sum(T value, T* scratch) {
  const T inclusive = warp_inclusive_sum(value);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (lane == 31) {
    scratch[warp] = inclusive;
  }
  const T left = __shfl_up_sync(kFullWarp, inclusive, 1);
  __syncthreads();
  T before(0), total(0);
  for (unsigned i = 0; i < warps; ++i) {
    const T sum = scratch[i];
    before += i < warp ? sum : T(0);
    total += sum;
  }
  return {before + (lane > 0 ? left : T(0)), total};
}

}  // namespace ferrum::cuda
