// What the kernels of a product in the Marlin layout are given, and the parts of a tile that do not multiply.
#pragma once

#include "common/marlin.h"
#include "cuda/marlin_config.cuh"
#include "cuda/ptx.cuh"
#include "cuda/vec.cuh"

namespace ferrum::cuda {

// Numbers of a dtype that is known at run time: read a few times in each tile.
struct Floats {
  const void* values = nullptr;  // null: there are none
  Dtype dtype = Dtype::float32;
};

template <int N>
__device__ __forceinline__ void load_floats(const void* values, Dtype dtype, int64_t at, float (&to)[N]) {
  switch (dtype) {
    case Dtype::float32:
      return load<N>(static_cast<const float*>(values) + at, to);
    case Dtype::float16:
      return load<N>(static_cast<const __half*>(values) + at, to);
    case Dtype::bfloat16:
      return load<N>(static_cast<const __nv_bfloat16*>(values) + at, to);
  }
}

__device__ __forceinline__ float load_float(const Floats& floats, int64_t at) {
  float value[1];
  load_floats(floats.values, floats.dtype, at, value);
  return value[0];
}

// Which rows of x meet which matrix: in blocks of entries, or without blocks all rows, in their order, the one matrix.
struct MarlinRows {
  const int32_t* sorted_ids = nullptr;  // [entries]: row of the result of each entry, padding outside [0, count)
  const int32_t* block_ids = nullptr;   // expert of every block_size entries
  const int32_t* used_entries = nullptr;
  int64_t entries = 0, count = 0;
  int block_size = 0;  // 0: no blocks
  int experts = 1, top_k = 1;
  bool by_entry = false;  // x has a row for each entry; else row / top_k of x belongs to a row of the result

  __host__ __device__ bool grouped() const { return block_size > 0; }

  // Whether an entry of an expert's block is a row of the result.
  __device__ __forceinline__ bool names(int32_t row, int32_t expert) const {
    return row >= 0 && row < count && expert >= 0 && expert < experts;
  }
};

// A row of K numbers of a matrix is `*_row` units of its type long, a matrix `*_expert`.
template <typename T>
struct MarlinProduct {
  const T* x;  // rows are aligned to 16 bytes
  int64_t x_stride;
  int in_features;
  const uint4* packed;
  int64_t packed_row, packed_expert;
  Floats scales;
  int64_t scales_row, scales_expert;
  const uint4* zeros;  // null: 2^(bits - 1)
  int64_t zeros_row, zeros_expert;
  Floats bias;
  int64_t bias_expert;
  const float* topk_weights;  // null: 1
  T* out;
  int64_t out_features;
  bool silu_mul;  // columns are runs of gate and up
  MarlinRows rows;
  int steps, units;           // of 16 rows and 64 columns
  int group_steps;            // of one group, more than there are
  float inverse_group_steps;  // 0: one group, whose scales lie in another order
  int token_tiles, column_tiles, splits, tiles_of_block;
  MarlinReduction reduction;
  void* partials;                // sums of the splits of each tile
  int32_t* counters;             // of the splits of each tile that are done; zero between launches
  int stage_bytes, zeros_place;  // of a stage; of the zero points in it
  bool read_once;                // the weights: no tile reads them again
  bool prefetch;                 // the first tile's weights, before the kernel that makes x is done
  int zero_blocks;               // that come first and clear the rows of the result that no tile writes
  int slots;                     // rows of the product of which one of the result is the sum
  float* slot_sums;              // [rows.count][slot_stride]: the rows of the product; null: one is a row of the result
  int64_t slot_stride;
  int32_t* slot_counters;  // of each tile of columns, whose token tiles are done; zero between launches

  __device__ __forceinline__ bool one_group() const { return inverse_group_steps == 0.0f; }
  // (step + 0.5) / group_steps is at least 0.5 / group_steps from an integer: exact below 2^21 steps.
  __device__ __forceinline__ int group_of(int step) const {
    return static_cast<int>((static_cast<float>(step) + 0.5f) * inverse_group_steps);
  }
};

constexpr int kMarlinNamedRows = 1024;  // of a grouped product, that a block of threads looks for at a time

// Two neighbouring columns of a row of `width` numbers.
template <typename U>
__device__ __forceinline__ void store_pair(U* rows, int64_t width, int64_t row, int64_t column, float x, float y) {
  U* const to = rows + row * width + column;
  if (width % 2 == 0) {
    if (column < width) {
      const float pair[2] = {x, y};
      store(to, pair);
    }
    return;
  }
  if (column < width) {
    to[0] = from_float<U>(x);
  }
  if (column + 1 < width) {
    to[1] = from_float<U>(y);
  }
}

// Sums of columns `column` + {0, 1, 8, 9} of the product, column % 16 being even and below 8, become what they are in
// a row of the result, or unrounded of the product.
template <typename T>
__device__ __forceinline__ void finish(const MarlinProduct<T>& p, int expert, int64_t row, int column,
                                       float (&sum)[4]) {
  if (p.one_group() && p.steps > 0) {  // runs of 32: column 8 b + 2 a + c lies at 8 a + 2 b + c
    const int64_t at = expert * p.scales_expert + column / 32 * 32 + column % 8 * 4 + column % 32 / 8 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] *= load_float(p.scales, at + i);
    }
  }
  const int64_t width =
      p.silu_mul ? (p.out_features + kMarlinGateRun - 1) / kMarlinGateRun * 2 * kMarlinGateRun : p.out_features;
  if (p.bias.values != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = column + i % 2 + 8 * (i / 2);
      sum[i] += at < width ? load_float(p.bias, expert * p.bias_expert + at) : 0.0f;
    }
  }
  if (p.silu_mul) {
    sum[0] = sum[0] / (1.0f + expf(-sum[0])) * sum[2];
    sum[1] = sum[1] / (1.0f + expf(-sum[1])) * sum[3];
  }
  const float weight = p.topk_weights != nullptr ? p.topk_weights[row] : 1.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[i] *= weight;
  }
  const auto store_at = [&](int64_t at, float x, float y) {
    if (p.slot_sums != nullptr) {
      store_pair(p.slot_sums, p.slot_stride, row, at, x, y);
    } else {
      store_pair(p.out, p.out_features, row, at, x, y);
    }
  };
  if (p.silu_mul) {
    return store_at(column / 16 * 8 + column % 8, sum[0], sum[1]);
  }
  store_at(column, sum[0], sum[1]);
  store_at(column + 8, sum[2], sum[3]);
}

// One launch: every tile and, of a grouped product, the rows that no tile writes.
template <typename T, int Bits>
void launch_marlin(const Stream& stream, const MarlinConfig& config, const MarlinProduct<T>& product);

}  // namespace ferrum::cuda
