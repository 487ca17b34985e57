// Products of warpgroups, fed by cp.async. Correct as they stand: test_wgmma.py breaks them.
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/wgmma.cuh"

namespace ferrum::cuda {
namespace {

constexpr int kColumns = 64, kRowBytes = 128, kMatrixBytes = kColumns * kRowBytes;

__device__ __forceinline__ unsigned char* aligned(unsigned char* shared) {
  return shared + (kSwizzleBytes - shared_address(shared) % kSwizzleBytes) % kSwizzleBytes;
}

__device__ __forceinline__ int swizzled(int row, int piece) { return row * kRowBytes + (piece ^ row % 8) * 16; }

// ---- d = a b (+ d) on registers as they lie in the threads of a warpgroup, a[128][4], d[128][32]; b is rows 16 * step
// of x^T, x[64][64]

template <typename T>
__global__ void multiply(const uint32_t* a, const uint4* x, float* d, int step, bool keep) {
  FERRUM_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const b = aligned(shared);
  for (int i = threadIdx.x; i < kColumns * 8; i += 128) {
    *reinterpret_cast<uint4*>(b + swizzled(i / 8, i % 8)) = x[i];
  }
  publish_to_wgmma();
  __syncthreads();
  uint32_t left[4];
  float sum[32];
  for (int i = 0; i < 4; ++i) {
    left[i] = a[threadIdx.x * 4 + i];
  }
  for (int i = 0; i < 32; ++i) {
    sum[i] = d[threadIdx.x * 32 + i];
  }
  wgmma_fence();
  wgmma_m64n64k16<T>(sum, left, wgmma_descriptor(b + 32 * step), keep);
  wgmma_commit();
  wgmma_wait<0>(sum);
  for (int i = 0; i < 32; ++i) {
    d[threadIdx.x * 32 + i] = sum[i];
  }
}

void multiply_registers_(const Tensor& a, const Tensor& x, const Tensor& d, int64_t step, bool keep) {
  const Stream stream("multiply_registers_", a);
  const Grid grid{dim3(1), dim3(128), kMatrixBytes + kSwizzleBytes};
  const auto kernel = x.scalar_type() == ScalarType::Half ? multiply<__half> : multiply<__nv_bfloat16>;
  stream.launch(kernel, grid, reinterpret_cast<const uint32_t*>(data<int>(a)),
                static_cast<const uint4*>(x.const_data_ptr()), mutable_data<float>(d), static_cast<int>(step), keep);
}

// ---- out[128][64] = a[128][K] b[64][K]^T by two warpgroups; three stages of 64 of K, a product under way

constexpr int kStages = 3, kSteps = 4, kThreads = 256;

template <typename T>
__global__ void multiply_stages(const T* a, const T* b, float* out, int k) {
  FERRUM_DYNAMIC_SHARED(unsigned char, bytes);
  unsigned char* const shared = aligned(bytes);
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4, t = lane % 4;
  const auto fetch = [&](int stage) {
    for (int i = thread; stage * 64 < k && i < kColumns * 8; i += kThreads) {
      unsigned char* const to = shared + stage % kStages * kMatrixBytes + swizzled(i / 8, i % 8);
      cp_async<16>(to, b + i / 8 * k + stage * 64 + i % 8 * 8);
    }
    cp_async_commit();
  };
  uint32_t left[2][4];
  const auto load = [&](int step) {
    for (int r = 0; r < 4 && step * 16 < k; ++r) {
      const T* const from = a + (row + 8 * (r % 2)) * k + step * 16 + 2 * t + 8 * (r / 2);
      left[step % 2][r] = *reinterpret_cast<const uint32_t*>(from);
    }
  };
  float sum[32];
  fetch(0);
  load(0);
  for (int stage = 0; stage * 64 < k; ++stage) {
    cp_async_wait<0>();
    publish_to_wgmma();
    __syncthreads();  // this stage is here for all, and nobody still reads the one before the last
    fetch(stage + 1);
    for (int step = stage * kSteps; step < (stage + 1) * kSteps; ++step) {
      wgmma_fence();
      const unsigned char* const at = shared + stage % kStages * kMatrixBytes + step % kSteps * 32;
      wgmma_m64n64k16<T>(sum, left[step % 2], wgmma_descriptor(at), step > 0);
      wgmma_commit();
      wgmma_wait<1>();  // nobody reads the other registers
      load(step + 1);
    }
  }
  wgmma_wait<0>(sum);
  for (int i = 0; i < 32; ++i) {
    out[(row + 8 * (i / 2 % 2)) * kColumns + 8 * (i / 4) + 2 * t + i % 2] = sum[i];
  }
}

Tensor matmul_wgmma(const Tensor& a, const Tensor& b) {
  Tensor out = new_output(a, {128, kColumns}, ScalarType::Float);
  const Grid grid{dim3(1), dim3(kThreads), kStages * kMatrixBytes + kSwizzleBytes};
  const int k = static_cast<int>(a.size(1));
  const Stream stream("matmul_wgmma", a);
  if (a.scalar_type() == ScalarType::Half) {
    stream.launch(multiply_stages<__half>, grid, data<__half>(a), data<__half>(b), mutable_data<float>(out), k);
  } else {
    stream.launch(multiply_stages<__nv_bfloat16>, grid, data<__nv_bfloat16>(a), data<__nv_bfloat16>(b),
                  mutable_data<float>(out), k);
  }
  return out;
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(FERRUM_NAMESPACE, m) {
  m.def("matmul_wgmma(Tensor a, Tensor b) -> Tensor");
  m.def("multiply_registers_(Tensor a, Tensor x, Tensor(a!) d, int step, bool keep) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("matmul_wgmma", TORCH_BOX(&ferrum::cuda::matmul_wgmma));
  m.impl("multiply_registers_", TORCH_BOX(&ferrum::cuda::multiply_registers_));
}
