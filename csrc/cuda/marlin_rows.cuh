// Rows of a grouped product that no block of entries names, and the sums of those that make one row of the result.
#pragma once

#include "cuda/marlin_product.cuh"

namespace ferrum::cuda {

// named[i] = whether a block with an expert names row first + i, for i < count <= kMarlinNamedRows.
__device__ inline void find_named_rows(const MarlinRows& rows, int64_t first, int count, unsigned char* named) {
  __syncthreads();  // nobody still reads what lay there
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    named[i] = 0;
  }
  __syncthreads();
  constexpr int kAhead = 8;  // loads under way: all of a list of 1024 entries, of 16 tokens
  const unsigned entries =
      static_cast<unsigned>(min(rows.entries, max(static_cast<int64_t>(*rows.used_entries), int64_t{0})));
#pragma unroll 1
  for (unsigned start = threadIdx.x; start < entries; start += kAhead * blockDim.x) {
    int32_t ids[kAhead], experts[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const unsigned entry = start + j * blockDim.x;
      ids[j] = entry < entries ? rows.sorted_ids[entry] : -1;
      experts[j] = entry < entries ? rows.block_ids[entry / rows.block_size] : -1;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (ids[j] >= first && ids[j] < first + count && rows.names(ids[j], experts[j])) {
        named[ids[j] - first] = 1;
      }
    }
  }
  __syncthreads();
}

// Zeros in rows `first` ... of the result that no block with an expert names. `named`: kMarlinNamedRows bytes.
template <typename T>
__device__ void zero_unnamed_rows(const MarlinProduct<T>& p, int64_t first, unsigned char* named) {
  const int count = static_cast<int>(min(p.rows.count - first, static_cast<int64_t>(kMarlinNamedRows)));
  find_named_rows(p.rows, first, count, named);
  for (int i = threadIdx.x / 32; i < count; i += blockDim.x / 32) {
    for (int64_t c = threadIdx.x % 32; named[i] == 0 && c < p.out_features; c += 32) {
      p.out[(first + i) * p.out_features + c] = from_float<T>(0.0f);
    }
  }
}

// Four columns of a token: its slots that are named, in ascending order.
template <typename T>
__device__ __forceinline__ void sum_slots(const MarlinProduct<T>& p, int64_t token, int64_t column,
                                          const unsigned char* named, float (&total)[4]) {
  constexpr int kAhead = 8;  // loads under way: as many as a token has slots in common models
  const float* const from = p.slot_sums + token * p.slots * p.slot_stride + column;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    total[i] = 0.0f;
  }
#pragma unroll 1
  for (int first = 0; first < p.slots; first += kAhead) {
    uint4 words[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      words[j] = make_uint4(0, 0, 0, 0);
      if (first + j < p.slots && named[first + j] != 0) {
        words[j] = load_uncached(reinterpret_cast<const uint4*>(from + (first + j) * p.slot_stride));
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      total[0] += __uint_as_float(words[j].x);
      total[1] += __uint_as_float(words[j].y);
      total[2] += __uint_as_float(words[j].z);
      total[3] += __uint_as_float(words[j].w);
    }
  }
}

// A tile of columns of all rows of the result, from rows of the product that other blocks wrote. `named`:
// kMarlinNamedRows bytes.
template <typename T, typename Shape>
__device__ __forceinline__ void sum_columns(const MarlinProduct<T>& p, int column_tile, unsigned char* named) {
  const int quads = (p.silu_mul ? Shape::kColumns / 2 : Shape::kColumns) / 4, at_once = kMarlinNamedRows / p.slots;
  const int64_t tokens = p.rows.count / p.slots;
#pragma unroll 1
  for (int64_t first = 0; first < tokens; first += at_once) {
    const int count = static_cast<int>(min(tokens - first, static_cast<int64_t>(at_once)));
    find_named_rows(p.rows, first * p.slots, count * p.slots, named);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * quads; i += Shape::kThreads) {
      const int64_t token = first + i / quads, column = (static_cast<int64_t>(column_tile) * quads + i % quads) * 4;
      if (column < p.out_features) {
        float total[4];
        sum_slots(p, token, column, named + i / quads * p.slots, total);
        store_pair(p.out, p.out_features, token, column, total[0], total[1]);
        store_pair(p.out, p.out_features, token, column + 2, total[2], total[3]);
      }
    }
  }
}

// Called by every block that has finished a tile of tokens, of which there are `token_tiles`: the last one of a tile of
// columns adds up the slots. Whoever that is, it adds them in one order.
template <typename T, typename Shape>
__device__ __forceinline__ void sum_if_last(const MarlinProduct<T>& p, int column_tile, int token_tiles,
                                            unsigned char* shared, int* is_last) {
  __syncthreads();  // the block's rows are written, its flag has been read
  if (threadIdx.x == 0) {
    *is_last = count_arrival(p.slot_counters + column_tile) == token_tiles - 1;
  }
  __syncthreads();
  if (*is_last != 0) {
    sum_columns<T, Shape>(p, column_tile, shared);
    if (threadIdx.x == 0) {
      p.slot_counters[column_tile] = 0;
    }
  }
}

}  // namespace ferrum::cuda
