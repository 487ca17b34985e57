// The kernel of marlin_gemm and marlin_moe_gemm, and its launch. A source of its own makes the instances of each dtype
// and width of codes: they take the compiler long.
#pragma once

#include "cuda/marlin_rows.cuh"
#include "cuda/marlin_tile.cuh"

namespace ferrum::cuda {

// The tile's rows of the result and of x, -1 where it has none; returns its expert, -1 where it has no row at all.
template <typename T, typename Shape>
__device__ __forceinline__ int find_rows(const MarlinProduct<T>& p, int token_tile, int* rows, int* sources) {
  int row = -1, source = -1, expert = 0;
  const int thread = threadIdx.x;
  if (!p.rows.grouped()) {
    const int64_t at = static_cast<int64_t>(token_tile) * Shape::kTokens + thread;
    if (thread < Shape::kTokens && at < p.rows.count) {
      row = source = static_cast<int>(at);
    }
  } else {
    // Three numbers that do not wait for each other, as weights and tokens wait for them.
    const int block = token_tile / p.tiles_of_block;
    const int in_block = token_tile % p.tiles_of_block * Shape::kTokens + thread;
    const int64_t entry = static_cast<int64_t>(block) * p.rows.block_size + in_block;
    const bool listed = thread < Shape::kTokens && in_block < p.rows.block_size && entry < p.rows.entries;
    const int32_t id = listed ? p.rows.sorted_ids[entry] : -1, used = *p.rows.used_entries;
    expert = p.rows.block_ids[block];
    if (entry < used && p.rows.names(id, expert)) {
      row = id;
      source = p.rows.by_entry ? static_cast<int>(entry) : id / p.rows.top_k;
    }
  }
  if (thread < Shape::kTokens) {
    rows[thread] = row;
    sources[thread] = source;
  }
  return __syncthreads_or(row >= 0) != 0 ? expert : -1;
}

// Tiles of tokens up to the end of the list of blocks; at least one, or nobody would clear the sums over slots.
template <typename T>
__device__ __forceinline__ int used_token_tiles(const MarlinProduct<T>& p) {
  if (!p.rows.grouped()) {
    return p.token_tiles;
  }
  const int64_t used = min(static_cast<int64_t>(*p.rows.used_entries), p.rows.entries);
  const int blocks = static_cast<int>((used + p.rows.block_size - 1) / p.rows.block_size);
  return max(blocks * p.tiles_of_block, 1);
}

// Calls f(token, column) for the thread's share of a tile: columns + {0, 1, 8, 9}.
template <typename Shape, typename F>
__device__ __forceinline__ void for_each_share(F&& f) {
#pragma unroll 1
  for (int i = threadIdx.x; i < Shape::kTokens * Shape::kColumns / 4; i += Shape::kThreads) {
    const int in_row = i % (Shape::kColumns / 4);
    f(i / (Shape::kColumns / 4), in_row / 4 * 16 + in_row % 4 * 2);
  }
}

// The place of a share among the partial sums: four numbers, of float32 or rounded.
template <typename T>
struct Partial {
  const MarlinProduct<T>& p;

  __device__ __forceinline__ void add(int64_t at, const float (&sum)[4]) const {
    if (p.reduction == MarlinReduction::atomic) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        add_to(static_cast<float*>(p.partials) + at + i, sum[i]);
      }
    } else if (p.reduction == MarlinReduction::rounded) {
      store(static_cast<T*>(p.partials) + at, sum);
    } else {
      store(static_cast<float*>(p.partials) + at, sum);
    }
  }

  __device__ __forceinline__ void get(int64_t at, float (&sum)[4]) const {
    if (p.reduction == MarlinReduction::rounded) {
      const uint2 words = load_uncached(reinterpret_cast<const uint2*>(static_cast<const T*>(p.partials) + at));
      load(reinterpret_cast<const T*>(&words), sum);
    } else {
      const uint4 words = load_uncached(reinterpret_cast<const uint4*>(static_cast<const float*>(p.partials) + at));
      load(reinterpret_cast<const float*>(&words), sum);
    }
  }
};

