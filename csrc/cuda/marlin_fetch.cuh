// The stages of a tile in shared memory, and the copies that fill them.
#pragma once

#include "cuda/marlin_product.cuh"

namespace ferrum::cuda {

constexpr int log2_of(int power) { return power > 1 ? 1 + log2_of(power / 2) : 0; }

template <int Tile, int TokenWarps, int ColumnWarps, int DepthWarps, int Blocks>
struct MarlinTileShape {
  static constexpr int kTokens = kMarlinTiles[Tile].tokens, kColumns = kMarlinTiles[Tile].columns;
  static constexpr int kSteps = kMarlinTiles[Tile].depth / kMarlinStep;  // of a stage
  static constexpr int kTokenWarps = TokenWarps, kColumnWarps = ColumnWarps, kDepthWarps = DepthWarps;
  static constexpr int kThreads = 32 * TokenWarps * ColumnWarps * DepthWarps;
  static constexpr int kBlocks = Blocks;                       // whose registers a multiprocessor has
  static constexpr int kWarpTiles = kTokens / TokenWarps / 8;  // of 8 tokens
  static constexpr int kWarpSteps = kSteps / DepthWarps;
  static constexpr int kRowPieces = kSteps * kMarlinStep / 8;  // of 16 bytes, of a token in a stage
  static constexpr int kXBytes = kTokens * kRowPieces * 16;
  static constexpr int kSumStride = kColumns + 4;  // lanes of a store lie in different banks
  static_assert(kColumns == kMarlinUnit * ColumnWarps && kSteps % DepthWarps == 0 && kTokens <= kThreads);
  static_assert(kTokens * kRowPieces % kThreads == 0 && kThreads % kRowPieces == 0);
};

using MarlinTile8 = MarlinTileShape<0, 1, 1, 4, 4>;
using MarlinTile16 = MarlinTileShape<1, 1, 2, 2, 3>;
using MarlinTile32 = MarlinTileShape<2, 1, 2, 2, 2>;
using MarlinTile64 = MarlinTileShape<3, 2, 4, 1, 1>;

template <typename T, int Bits, typename Shape>
struct MarlinStage {
  static constexpr int kStages = Bits == 8 ? 3 : 4;  // as 8-bit ones are twice as large
  static constexpr int kUnitPieces = 8 * Bits;       // of 16 bytes, of 16 x 64 codes
  static constexpr int kStepPieces = kUnitPieces * Shape::kColumnWarps;
  static constexpr int kPackedBytes = Shape::kSteps * kStepPieces * 16;
  static constexpr int kScales = kPackedBytes + Shape::kXBytes;  // where scales start; zeros lie behind them
  static constexpr int kZeroPieces = Bits / 2 * Shape::kColumnWarps;
  static constexpr int kZeroShift = log2_of(kZeroPieces), kHalfShift = log2_of(8 * Shape::kColumnWarps);  // of rows
  static_assert(Shape::kThreads % kStepPieces == 0);

  // A stage of 8-bit codes has two pieces for each lane, which lie apart, and the second ones turned by four lanes:
  // eight lanes that write or read at once find different banks.
  __device__ static __forceinline__ int place_of(int piece) {
    return Bits == 4 ? piece : piece % 2 * 32 + (piece / 2 ^ piece % 2 * 4);
  }
  // Pieces of a token change places by the token: so do those of the eight rows of an ldmatrix.
  __device__ static __forceinline__ int x_place(int token, int piece) {
    return (token * Shape::kRowPieces + (piece ^ token % 8)) * 16;
  }
};

// Where a tile lies, for all threads of its block.
struct MarlinPlace {
  int token_tile, column_tile, split, expert;
};

// Tiles of the same weights run at the same time: the second-level cache has them for all but the first. Those of a
// grouped product follow its list of blocks, so that all behind the end of the list come last.
template <typename T>
__device__ __forceinline__ MarlinPlace place_of_tile(const MarlinProduct<T>& p, int tile) {
  if (p.rows.grouped()) {
    return {tile / (p.column_tiles * p.splits), tile / p.splits % p.column_tiles, tile % p.splits, 0};
  }
  return {tile % p.token_tiles, tile / p.token_tiles % p.column_tiles, tile / (p.token_tiles * p.column_tiles), 0};
}

// What one thread copies of each stage in turn.
template <typename T, int Bits, typename Shape>
class MarlinFetcher {
  using Stage = MarlinStage<T, Bits, Shape>;
  static constexpr int kStepsAtOnce = Shape::kThreads / Stage::kStepPieces;
  static constexpr int kTokensAtOnce = Shape::kThreads / Shape::kRowPieces;
  static constexpr int kXPieces = Shape::kTokens / kTokensAtOnce;
  static constexpr int kDepth = Shape::kSteps * kMarlinStep;

