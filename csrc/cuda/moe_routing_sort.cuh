// Stable counting sort of the (token, slot) pairs by expert, bit-identical from run to run.
//
// A chunk of pairs is ranked by one block: each warp takes consecutive pairs, 32 at a time, ranks those of one expert
// among each other by a vote and counts them in a table of its own in shared memory. So the order needs no atomic.
// Up to 4096 pairs of up to 1024 experts are one chunk: one launch. Beyond, three: count each chunk, find where each
// chunk's pairs of each expert start, rank again and write.
#pragma once

#include "checks/moe_routing.h"
#include "cuda/reduce.cuh"

namespace ferrum::cuda {

constexpr int kSteps = 4;  // pairs of a thread
constexpr int kMaxWarps = 32;
constexpr int64_t kOneBlockPairs = kSteps * 32 * kMaxWarps;
constexpr size_t kTableBytes = kMostSharedBytes;

struct Pairs {
  const int32_t* ids;
  const int32_t* expert_map;  // null without one
  int64_t count;
  int32_t num_experts;
  int steps;  // pairs of a thread, at most kSteps

  __device__ __forceinline__ int64_t index(int64_t first, int step) const {
    return first + (threadIdx.x / 32 * steps + step) * 32 + threadIdx.x % 32;
  }

  // -1 for a pair without an expert.
  __device__ __forceinline__ int32_t expert_of(int64_t pair) const {
    int32_t id = pair < count ? ids[pair] : -1;
    id = id >= 0 && id < num_experts ? id : -1;
    if (expert_map != nullptr && id >= 0) {
      id = expert_map[id];
      id = id >= 0 && id < num_experts ? id : -1;
    }
    return id;
  }
};

// The pairs of a thread.
struct Ranked {
  int32_t expert[kSteps];
  int32_t rank[kSteps];  // among the pairs of that expert in the chunk
};

// Ranks the pairs of the chunk that starts at `first`. `table` holds [warps, num_experts] counts; `totals`
// [num_experts], in shared or device memory or null, receives the pairs of each expert.
__device__ inline Ranked rank_chunk(const Pairs& pairs, int64_t first, uint16_t* table, int32_t* totals) {
  const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const int32_t experts = pairs.num_experts;
  Ranked ranked;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {  // all ids are on their way before one is waited for
    ranked.expert[step] = step < pairs.steps ? pairs.expert_of(pairs.index(first, step)) : -1;
    ranked.rank[step] = 0;
  }
  for (unsigned i = threadIdx.x; i < warps * experts; i += blockDim.x) {
    table[i] = 0;
  }
  __syncthreads();

  uint16_t* const counts = table + warp * experts;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step >= pairs.steps) {
      continue;
    }
    const int32_t expert = ranked.expert[step];
    const unsigned peers = __match_any_sync(kFullWarp, expert);
    const unsigned before = peers & ((1u << lane) - 1);
    const int32_t earlier = expert < 0 ? 0 : counts[expert];
    ranked.rank[step] = earlier + __popc(before);
    __syncwarp();
    if (expert >= 0 && before == 0) {
      counts[expert] = static_cast<uint16_t>(earlier + __popc(peers));
    }
    __syncwarp();
  }
  __syncthreads();

  for (int32_t expert = static_cast<int32_t>(threadIdx.x); expert < experts; expert += blockDim.x) {
    int32_t sum = 0;
    for (unsigned i = 0; i < warps; ++i) {
      const uint16_t count = table[i * experts + expert];
      table[i * experts + expert] = static_cast<uint16_t>(sum);
      sum += count;
    }
    if (totals != nullptr) {
      totals[expert] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (ranked.expert[step] >= 0) {
      ranked.rank[step] += counts[ranked.expert[step]];
    }
  }
  return ranked;
}

// Sets all entries to the number of pairs, before some are written over: by all blocks of a launch.
__device__ inline void write_padding(const Pairs& pairs, int32_t* entries, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    entries[i] = static_cast<int32_t>(pairs.count);
  }
}

// Where the pairs of each expert start when every expert is padded to whole blocks. Outputs may be null.
struct Starts {
  const int32_t* totals;  // [chunks, num_experts] pairs of each chunk and expert
  int32_t* first;         // [chunks, num_experts] where they start
  int32_t* offsets;       // [num_experts + 1] where each expert starts, and where the last one ends
  int32_t* end;           // [1] the same end
  int64_t chunks;
  int32_t num_experts, block_size;
};

