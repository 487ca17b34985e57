// Tiles on tensor cores, fed by cp.async and ldmatrix. Correct as they stand: test_mutations.py breaks them.
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/ptx.cuh"

namespace ferrum::cuda {
namespace {

// ---- out = x with every tile of 256 numbers reversed; three tiles in flight

constexpr int kCopyTile = 256, kStages = 3;

__global__ void reverse_tiles(const float* x, float* out, int64_t size) {
  __shared__ __align__(16) float stages[kStages][kCopyTile];
  const int thread = threadIdx.x, tiles = static_cast<int>((size + kCopyTile - 1) / kCopyTile);
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      const int64_t first = static_cast<int64_t>(tile) * kCopyTile + thread * 4;
      const int64_t valid = min(max((size - first) * 4, int64_t{0}), int64_t{16});
      cp_async<16>(&stages[tile % kStages][thread * 4], valid > 0 ? x + first : x, static_cast<int>(valid));
    }
    cp_async_commit();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) {
    fetch(tile);
  }
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this tile is here for all, and nobody still reads the one whose place the next fetch takes
    fetch(tile + kStages - 1);
    for (int i = thread; i < kCopyTile; i += 64) {
      const int64_t at = static_cast<int64_t>(tile) * kCopyTile + i;
      if (at < size) {
        out[at] = stages[tile % kStages][kCopyTile - 1 - i];
      }
    }
  }
}

Tensor reversed_tiles(const Tensor& x) {
  Tensor out = new_output(x, x.sizes());
  Stream("reversed_tiles", x)
      .launch(reverse_tiles, Grid{dim3(1), dim3(64)}, data<float>(x), mutable_data<float>(out), x.size(0));
  return out;
}

// ---- C[16, N] = A[16, K] B[N, K]^T; a block makes 16x16 with two warps, K in steps of 32

constexpr int kStep = 32;

// Chunks of 8 numbers of a row change places by the row, so that the eight rows of an ldmatrix lie in different banks.
__device__ __forceinline__ int swizzle(int row, int chunk) { return row * kStep + (chunk ^ (row / 2 % 4)) * 8; }

template <typename T>
__global__ void multiply_tile(const T* a, const T* b, float* out, int n, int k) {
  FERRUM_DYNAMIC_SHARED(T, shared);  // [2 stages][A, B][16][32]
  constexpr int kMatrix = 16 * kStep;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, column = blockIdx.x * 16;
  const auto fetch = [&](int step) {
    T* const stage = shared + step % 2 * 2 * kMatrix;
    const int row = thread / 4, chunk = thread % 4;
    const int64_t from = static_cast<int64_t>(step) * kStep + chunk * 8;
    cp_async<16>(stage + swizzle(row, chunk), a + row * k + from);
    cp_async<16>(stage + kMatrix + swizzle(row, chunk), b + (column + row) * static_cast<int64_t>(k) + from);
    cp_async_commit();
  };
  float sum[4] = {};
  fetch(0);
  for (int step = 0; step * kStep < k; ++step) {
    cp_async_wait<0>();
    __syncthreads();
    if ((step + 1) * kStep < k) {
      fetch(step + 1);
    }
    const T* const stage = shared + step % 2 * 2 * kMatrix;
    for (int half = 0; half < kStep / 16; ++half) {
      uint32_t left[4], right[2];
      ldmatrix(left, stage + swizzle(lane % 16, half * 2 + lane / 16));
      ldmatrix(right, stage + kMatrix + swizzle(warp * 8 + lane % 8, half * 2 + lane / 8 % 2));
      mma_m16n8k16<T>(sum, left, right);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), c = column + warp * 8 + 2 * (lane % 4) + i % 2;
    out[row * n + c] = sum[i];
  }
}

Tensor matmul_nt(const Tensor& a, const Tensor& b) {
  Tensor out = new_output(a, {16, b.size(0)}, ScalarType::Float);
  const int n = static_cast<int>(b.size(0)), k = static_cast<int>(b.size(1));
  const Grid grid{dim3(static_cast<unsigned>(n / 16)), dim3(64), 2 * 2 * 16 * kStep * sizeof(__half)};
  const Stream stream("matmul_nt", a);
  if (a.scalar_type() == ScalarType::Half) {
    stream.launch(multiply_tile<__half>, grid, data<__half>(a), data<__half>(b), mutable_data<float>(out), n, k);
  } else {
    stream.launch(multiply_tile<__nv_bfloat16>, grid, data<__nv_bfloat16>(a), data<__nv_bfloat16>(b),
                  mutable_data<float>(out), n, k);
  }
  return out;
}

// ---- C[16, N] = A[16, K] (W - 8), 4-bit W in words that hold a lane's fragment: packed[K / 16][N / 8][32] of 4 codes,
// in bits 0, 16, 4, 20: rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of column g

__global__ void multiply_int4(const __half* a, const uint32_t* packed, float* out, int n, int k) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  float sum[4] = {};
  for (int step = 0; step < k / 16; ++step) {
    uint32_t left[4], right[2];
    for (int r = 0; r < 4; ++r) {
      left[r] = *reinterpret_cast<const uint32_t*>(a + (g + 8 * (r % 2)) * k + step * 16 + 2 * t + 8 * (r / 2));
    }
    const uint32_t codes = load_streaming(packed + (step * (n / 8) + blockIdx.x) * 32 + lane);
    // 0x6400 is 1024 in half, whose last bits count by 1: the code stands in them, or by 16 in the next four.
    constexpr int kMaskThenOr = (0xf0 & 0xcc) | 0xaa;
    right[0] = lop3<kMaskThenOr>(codes, 0x000f000f, 0x64006400);
    right[1] = lop3<kMaskThenOr>(codes, 0x00f000f0, 0x64006400);
    const __half2 low = bits_as<__half2>(right[0]), high = bits_as<__half2>(right[1]);
    right[0] = bits_as<uint32_t>(__hsub2(low, __float2half2_rn(1032.0f)));
    right[1] = bits_as<uint32_t>(__hfma2(high, __float2half2_rn(0.0625f), __float2half2_rn(-72.0f)));
    mma_m16n8k16<__half>(sum, left, right);
  }
  for (int i = 0; i < 4; ++i) {
    out[(g + 8 * (i / 2)) * n + blockIdx.x * 8 + 2 * t + i % 2] = sum[i];
  }
}

Tensor matmul_int4(const Tensor& a, const Tensor& packed) {
  const int k = static_cast<int>(a.size(1)), n = static_cast<int>(packed.size(1)) * 8;
  Tensor out = new_output(a, {16, n}, ScalarType::Float);
  Stream("matmul_int4", a)
      .launch(multiply_int4, Grid{dim3(static_cast<unsigned>(n / 8)), dim3(32)}, data<__half>(a),
              reinterpret_cast<const uint32_t*>(packed.const_data_ptr()), mutable_data<float>(out), n, k);
  return out;
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(FERRUM_NAMESPACE, m) {
  m.def("matmul_int4(Tensor a, Tensor packed) -> Tensor");
  m.def("matmul_nt(Tensor a, Tensor b) -> Tensor");
  m.def("reversed_tiles(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("matmul_int4", TORCH_BOX(&ferrum::cuda::matmul_int4));
  m.impl("matmul_nt", TORCH_BOX(&ferrum::cuda::matmul_nt));
  m.impl("reversed_tiles", TORCH_BOX(&ferrum::cuda::reversed_tiles));
}
