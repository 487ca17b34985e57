// A product in the Marlin layout, out^T = W^T x^T: weights are the 16-row operand of the mma, tokens its 8 columns, so
// that eight tokens or fewer waste nothing and one kernel serves every number of them.
//
// Floor: every word of weights read once for each tile of tokens, rounded codes nowhere: sums of a group are products
// of x with code - zero, exact in x's dtype, and scales multiply them in float32.
//
// Warps of a block share its tokens (kTokenWarps), columns (kColumnWarps, 64 each) and the steps of a stage
// (kDepthWarps). All sums are added in a fixed order: those of the warps of a block in shared memory, those of several
// blocks (splits of K) by the last of them to finish, which nobody waits for.
#pragma once

#include "cuda/marlin_codes.cuh"
#include "cuda/marlin_product.cuh"
#include "cuda/mma.cuh"

namespace ferrum::cuda {

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
using MarlinTile16 = MarlinTileShape<1, 1, 2, 2, 4>;
using MarlinTile32 = MarlinTileShape<2, 1, 2, 2, 2>;
using MarlinTile64 = MarlinTileShape<3, 2, 4, 1, 1>;

template <typename T, int Bits, typename Shape>
struct MarlinStage {
  static constexpr int kStages = Bits == 8 && Shape::kTokens == 64 ? 3 : 4;  // as 8-bit ones are twice as large
  static constexpr int kUnitPieces = 8 * Bits;                               // of 16 bytes, of 16 x 64 codes
  static constexpr int kStepPieces = kUnitPieces * Shape::kColumnWarps;
  static constexpr int kPackedBytes = Shape::kSteps * kStepPieces * 16;
  static constexpr int kScales = kPackedBytes + Shape::kXBytes;  // where scales start; zeros lie behind them
  static constexpr int kZeroPieces = Bits / 2 * Shape::kColumnWarps;
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

// The part of a tile's rows: what is fetched, and the warp's share of the product.
template <typename T, int Bits, typename Shape>
class MarlinMultiplier {
  using Stage = MarlinStage<T, Bits, Shape>;
  static constexpr int kTiles = Shape::kWarpTiles;

 public:
  __device__ __forceinline__ MarlinMultiplier(const MarlinProduct<T>& p, const MarlinPlace& place, const int* sources,
                                              unsigned char* shared)
      : p_(p), place_(place), sources_(sources), shared_(shared), policy_(evict_first_policy()) {
    const int warp = threadIdx.x / 32;
    token_warp_ = warp % Shape::kTokenWarps;
    column_warp_ = warp / Shape::kTokenWarps % Shape::kColumnWarps;
    depth_warp_ = warp / (Shape::kTokenWarps * Shape::kColumnWarps);
    scale_bytes_ = p.scales.dtype == Dtype::float32 ? 4 : 2;
  }

  // Of stages first ... last - 1, the sums of this warp.
  __device__ __forceinline__ void run(int first, int last, float (&total)[4][kTiles][4]) {
#pragma unroll 1
    for (int i = 0; i < Stage::kStages - 1; ++i) {
      fetch(first + i, last);
    }
#pragma unroll 1
    for (int stage = first; stage < last; ++stage) {
      cp_async_wait<Stage::kStages - 2>();
      __syncthreads();  // this stage is here for all, and nobody still reads the one whose place the next fetch takes
      fetch(stage + Stage::kStages - 1, last);
      consume(stage, total);
    }
  }

