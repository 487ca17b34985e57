// A product in the Marlin layout, out^T = W^T x^T: weights are the 16-row operand of the mma, tokens its 8 columns, so
// that eight tokens or fewer waste nothing and one kernel serves every number of them.
//
// Floor: every word of weights read once for each tile of tokens. Codes are rounded nowhere: sums of a group are
// products of x with code - zero, exact in x's dtype, and scales multiply them in float32. Where a tile has few tokens,
// an H200 brings 8 KB of weights in the time of 1770 warp instructions, and codes keep a bias that the sum of x takes
// off later.
//
// Warps of a block share its tokens (kTokenWarps), columns (kColumnWarps, 64 each) and the steps of a stage
// (kDepthWarps). All sums are added in a fixed order: those of the warps of a block in shared memory, those of several
// blocks (splits of K) by the last of them to finish, which nobody waits for.
#pragma once

#include "cuda/marlin_codes.cuh"
#include "cuda/marlin_fetch.cuh"
#include "cuda/mma.cuh"

namespace ferrum::cuda {

// A warp's share of the products of a tile.
template <typename T, int Bits, typename Shape>
class MarlinMultiplier {
  using Stage = MarlinStage<T, Bits, Shape>;
  using C = Codes<T, Bits>;
  static constexpr int kTiles = Shape::kWarpTiles;
  // The sums of x cost one mma for the four of eight tokens: too much where there are many.
  static constexpr bool kBiased = Bits == 4 && kTiles <= 2;

 public:
  __device__ __forceinline__ MarlinMultiplier(const MarlinProduct<T>& p, const MarlinPlace& place,
                                              const unsigned char* shared)
      : p_(p), shared_(shared) {
    const int warp = threadIdx.x / 32;
    token_warp_ = warp % Shape::kTokenWarps;
    column_warp_ = warp / Shape::kTokenWarps % Shape::kColumnWarps;
    depth_warp_ = warp / (Shape::kTokenWarps * Shape::kColumnWarps);
    inside_ = place.column_tile * Shape::kColumnWarps + column_warp_ < p.units;
  }

  // Adds the products of a stage.
  __device__ __forceinline__ void consume(int stage, float (&total)[4][kTiles][4]) const {
    if (!inside_) {
      return;
    }
    const unsigned char* const at = shared_ + stage % Stage::kStages * p_.stage_bytes;
    const int first = stage * Shape::kSteps, first_group = p_.group_of(first);
    int step = depth_warp_ * Shape::kWarpSteps;
    const int end = min(step + Shape::kWarpSteps, p_.steps - first);
#pragma unroll 1
    while (step < end) {  // for each group in turn
      const int group = p_.group_of(first + step);
      const int group_end = min(end, (group + 1) * p_.group_steps - first);
      add_group(at, step, group_end, group - first_group, total);
      step = group_end;
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
  // Steps `step` ... end - 1 of a stage, all of the group in row `row` of its scales and zero points.
  __device__ __forceinline__ void add_group(const unsigned char* at, int step, int end, int row,
                                            float (&total)[4][kTiles][4]) const {
    float sums[4][kTiles][4] = {}, x_sums[kTiles][4] = {};
    const unsigned char* const zeros = at + p_.zeros_place + row * Stage::kZeroPieces * 16;
    uint32_t zero[8];
    if constexpr (!kBiased) {
      load_zeros(zeros, zero, C::zero_pair);
    }
#pragma unroll 1
    for (; step < end; ++step) {
      multiply(at, step, zero, sums, x_sums);
    }
    float bias[8];
    if constexpr (kBiased) {
      load_zeros(zeros, bias, [](uint32_t code) { return C::kBias + static_cast<float>(code); });
    }
    float scale[8] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    if (!p_.one_group()) {  // a lane's eight scales of a unit follow each other: 2 * tile + half
      load_floats(at + Stage::kScales, p_.scales.dtype,
                  row * Shape::kColumns + column_warp_ * kMarlinUnit + threadIdx.x % 32 / 4 * 8, scale);
    }
#pragma unroll
    for (int i = 0; i < 4 * kTiles * 4; ++i) {
      const int tile = i / (4 * kTiles), t = i / 4 % kTiles, column = 2 * tile + i % 4 / 2;
      float sum = sums[tile][t][i % 4];
      if constexpr (kBiased) {
        sum -= bias[column] * x_sums[t][i % 2];
      }
      total[tile][t][i % 4] += scale[column] * sum;
    }
  }

  // The zero points of a lane's columns as `convert` makes them. Symmetric weights have one, known beforehand.
  template <typename Zero, typename Convert>
  __device__ __forceinline__ void load_zeros(const unsigned char* row, Zero (&zero)[8], const Convert& convert) const {
    if (p_.zeros == nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        zero[i] = convert(1u << (Bits - 1));
      }
      return;
    }
    const uint32_t* const from =
        reinterpret_cast<const uint32_t*>(row) + (column_warp_ * 8 + threadIdx.x % 32 / 4) * C::kZeroWords;
    uint32_t words[C::kZeroWords];
#pragma unroll
    for (int i = 0; i < C::kZeroWords; ++i) {
      words[i] = from[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      zero[i] = convert(C::zero_code(words, i));
    }
  }

  __device__ __forceinline__ void multiply(const unsigned char* at, int step, const uint32_t (&zero)[8],
                                           float (&sums)[4][kTiles][4], float (&x_sums)[kTiles][4]) const {
    const int lane = threadIdx.x % 32;
    uint32_t words[C::kWords], x[kTiles][2];
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
      if constexpr (kBiased) {
        C::biased_fragment(words, tile, w);
      } else {
        C::fragment(words, tile, zero, w);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma_m16n8k16<T>(sums[tile][t], w, x[t]);
      }
    }
    if constexpr (kBiased) {
      const uint32_t ones[4] = {Packed<T>::kOnes, Packed<T>::kOnes, Packed<T>::kOnes, Packed<T>::kOnes};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma_m16n8k16<T>(x_sums[t], ones, x[t]);
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

  const MarlinProduct<T>& p_;
  const unsigned char* shared_;
  int token_warp_, column_warp_, depth_warp_;
  bool inside_;
};

// The sums of this warp over stages first ... last - 1.
template <typename T, int Bits, typename Shape>
__device__ __forceinline__ void multiply_stages(MarlinFetcher<T, Bits, Shape>& fetcher,
                                                const MarlinMultiplier<T, Bits, Shape>& multiplier, int first, int last,
                                                float (&total)[4][Shape::kWarpTiles][4]) {
  constexpr int kStages = MarlinStage<T, Bits, Shape>::kStages;
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    fetcher.next(last);
  }
#pragma unroll 1
  for (int stage = first; stage < last; ++stage) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage is here for all, and nobody still reads the one whose place the next fetch takes
    fetcher.next(last);
    multiplier.consume(stage, total);
  }
}

}  // namespace ferrum::cuda
