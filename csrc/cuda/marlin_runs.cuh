// The codes of a unit of the Marlin layout, 16 rows x 64 columns, between the order in which they are stored and runs
// of eight neighbouring columns of a row.
//
// As stored, lane 4 c + q of a warp holds columns c + 8 c' of tiles j = 0 ... 3, rows 2 q + l + 8 h (c', l, h = 0, 1):
// for each tile eight codes, one for each p = (l, c', h) of 4 bits or (c', l, h) of 8, the last digit varying fastest.
// Two transpositions, in either order, make runs of them and runs into them:
//   of the eight lanes of one q, c with p: the lane then has the row and the half of each tile that p = c says, and its
//     eight codes are the columns of that half;
//   of the four lanes of one c, q with j: the lane then has tile q alone, and word s the rows that lane s had.
#pragma once

#include "cuda/ptx.cuh"

namespace ferrum::cuda {

// The runs that a lane holds: eight columns from 8 * column_run on, in rows row(0) ... row(3) of the unit.
template <int Bits>
struct MarlinRuns {
  int column_run, first_row;

  __device__ __forceinline__ explicit MarlinRuns(int lane) {
    const int p = lane / 4, half = Bits == 4 ? p / 2 % 2 : p / 4, low = Bits == 4 ? p / 4 : p / 2 % 2;
    column_run = 2 * (lane % 4) + half;
    first_row = low + 8 * (p % 2);
  }

  __device__ __forceinline__ int row(int s) const { return first_row + 2 * s; }
};

constexpr int kSelect = (0xf0 & 0xcc) | (~0xf0 & 0xaa & 0xff);  // where a is set b, else c

// The upper lane of a pair keeps `upper` and has the other's in place of `lower`; the lower one the other way round.
__device__ __forceinline__ void swap_with_pair(uint32_t& lower, uint32_t& upper, int lanes) {
  const bool is_upper = (threadIdx.x & lanes) != 0;
  const uint32_t received = __shfl_xor_sync(0xffffffffu, is_upper ? lower : upper, lanes);
  lower = is_upper ? received : lower;
  upper = is_upper ? upper : received;
}

// The same of the lower and upper parts of each pair of neighbouring parts of a word, of 16, 8 or 4 bits.
template <int PartBits>
__device__ __forceinline__ void swap_parts_with_pair(uint32_t& word, int lanes) {
  const bool is_upper = (threadIdx.x & lanes) != 0;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, word, lanes);
  if constexpr (PartBits == 16) {
    word = prmt(word, other, is_upper ? 0x3276 : 0x5410);
  } else if constexpr (PartBits == 8) {
    word = prmt(word, other, is_upper ? 0x3715 : 0x6240);
  } else {
    word = lop3<kSelect>(is_upper ? 0xf0f0f0f0u : 0x0f0f0f0fu, word, is_upper ? other >> 4 : other << 4);
  }
}

// Words of 4 bits: of each tile one. Of 8 bits: two, of the lower and the upper four values of p or of the columns.
template <int Bits>
__device__ __forceinline__ void transpose_columns(uint32_t (&words)[Bits]) {
  if constexpr (Bits == 8) {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      swap_with_pair(words[2 * tile], words[2 * tile + 1], 16);
    }
  }
#pragma unroll
  for (int i = 0; i < Bits; ++i) {
    if constexpr (Bits == 4) {
      swap_parts_with_pair<16>(words[i], 16);
      swap_parts_with_pair<8>(words[i], 8);
      swap_parts_with_pair<4>(words[i], 4);
    } else {
      swap_parts_with_pair<16>(words[i], 8);
      swap_parts_with_pair<8>(words[i], 4);
    }
  }
}

template <int Bits>
__device__ __forceinline__ void transpose_tiles(uint32_t (&words)[Bits]) {
  constexpr int kTile = Bits / 4;  // words of a tile
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    swap_with_pair(words[i], words[2 * kTile + i], 2);
    swap_with_pair(words[kTile + i], words[3 * kTile + i], 2);
    swap_with_pair(words[i], words[kTile + i], 1);
    swap_with_pair(words[2 * kTile + i], words[3 * kTile + i], 1);
  }
}

// A lane's words of a unit are Bits / 4 pieces of 16 bytes.
template <int Bits>
__device__ __forceinline__ void load_unit(const uint4* unit, uint32_t (&words)[Bits]) {
#pragma unroll
  for (int i = 0; i < Bits / 4; ++i) {
    const uint4 piece = unit[threadIdx.x % 32 * (Bits / 4) + i];
    words[4 * i] = piece.x;
    words[4 * i + 1] = piece.y;
    words[4 * i + 2] = piece.z;
    words[4 * i + 3] = piece.w;
  }
}

template <int Bits>
__device__ __forceinline__ void store_unit(uint4* unit, const uint32_t (&words)[Bits]) {
#pragma unroll
  for (int i = 0; i < Bits / 4; ++i) {
    unit[threadIdx.x % 32 * (Bits / 4) + i] =
        make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }
}

}  // namespace ferrum::cuda