// From the sums of the warps to the result. The last of several splits adds them all up in their order. Returns whether
// the tile is finished.
template <typename T, typename Shape>
__device__ __forceinline__ bool finish_tile(const MarlinProduct<T>& p, const MarlinPlace& place, const int* rows,
                                            const float* sums, int* is_last) {
  const int first_column = place.column_tile * Shape::kColumns;
  const auto sum_of_warps = [&](int token, int column, float (&sum)[4]) {
    sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
#pragma unroll
    for (int w = 0; w < Shape::kDepthWarps; ++w) {
      const float* const from = sums + (w * Shape::kTokens + token) * Shape::kSumStride + column;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] += from[i % 2 + 8 * (i / 2)];
      }
    }
  };
  const auto inside = [&](int token, int column) {
    return rows[token] >= 0 && first_column + column < p.units * kMarlinUnit;
  };
  if (p.splits == 1) {
    for_each_share<Shape>([&](int token, int column) {
      if (inside(token, column)) {
        float sum[4];
        sum_of_warps(token, column, sum);
        finish(p, place.expert, rows[token], first_column + column, sum);
      }
    });
    return true;
  }
  const int tile = place.token_tile + p.token_tiles * place.column_tile;
  const int slots = p.reduction == MarlinReduction::atomic ? 1 : p.splits;
  const auto place_of = [&](int slot, int token, int column) {
    const int64_t row = (static_cast<int64_t>(tile) * slots + slot) * Shape::kTokens + token;
    return row * Shape::kColumns + column / 16 * 16 + column % 8 * 2;
  };
  const Partial<T> partial{p};
  for_each_share<Shape>([&](int token, int column) {
    if (inside(token, column)) {
      float sum[4];
      sum_of_warps(token, column, sum);
      partial.add(place_of(slots == 1 ? 0 : place.split, token, column), sum);
    }
  });
  __syncthreads();
  if (threadIdx.x == 0) {
    *is_last = count_arrival(p.counters + tile) == p.splits - 1;
  }
  __syncthreads();
  if (*is_last == 0) {
    return false;
  }
  for_each_share<Shape>([&](int token, int column) {
    if (inside(token, column)) {
      float sum[4] = {};
      for (int slot = 0; slot < slots; ++slot) {
        float more[4];
        partial.get(place_of(slot, token, column), more);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[i] += more[i];
        }
      }
      finish(p, place.expert, rows[token], first_column + column, sum);
    }
  });
  if (threadIdx.x == 0) {
    p.counters[tile] = 0;
  }
  return true;
}

// This block's tiles one after another. `multiply(place, sources, first, last)` leaves in `shared`, for all threads,
// the sums of the stages before `last` from `first` on, with the rows `sources` of x.
template <typename T, int Bits, typename Shape, typename F>
__device__ __forceinline__ void walk_over_tiles(const MarlinProduct<T>& p, unsigned char* shared, F&& multiply) {
  __shared__ int rows[Shape::kTokens], sources[Shape::kTokens], is_last;
  const int stages = (p.steps + Shape::kSteps - 1) / Shape::kSteps, tiles = p.token_tiles * p.column_tiles * p.splits;
  const int block = static_cast<int>(blockIdx.x) - p.zero_blocks, blocks = static_cast<int>(gridDim.x) - p.zero_blocks;
  if (p.prefetch && block >= 0) {
    prefetch_weights<T, Bits, Shape>(p, block);
  }
  wait_for_previous_kernel();
  start_next_kernel();
  if (block < 0) {
    zero_unnamed_rows(p, static_cast<int64_t>(blockIdx.x) * kMarlinNamedRows, shared);
    return;
  }
#pragma unroll 1
  for (int tile = block; tile < tiles; tile += blocks) {
    MarlinPlace place = place_of_tile(p, tile);
    place.expert = find_rows<T, Shape>(p, place.token_tile, rows, sources);
    const int token_tiles = used_token_tiles(p);  // behind find_rows, whose loads would wait for it
    if (place.token_tile >= token_tiles) {
      break;
    }
    bool finished = place.split == 0;
    if (place.expert >= 0) {
      const int first = static_cast<int>(static_cast<int64_t>(stages) * place.split / p.splits);
      const int last = static_cast<int>(static_cast<int64_t>(stages) * (place.split + 1) / p.splits);
      multiply(place, sources, first, last);
      finished = finish_tile<T, Shape>(p, place, rows, reinterpret_cast<const float*>(shared), &is_last);
    }
    if (finished && p.slot_sums != nullptr) {
      sum_if_last<T, Shape>(p, place.column_tile, token_tiles, shared, &is_last);
    }
    __syncthreads();  // the next tile's rows and stages take their place
  }
}