  // total[tile][t][i]: column 16 tile + lane / 4 + 8 (i / 2) of the warp's unit, its token 8 t + 2 (lane % 4) + i % 2.
  __device__ __forceinline__ void store_sums(float* sums, const float (&total)[4][kTiles][4]) const {
    const int lane = threadIdx.x % 32;
    float* const mine = sums + (depth_warp_ * Shape::kTokens + token_warp_ * 8 * kTiles) * Shape::kSumStride +
                        column_warp_ * kMarlinUnit;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mine[(8 * t + 2 * (lane % 4) + i % 2) * Shape::kSumStride + 16 * tile + lane / 4 + 8 * (i / 2)] =
              total[tile][t][i];
        }
      }
    }
  }

 private:
  __device__ __forceinline__ unsigned char* slot(int stage) const {
    return shared_ + stage % Stage::kStages * p_.stage_bytes;
  }
  __device__ __forceinline__ int scale_row_bytes() const { return Shape::kColumns * scale_bytes_; }
  __device__ __forceinline__ int first_group(int stage) const { return p_.group_of(stage * Shape::kSteps); }
  __device__ __forceinline__ int groups_of(int stage) const {
    return p_.group_of(min((stage + 1) * Shape::kSteps, p_.steps) - 1) - first_group(stage) + 1;
  }
  __device__ __forceinline__ unsigned char* zeros_in(unsigned char* at, int stage) const {
    return at + Stage::kScales + (p_.one_group() ? 0 : groups_of(stage) * scale_row_bytes());
  }

  __device__ __forceinline__ void fetch(int stage, int last) {
    if (stage < last) {
      unsigned char* const to = slot(stage);
      fetch_packed(stage, to);
      fetch_x(stage, to + Stage::kPackedBytes);
      const int first = first_group(stage), groups = groups_of(stage);
      if (!p_.one_group()) {
        const int unit_pieces = 4 * scale_bytes_;
        fetch_groups(static_cast<const unsigned char*>(p_.scales.values) +
                         (place_.expert * p_.scales_expert + first * p_.scales_row) * scale_bytes_,
                     p_.scales_row * scale_bytes_, groups, unit_pieces, to + Stage::kScales);
      }
      if (p_.zeros != nullptr) {
        fetch_groups(
            reinterpret_cast<const unsigned char*>(p_.zeros + place_.expert * p_.zeros_expert + first * p_.zeros_row),
            p_.zeros_row * 16, groups, Bits / 2, zeros_in(to, stage));
      }
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void fetch_packed(int stage, unsigned char* to) {
    constexpr int kStepsAtOnce = Shape::kThreads / Stage::kStepPieces;
    const int piece = threadIdx.x % Stage::kStepPieces, unit = piece / Stage::kUnitPieces;
    const int place = unit * Stage::kUnitPieces + Stage::place_of(piece % Stage::kUnitPieces);
    if (place_.column_tile * Shape::kColumnWarps + unit >= p_.units) {
      return;
    }
    const int first = threadIdx.x / Stage::kStepPieces;
    const uint4* from = p_.packed + place_.expert * p_.packed_expert + (stage * Shape::kSteps + first) * p_.packed_row +
                        place_.column_tile * Stage::kStepPieces + piece;
#pragma unroll
    for (int step = first, i = 0; i < Shape::kSteps / kStepsAtOnce; ++i, step += kStepsAtOnce) {
      if (stage * Shape::kSteps + step < p_.steps) {
        cp_async_16_with_policy(to + (step * Stage::kStepPieces + place) * 16, from, policy_);
      }
      from += kStepsAtOnce * p_.packed_row;
    }
  }

  __device__ __forceinline__ void fetch_x(int stage, unsigned char* to) {
    const int piece = threadIdx.x % Shape::kRowPieces;
    const int64_t k = (static_cast<int64_t>(stage) * Shape::kRowPieces + piece) * 8;
    const int inside = static_cast<int>(max(min(p_.in_features - k, int64_t{8}), int64_t{0})) * 2;
#pragma unroll
    for (int i = 0; i < Shape::kTokens * Shape::kRowPieces / Shape::kThreads; ++i) {
      const int token = threadIdx.x / Shape::kRowPieces + i * (Shape::kThreads / Shape::kRowPieces);
      const int source = sources_[token];
      const int valid = source >= 0 ? inside : 0;
      cp_async<16>(to + Stage::x_place(token, piece), valid > 0 ? p_.x + source * p_.x_stride + k : p_.x, valid);
    }
  }

  // Rows of scales or zero points, `unit_pieces` pieces of 16 bytes for each unit.
  __device__ __forceinline__ void fetch_groups(const unsigned char* from, int64_t row_bytes, int groups,
                                               int unit_pieces, unsigned char* to) {
    const int pieces = unit_pieces * Shape::kColumnWarps, first = place_.column_tile * pieces;
#pragma unroll 1
    for (int i = threadIdx.x; i < groups * pieces; i += Shape::kThreads) {
      const int group = i / pieces, piece = i % pieces;
      if (first + piece < p_.units * unit_pieces) {
        cp_async<16>(to + i * 16, from + group * row_bytes + (first + piece) * 16);
      }
    }
  }

  __device__ __forceinline__ void consume(int stage, float (&total)[4][kTiles][4]) {
    if (place_.column_tile * Shape::kColumnWarps + column_warp_ >= p_.units) {
      return;
    }
    unsigned char* const at = slot(stage);
    int step = stage * Shape::kSteps + depth_warp_ * Shape::kWarpSteps;
    const int end = min(step + Shape::kWarpSteps, p_.steps);
    float sums[4][kTiles][4];
#pragma unroll 1
    while (step < end) {  // for each group in turn
      const int group = p_.group_of(step), row = group - first_group(stage);
      const int group_end = p_.one_group() ? end : min(end, (group + 1) * p_.group_steps);
      uint32_t zero[8];
      load_zeros(zeros_in(at, stage), row, zero);
#pragma unroll
      for (int i = 0; i < 4 * kTiles * 4; ++i) {
        sums[i / (4 * kTiles)][i / 4 % kTiles][i % 4] = 0.0f;
      }
#pragma unroll 1
      for (; step < group_end; ++step) {
        multiply(at, step - stage * Shape::kSteps, zero, sums);
      }
      add_scaled(at + Stage::kScales + row * scale_row_bytes(), sums, total);
    }
  }

  __device__ __forceinline__ void load_zeros(const unsigned char* rows, int row, uint32_t (&zero)[8]) const {
    using C = Codes<T, Bits>;
    if (p_.zeros == nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        zero[i] = C::zero_pair(1u << (Bits - 1));
      }
      return;
    }
    const uint32_t* const from = reinterpret_cast<const uint32_t*>(rows + row * Stage::kZeroPieces * 16) +
                                 (column_warp_ * 8 + threadIdx.x % 32 / 4) * C::kZeroWords;
    uint32_t words[C::kZeroWords];
#pragma unroll
    for (int i = 0; i < C::kZeroWords; ++i) {
      words[i] = from[i];
    }
    C::zeros(words, zero);
  }

  __device__ __forceinline__ void multiply(const unsigned char* at, int step, const uint32_t (&zero)[8],
                                           float (&sums)[4][kTiles][4]) const {
    const int lane = threadIdx.x % 32;
    uint32_t words[Codes<T, Bits>::kWords], x[kTiles][2];
    const uint4* const unit =
        reinterpret_cast<const uint4*>(at) + step * Stage::kStepPieces + column_warp_ * Stage::kUnitPieces;
#pragma unroll
    for (int i = 0; i < Bits / 4; ++i) {
      const uint4 piece = unit[Stage::place_of(lane * (Bits / 4) + i)];
      words[4 * i] = piece.x;
      words[4 * i + 1] = piece.y;
      words[4 * i + 2] = piece.z;
      words[4 * i + 3] = piece.w;
    }
    load_x(at + Stage::kPackedBytes, step, x);
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      uint32_t w[4];
      Codes<T, Bits>::fragment(words, tile, zero, w);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma_m16n8k16<T>(sums[tile][t], w, x[t]);
      }
    }
  }

  __device__ __forceinline__ void load_x(const unsigned char* at, int step, uint32_t (&x)[kTiles][2]) const {
    const int lane = threadIdx.x % 32, token = token_warp_ * 8 * kTiles + lane % 8, piece = 2 * step + lane / 8 % 2;
    if constexpr (kTiles == 1) {
      ldmatrix(x[0], at + Stage::x_place(token, piece));
    } else {
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        uint32_t r[4];
        ldmatrix(r, at + Stage::x_place(token + 8 * t + lane / 16 * 8, piece));
        x[t][0] = r[0];
        x[t][1] = r[1];
        x[t + 1][0] = r[2];
        x[t + 1][1] = r[3];
      }
    }
  }

  // A lane's eight scales of a unit follow each other: 2 * tile + half.
  __device__ __forceinline__ void add_scaled(const unsigned char* row, const float (&sums)[4][kTiles][4],
                                             float (&total)[4][kTiles][4]) const {
    float scale[8] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    if (!p_.one_group()) {
      load_floats(row, p_.scales.dtype, column_warp_ * kMarlinUnit + threadIdx.x % 32 / 4 * 8, scale);
    }
#pragma unroll
    for (int i = 0; i < 4 * kTiles * 4; ++i) {
      const int tile = i / (4 * kTiles), t = i / 4 % kTiles;
      total[tile][t][i % 4] += scale[2 * tile + i % 4 / 2] * sums[tile][t][i % 4];
    }
  }

  const MarlinProduct<T>& p_;
  const MarlinPlace& place_;
  const int* sources_;
  unsigned char* shared_;
  uint64_t policy_;
  int token_warp_, column_warp_, depth_warp_, scale_bytes_;
};

}  // namespace ferrum::cuda
