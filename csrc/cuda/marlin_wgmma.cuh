// The tiles of 64 tokens x 256 columns on wgmma, for products that compute and not memory bounds: two warpgroups, each
// of which makes 128 columns. Weights are the operand in registers, 16 rows of it in each warp, so the words that
// marlin_product.cuh reads fit as they lie; x is the operand in shared memory, whose pieces MarlinStage::x_place has
// put where the 128-byte swizzle looks for them. Copies, list of rows and results are those of marlin_kernel.cuh.
//
// As there, codes are rounded nowhere: the sums of a group are its own, and scales multiply them in float32. That takes
// twice the registers of one sum, and a pause of the tensor core for every group, which the other warpgroup fills.
//
// A step of 16 rows is 128 cycles of the tensor core for both warpgroups. Under it each of them makes the codes of the
// next step ready, also those of the next stage, which is therefore waited for one stage early.
#pragma once

#include "cuda/marlin_kernel.cuh"
#include "cuda/marlin_wgmma.h"
#include "cuda/wgmma.cuh"

namespace ferrum::cuda {

constexpr int kWgmmaTiles = 2;  // of 64 columns, of a warpgroup: 16 columns in each warp
using WgmmaSums = float[kWgmmaTiles][32];
using WgmmaCodes = uint32_t[kWgmmaTiles][4];

// A warp's share of the products of a tile: two neighbouring tiles of 16 columns of the Marlin layout.
template <typename T, int Bits>
class MarlinWgmma {
  using Shape = MarlinTile64;
  using Stage = MarlinStage<T, Bits, Shape>;
  using C = Codes<T, Bits>;
  // A row of x in a stage is a row of the swizzle.
  static_assert(Shape::kTokens == 64 && Shape::kRowPieces == 8 && Shape::kThreads == 256);
  static_assert(Stage::kPackedBytes % kSwizzleBytes == 0);

 public:
  __device__ __forceinline__ MarlinWgmma(const MarlinProduct<T>& p, const unsigned char* shared)
      : p_(p), shared_(shared), unit_(threadIdx.x / 64), pair_(threadIdx.x / 32 % 2) {
    const int lane = threadIdx.x % 32;
    words_ =
        unit_ * Stage::kUnitPieces * 16 + (Bits == 4 ? lane * 16 + pair_ * 8 : Stage::place_of(lane * 2 + pair_) * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      zero_[i] = C::zero_pair(1u << (Bits - 1));
    }
  }

  __device__ __forceinline__ const unsigned char* stage(int stage) const {
    return shared_ + stage % Stage::kStages * p_.stage_bytes;
  }

  // Makes the codes of step `step` of a stage: row lane / 4 + 8 * half of the warp's rows of an operand is that column
  // of its tile.
  __device__ __forceinline__ void load(const unsigned char* at, int step, WgmmaCodes& codes) const {
    uint32_t words[C::kWords] = {};
    const unsigned char* const from = at + step * Stage::kStepPieces * 16 + words_;
    if constexpr (Bits == 4) {
      const uint2 piece = *reinterpret_cast<const uint2*>(from);
      words[0] = piece.x;
      words[1] = piece.y;
    } else {
      const uint4 piece = *reinterpret_cast<const uint4*>(from);
      words[0] = piece.x;
      words[1] = piece.y;
      words[2] = piece.z;
      words[3] = piece.w;
    }
#pragma unroll
    for (int tile = 0; tile < kWgmmaTiles; ++tile) {
      C::fragment(words, tile, zero_, codes[tile]);
    }
  }

  // The zero points of codes from here on, if there are any: row `row` of a stage.
  __device__ __forceinline__ void load_zeros(const unsigned char* at, int row) {
    if (p_.zeros == nullptr) {
      return;
    }
    const uint32_t* const from = reinterpret_cast<const uint32_t*>(at + p_.zeros_place) + row * Stage::kZeroPieces * 4 +
                                 (unit_ * 8 + threadIdx.x % 32 / 4) * C::kZeroWords;
    uint32_t words[C::kZeroWords] = {};  // from the pair's first code on
    words[0] = Bits == 4 ? from[0] >> 8 * pair_ : from[pair_ % C::kZeroWords];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      zero_[i] = C::zero_pair(C::zero_code(words, i));
    }
  }