template <typename T, int Bits, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) marlin_tiles(MarlinProduct<T> p) {
  FERRUM_DYNAMIC_SHARED(unsigned char, shared);
  walk_over_tiles<T, Bits, Shape>(p, shared, [&](const MarlinPlace& place, const int* sources, int first, int last) {
    float total[4][Shape::kWarpTiles][4] = {};
    MarlinFetcher<T, Bits, Shape> fetcher(p, place, sources, shared, first);
    const MarlinMultiplier<T, Bits, Shape> multiplier(p, place, shared);
    multiply_stages(fetcher, multiplier, first, last, total);
    __syncthreads();  // the sums take the place of stages that other warps may still read
    multiplier.store_sums(reinterpret_cast<float*>(shared), total);
    __syncthreads();
  });
}

// At most. A stage may begin and end within a group unless one is a multiple of the other.
constexpr int groups_in_stage(int steps, int group_steps) {
  return group_steps % steps == 0   ? 1
         : steps % group_steps == 0 ? steps / group_steps
                                    : (steps + group_steps - 2) / group_steps + 1;
}
static_assert(groups_in_stage(4, 8) == 1 && groups_in_stage(4, 1) == 4 && groups_in_stage(4, 3) == 2 &&
              groups_in_stage(8, 3) == 4 && groups_in_stage(4, 5) == 2 && groups_in_stage(8, 5) == 3);

// The grid for `p`, to which the sizes of the tiles are added. Stages lie at multiples of `alignment` bytes.
template <typename T, int Bits, typename Shape>
Grid grid_of_tiles(const MarlinConfig& config, MarlinProduct<T>& p, int alignment) {
  using Stage = MarlinStage<T, Bits, Shape>;
  const int scale_bytes = p.scales.dtype == Dtype::float32 ? 4 : 2;
  const int groups = p.inverse_group_steps == 0.0f ? 1 : groups_in_stage(Shape::kSteps, p.group_steps);
  const int group_bytes = Shape::kColumns * scale_bytes + (p.zeros != nullptr ? Stage::kZeroPieces * 16 : 0);
  p.stage_bytes = static_cast<int>(divide_up(Stage::kScales + groups * group_bytes, alignment)) * alignment;
  p.zeros_place = Stage::kScales + (p.inverse_group_steps == 0.0f ? 0 : groups * Shape::kColumns * scale_bytes);
  constexpr int kMostBytes = Stage::kScales + Shape::kSteps * (Shape::kColumns * 4 + Stage::kZeroPieces * 16);
  constexpr int kSumBytes = Shape::kDepthWarps * Shape::kTokens * Shape::kSumStride * static_cast<int>(sizeof(float));
  static_assert(Stage::kStages * kMostBytes <= kMostSharedBytes && kSumBytes <= kMostSharedBytes);
  p.token_tiles = static_cast<int>(config.token_tiles);
  p.column_tiles = static_cast<int>(config.column_tiles);
  p.splits = static_cast<int>(config.splits);
  p.read_once = config.read_once;
  p.tiles_of_block = static_cast<int>(divide_up(p.rows.block_size, Shape::kTokens));
  return {dim3(static_cast<unsigned>(config.blocks + p.zero_blocks)), dim3(Shape::kThreads),
          static_cast<size_t>(max(Stage::kStages * p.stage_bytes, kSumBytes))};
}

template <typename T, int Bits, typename Shape>
void launch_tiles(const Stream& stream, const MarlinConfig& config, MarlinProduct<T> p) {
  const Grid grid = grid_of_tiles<T, Bits, Shape>(config, p, 16);
  stream.launch_early(marlin_tiles<T, Bits, Shape>, grid, p);
}

template <typename T, int Bits>
void launch_marlin(const Stream& stream, const MarlinConfig& config, const MarlinProduct<T>& product) {
  switch (config.tile.tokens) {
    case 8:
      return launch_tiles<T, Bits, MarlinTile8>(stream, config, product);
    case 16:
      return launch_tiles<T, Bits, MarlinTile16>(stream, config, product);
    case 32:
      return launch_tiles<T, Bits, MarlinTile32>(stream, config, product);
    default:
      return launch_tiles<T, Bits, MarlinTile64>(stream, config, product);
  }
}

}  // namespace ferrum::cuda