 public:
  __device__ __forceinline__ MarlinFetcher(const MarlinProduct<T>& p, const MarlinPlace& place, const int* sources,
                                           unsigned char* shared, int first)
      : p_(p), shared_(shared), stage_(first), policy_(weights_policy(p.read_once)) {
    const int piece = threadIdx.x % Stage::kStepPieces, unit = piece / Stage::kUnitPieces;
    const int step = threadIdx.x / Stage::kStepPieces, units = p.units - place.column_tile * Shape::kColumnWarps;
    packed_ = p.packed + place.expert * p.packed_expert + (first * Shape::kSteps + step) * p.packed_row +
              place.column_tile * Stage::kStepPieces + piece;
    packed_left_ = unit < units ? p.steps - first * Shape::kSteps - step : 0;
    packed_place_ =
        (step * Stage::kStepPieces + unit * Stage::kUnitPieces + Stage::place_of(piece % Stage::kUnitPieces)) * 16;
    const int k = first * kDepth + threadIdx.x % Shape::kRowPieces * 8;
#pragma unroll
    for (int i = 0; i < kXPieces; ++i) {
      const int source = sources[threadIdx.x / Shape::kRowPieces + i * kTokensAtOnce];
      x_[i] = p.x + max(source, 0) * p.x_stride + k;
      x_left_[i] = source >= 0 ? p.in_features - k : 0;
    }
    // Pieces of a row of scales or zero points: those of the units that there are.
    scale_shift_ = Stage::kHalfShift + (p.scales.dtype == Dtype::float32 ? 1 : 0);
    const int scale_bytes = p.scales.dtype == Dtype::float32 ? 4 : 2;
    scale_pieces_ = units * 4 * scale_bytes;
    zero_pieces_ = units * (Bits / 2);
    scales_ = static_cast<const unsigned char*>(p.scales.values) +
              (place.expert * p.scales_expert + place.column_tile * Shape::kColumns) * scale_bytes;
    scales_row_ = p.scales_row * scale_bytes;
    zeros_ = p.zeros + place.expert * p.zeros_expert + place.column_tile * Stage::kZeroPieces;
  }

  // Starts the copies of the next stage, if it lies before `last`, as one group.
  __device__ __forceinline__ void next(int last) {
    if (stage_ < last) {
      unsigned char* const to = shared_ + stage_ % Stage::kStages * p_.stage_bytes;
#pragma unroll
      for (int i = 0; i < Shape::kSteps / kStepsAtOnce; ++i) {
        if (i * kStepsAtOnce < packed_left_) {
          cp_async_16_with_policy(to + packed_place_ + i * kStepsAtOnce * Stage::kStepPieces * 16,
                                  packed_ + i * kStepsAtOnce * p_.packed_row, policy_);
        }
      }
      packed_ += Shape::kSteps * p_.packed_row;
      packed_left_ -= Shape::kSteps;
      next_x(to + Stage::kPackedBytes);
      const int first = p_.group_of(stage_ * Shape::kSteps);
      const int groups = p_.group_of(min((stage_ + 1) * Shape::kSteps, p_.steps) - 1) - first + 1;
      if (!p_.one_group()) {
        fetch_groups(scales_ + first * scales_row_, scales_row_, groups, scale_shift_, scale_pieces_,
                     to + Stage::kScales);
      }
      if (p_.zeros != nullptr) {
        fetch_groups(reinterpret_cast<const unsigned char*>(zeros_ + first * p_.zeros_row), p_.zeros_row * 16, groups,
                     Stage::kZeroShift, zero_pieces_, to + p_.zeros_place);
      }
      ++stage_;
    }
    cp_async_commit();
  }