  // Starts the products of a step with all tokens; `keep`: adds them to `sums`.
  __device__ __forceinline__ void multiply(const WgmmaCodes& codes, uint64_t x, bool keep, WgmmaSums& sums) const {
    wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < kWgmmaTiles; ++tile) {
      wgmma_m64n64k16<T>(sums[tile], codes[tile], x, keep);
    }
    wgmma_commit();
  }

  // Adds the sums of a group, whose scales are row `row` of a stage.
  __device__ __forceinline__ void add_group(const unsigned char* at, int row, const WgmmaSums& sums,
                                            WgmmaSums& total) const {
    float scale[4] = {1.0f, 1.0f, 1.0f, 1.0f};  // 2 * tile + half
    if (!p_.one_group()) {
      load_floats(at + Stage::kScales, p_.scales.dtype,
                  row * Shape::kColumns + unit_ * kMarlinUnit + threadIdx.x % 32 / 4 * 8 + pair_ * 4, scale);
    }
#pragma unroll
    for (int i = 0; i < kWgmmaTiles * 32; ++i) {
      total[i / 32][i % 32] += scale[i / 32 * 2 + i / 2 % 2] * sums[i / 32][i % 32];
    }
  }

  // As MarlinMultiplier::store_sums.
  __device__ __forceinline__ void store_sums(float* sums, const WgmmaSums& total) const {
    const int lane = threadIdx.x % 32;
    float* const mine = sums + unit_ * kMarlinUnit + pair_ * 32 + lane / 4;
#pragma unroll
    for (int i = 0; i < kWgmmaTiles * 32; ++i) {
      const int token = i % 32 / 4 * 8 + 2 * (lane % 4) + i % 2;
      mine[token * Shape::kSumStride + i / 32 * 16 + i / 2 % 2 * 8] = total[i / 32][i % 32];
    }
  }

 private:
  const MarlinProduct<T>& p_;
  const unsigned char* shared_;
  int unit_, pair_;     // of the tile's units of 64 columns; of the unit's pairs of tiles
  int words_;           // the lane's place in a step
  uint32_t zero_[8]{};  // four of them, as Codes::fragment names them
};

// The sums of this warp over stages first ... last - 1. Steps behind the end of K, in its last stage, multiply zeros.
template <typename T, int Bits>
__device__ __forceinline__ void multiply_stages(const MarlinProduct<T>& p,
                                                MarlinFetcher<T, Bits, MarlinTile64>& fetcher,
                                                MarlinWgmma<T, Bits>& warp, int first, int last, WgmmaSums& total) {
  using Stage = MarlinStage<T, Bits, MarlinTile64>;
  constexpr int kSteps = MarlinTile64::kSteps;
  WgmmaSums sums = {};
  WgmmaCodes codes[2] = {};
  const auto end_of = [&](int group) {
    const int end = (group + 1) * p.group_steps;
    return end < min(last * kSteps, p.steps) ? end : last * kSteps;
  };
  int group = p.group_of(first * kSteps), group_end = end_of(group);
  bool keep = false;
#pragma unroll 1
  for (int i = 0; i < Stage::kStages - 1; ++i) {
    fetcher.next(last);
  }
  cp_async_wait<Stage::kStages - 2>();
  __syncthreads();  // the codes of the first stage are here for all
  warp.load_zeros(warp.stage(first), 0);
  warp.load(warp.stage(first), 0, codes[0]);
#pragma unroll 1
  for (int stage = first; stage < last; ++stage) {
    cp_async_wait<Stage::kStages - 3>();
    publish_to_wgmma();
    __syncthreads();  // this stage and the next are here for all, and nobody still reads the one before
    const unsigned char *const at = warp.stage(stage), *const after = warp.stage(stage + 1);
    const uint64_t x = wgmma_descriptor(at + Stage::kPackedBytes);
    const int first_group = group;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool here = step + 1 < kSteps, ends = stage * kSteps + step + 1 == group_end;
      if (ends) {
        warp.load_zeros(here ? at : after, here ? group + 1 - first_group : 0);
      }
      warp.multiply(codes[step % 2], x + step * (2 * kMarlinStep >> 4), keep, sums);
      warp.load(here ? at : after, (step + 1) % kSteps, codes[(step + 1) % 2]);
      if (step == 0) {
        fetcher.next(last);
      }
      wgmma_wait<0>(sums);
      keep = !ends;
      if (ends) {
        warp.add_group(at, group - first_group, sums, total);
        group_end = end_of(++group);
      }
    }
  }
}

template <typename T, int Bits>
__global__ void __launch_bounds__(MarlinTile64::kThreads, 1) marlin_wgmma_tiles(MarlinProduct<T> p) {
#if FERRUM_HAS_WGMMA
  FERRUM_DYNAMIC_SHARED(unsigned char, bytes);
  unsigned char* const shared = bytes + (kSwizzleBytes - shared_address(bytes) % kSwizzleBytes) % kSwizzleBytes;
  walk_over_tiles<T, Bits, MarlinTile64>(
      p, shared, [&](const MarlinPlace& place, const int* sources, int first, int last) {
        WgmmaSums total = {};
        MarlinFetcher<T, Bits, MarlinTile64> fetcher(p, place, sources, shared, first);
        MarlinWgmma<T, Bits> warp(p, shared);
        multiply_stages(p, fetcher, warp, first, last, total);
        __syncthreads();  // the sums take the place of stages that other warps may still read
        warp.store_sums(reinterpret_cast<float*>(shared), total);
        __syncthreads();
      });
#endif
}

template <typename T, int Bits>
void launch_wgmma_tiles(const Stream& stream, const MarlinConfig& config, MarlinProduct<T> p) {
  Grid grid = grid_of_tiles<T, Bits, MarlinTile64>(config, p, kSwizzleBytes);
  grid.shared_bytes += kSwizzleBytes;  // of which the kernel takes what aligns the stages
  stream.require_code(marlin_wgmma_tiles<T, Bits>, "compute capability 9.0, and a library with code for 90a");
  stream.launch_early(marlin_wgmma_tiles<T, Bits>, grid, p);
}

}  // namespace ferrum::cuda
