// What the kernels over the heads of tokens share: a group of lanes for each head, positions and slots.
#pragma once

#include "checks/integers.h"
#include "cuda/reduce.cuh"

namespace ferrum::cuda {

__device__ __forceinline__ int64_t integer_at(const Integers& integers, int64_t i) {
  return integers.is_long ? static_cast<const int64_t*>(integers.data)[i]
                          : static_cast<const int32_t*>(integers.data)[i];
}

// A block of `lanes` x `groups` threads: threadIdx.x of each threadIdx.y works on one head. `lanes` is a power of two
// up to 32 and the block is made of whole warps, so that a group lies inside a warp.
struct HeadsConfig {
  unsigned lanes, groups;
};

constexpr unsigned kHeadThreads = 128;

// `steps` is how often a single lane would have to load. Few heads go to blocks of one warp, to lie on as many
// multiprocessors as they can.
constexpr HeadsConfig pick_heads_config(int64_t heads, int64_t steps) {
  unsigned lanes = 1;
  while (lanes < 32 && lanes < steps) {
    lanes *= 2;
  }
  const unsigned threads = heads * lanes >= 128 * kHeadThreads ? kHeadThreads : 32;
  return {lanes, threads / lanes};
}
static_assert(pick_heads_config(40, 8).lanes == 8 && pick_heads_config(40, 8).groups == 4, "one token: 10 blocks");
static_assert(pick_heads_config(4096 * 40, 8).groups == 16);
static_assert(pick_heads_config(4096, 63).lanes == 32 && pick_heads_config(4096, 63).groups == 4);
static_assert(pick_heads_config(7, 0).lanes == 1 && pick_heads_config(7, 0).groups == 32);

inline Grid heads_grid(const char* op, const HeadsConfig& config, unsigned heads) {
  const int64_t blocks = (int64_t{heads} + config.groups - 1) / config.groups;
  return {dim3(narrow(op, "heads", blocks)), dim3(config.lanes, config.groups)};
}

// Over the lanes of a group. Every thread of the warp takes part.
__device__ __forceinline__ float group_sum(float value) {
  for (unsigned offset = blockDim.x / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

__device__ __forceinline__ unsigned group_max(unsigned value) {
  for (unsigned offset = blockDim.x / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

}  // namespace ferrum::cuda