 private:
  __device__ __forceinline__ void next_x(unsigned char* to) {
#pragma unroll
    for (int i = 0; i < kXPieces; ++i) {
      const int token = threadIdx.x / Shape::kRowPieces + i * kTokensAtOnce;
      // Where no byte is valid the address is not read.
      cp_async<16>(to + Stage::x_place(token, threadIdx.x % Shape::kRowPieces), x_[i], 2 * min(max(x_left_[i], 0), 8));
      x_[i] += kDepth;
      x_left_[i] -= kDepth;
    }
  }

  // Rows of 2^shift pieces of 16 bytes, of which `inside` are.
  __device__ __forceinline__ void fetch_groups(const unsigned char* from, int64_t row_bytes, int groups, int shift,
                                               int inside, unsigned char* to) {
#pragma unroll 1
    for (int i = threadIdx.x; i < groups << shift; i += Shape::kThreads) {
      const int piece = i & ((1 << shift) - 1);
      if (piece < inside) {
        cp_async<16>(to + i * 16, from + (i >> shift) * row_bytes + piece * 16);
      }
    }
  }

  const MarlinProduct<T>& p_;
  unsigned char* shared_;
  int stage_;
  uint64_t policy_;
  const uint4* packed_;
  int packed_left_, packed_place_;  // steps of K; bytes in a stage
  const T* x_[kXPieces];
  int x_left_[kXPieces];  // numbers up to the end of the row
  const unsigned char* scales_;
  int64_t scales_row_;
  const uint4* zeros_;
  int scale_shift_, scale_pieces_, zero_pieces_;
};

// Brings what the first stages of a block's first tile read of its weights into the second-level cache, while the
// kernel that makes x may still run. A hint: right whatever the guess at the expert is, and while weights are being
// written.
template <typename T, int Bits, typename Shape>
__device__ __forceinline__ void prefetch_weights(const MarlinProduct<T>& p, int tile) {
  using Stage = MarlinStage<T, Bits, Shape>;
  MarlinPlace place = place_of_tile(p, tile);
  if (p.rows.grouped()) {
    place.expert = load_guess(p.rows.block_ids + place.token_tile / p.tiles_of_block);
    if (place.expert < 0 || place.expert >= p.rows.experts) {
      return;
    }
  }
  const int stages = (p.steps + Shape::kSteps - 1) / Shape::kSteps;
  const int first = static_cast<int>(static_cast<int64_t>(stages) * place.split / p.splits) * Shape::kSteps;
  const int steps = min((Stage::kStages - 1) * Shape::kSteps, p.steps - first);
  const int units = min(Shape::kColumnWarps, p.units - place.column_tile * Shape::kColumnWarps);
  const uint4* const packed =
      p.packed + place.expert * p.packed_expert + first * p.packed_row + place.column_tile * Stage::kStepPieces;
  for (int i = threadIdx.x; i < steps; i += Shape::kThreads) {
    prefetch_to_l2(packed + i * p.packed_row, units * Stage::kUnitPieces * 16);
  }
  if (p.one_group() || steps <= 0) {
    return;
  }
  const int scale_bytes = p.scales.dtype == Dtype::float32 ? 4 : 2, first_group = p.group_of(first);
  const int groups = p.group_of(first + steps - 1) - first_group + 1;
  const unsigned char* const scales =
      static_cast<const unsigned char*>(p.scales.values) +
      (place.expert * p.scales_expert + first_group * p.scales_row + place.column_tile * Shape::kColumns) * scale_bytes;
  for (int i = threadIdx.x; i < groups; i += Shape::kThreads) {
    prefetch_to_l2(scales + i * p.scales_row * scale_bytes, units * kMarlinUnit * scale_bytes);
  }
}

}  // namespace ferrum::cuda