// By one block, for all of whose threads it is complete when it returns.
__device__ inline void find_starts(const Starts& starts, int32_t* scratch) {
  const int32_t experts = starts.num_experts, block_size = starts.block_size;
  int32_t end = 0;  // of the experts so far
  for (int32_t tile = 0; tile < experts; tile += blockDim.x) {
    const int32_t expert = tile + static_cast<int32_t>(threadIdx.x);
    int32_t count = 0;
    for (int64_t chunk = 0; expert < experts && chunk < starts.chunks; ++chunk) {
      count += starts.totals[chunk * experts + expert];
    }
    const auto padded = block_running_sum((count + block_size - 1) / block_size * block_size, scratch);
    int32_t start = end + padded.exclusive;
    end += padded.total;
    if (expert < experts && starts.offsets != nullptr) {
      starts.offsets[expert] = start;
    }
    for (int64_t chunk = 0; expert < experts && starts.first != nullptr && chunk < starts.chunks; ++chunk) {
      starts.first[chunk * experts + expert] = start;
      start += starts.totals[chunk * experts + expert];
    }
    if (threadIdx.x == 0 && starts.offsets != nullptr) {
      starts.offsets[experts] = end;
    }
    if (threadIdx.x == 0 && starts.end != nullptr) {
      *starts.end = end;
    }
    __syncthreads();
  }
}

struct SortConfig {
  int warps, steps;
  int64_t chunks;
  bool one_launch;
};

// One block, of a thread for each pair and each expert as far as a block goes, for what it can hold. Else chunks of as
// many warps as have room for their tables; no warps where not even one has.
constexpr SortConfig pick_sort_config(int64_t pairs, int64_t num_experts) {
  if (pairs <= kOneBlockPairs && num_experts <= kMaxExperts) {
    const int64_t wanted = ((pairs > num_experts ? pairs : num_experts) + 31) / 32;
    const int warps = wanted < kMaxWarps ? static_cast<int>(wanted) : kMaxWarps;
    return {warps, static_cast<int>((pairs + 32 * warps - 1) / (32 * warps)), 1, true};
  }
  int warps = kMaxWarps;
  while (warps > 0 && warps * num_experts * sizeof(uint16_t) > kTableBytes) {
    warps /= 2;
  }
  const int64_t chunk = warps > 0 ? 32 * warps * kSteps : 1;
  return {warps, kSteps, (pairs + chunk - 1) / chunk, false};
}
static_assert(pick_sort_config(8, 128).warps == 4 && pick_sort_config(8, 128).steps == 1);
static_assert(pick_sort_config(4096, 128).warps == 32 && pick_sort_config(4096, 128).steps == 4);
static_assert(pick_sort_config(4096, 128).one_launch && pick_sort_config(0, 1).one_launch);
static_assert(!pick_sort_config(4097, 128).one_launch && pick_sort_config(4097, 128).chunks == 2);
static_assert(!pick_sort_config(1, 1025).one_launch && pick_sort_config(1, 49152).warps == 1);
static_assert(pick_sort_config(1, 49153).warps == 0);
// The tables and, of one launch, two arrays of the experts.
static_assert(kMaxExperts * (kMaxWarps * sizeof(uint16_t) + 2 * sizeof(int32_t)) <= kTableBytes);

inline SortConfig check_sort(const char* op, int64_t pairs, int64_t num_experts) {
  const SortConfig config = pick_sort_config(pairs, num_experts);
  FERRUM_CHECK(config.warps > 0, op, "num_experts", "expected at most ", kTableBytes / sizeof(uint16_t),
               " on CUDA, got ", num_experts);
  return config;
}

inline Pairs pairs_of(const Tensor& topk_ids, int64_t num_experts, const int32_t* expert_map,
                      const SortConfig& config) {
  return {data<int32_t>(topk_ids), expert_map, topk_ids.numel(), static_cast<int32_t>(num_experts), config.steps};
}

inline Grid grid_of(const SortConfig& config, int64_t num_experts) {
  const int64_t arrays = config.one_launch ? 2 * sizeof(int32_t) : 0;
  return {dim3(static_cast<unsigned>(config.chunks)), dim3(32 * config.warps),
          static_cast<size_t>(num_experts * (arrays + config.warps * sizeof(uint16_t)))};
}

// ---- what both ops launch (moe_routing_pairs.cu)

// Entries that are set to the number of pairs while the chunks are counted; null: none.
struct Padding {
  int32_t* entries;
  int64_t count;
};

// The first two of three launches: `starts.totals` from the pairs, the rest of `starts` from its totals.
void launch_starts(const Stream& stream, const SortConfig& config, const Pairs& pairs, int32_t* totals,
                   const Starts& starts, const Padding& padding);

struct PackedRows {
  int32_t* pairs_by_token;
  int32_t* packed_token_idx;  // null: not wanted
  int32_t* expert_offsets;
  int64_t top_k;
};

// All launches of moe_build_pairs_by_token; scratch is made like `like`.
void launch_packed_rows(const Stream& stream, const SortConfig& config, const Pairs& pairs, const Tensor& like,
                        const PackedRows& out);

}  // namespace ferrum::cuda
