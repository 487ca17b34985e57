// Matrix products of a warpgroup (four warps, the first a multiple of four) on Hopper's tensor cores, sm_90a only
// (PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"). They run beside the threads.
//
// With g = lane / 4, t = lane % 4, w the warp in its warpgroup ("Matrix Fragments for wgmma.mma_async.m64nNk16"):
//   A, 64 rows in registers, register r: row 16 * w + g + 8 * (r % 2), columns 2 * t + 8 * (r / 2) and the next
//   D, number i:                         row 16 * w + g + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * t + i % 2
// so each warp's A and D are those of mma.m16n8k16 (mma.cuh), D eight columns at a time. B lies in shared memory.
//
// Between the product and wgmma_wait its registers are the hardware's: D must not be touched, nor A written, nor the
// shared memory of B. What threads write to shared memory it sees only behind a publish_to_wgmma of theirs and a
// barrier. A and D are as they should be only behind wgmma_fence, which parts them from earlier accesses.
#pragma once

#include "cuda/ptx.cuh"

// Code for another device: kernels are empty there, and Stream::has_code is false.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FERRUM_HAS_WGMMA 1
#else
#define FERRUM_HAS_WGMMA 0
#endif

namespace ferrum::cuda {

// Makes this thread's writes to shared memory up to here, and its copies as far as waited for, visible to products
// behind the next barrier: they read through another proxy than threads and cp.async write through.
__device__ __forceinline__ void publish_to_wgmma() {
#ifndef __CUDACC__
  emulation::publish_shared();
#elif FERRUM_HAS_WGMMA
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_fence() {
#ifndef __CUDACC__
  emulation::wgmma_fence();
#elif FERRUM_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

// Makes a group of the products since the last one.
__device__ __forceinline__ void wgmma_commit() {
#ifndef __CUDACC__
  emulation::wgmma_commit();
#elif FERRUM_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}

template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < N; ++i) {
    asm volatile("" : "+f"(d[i])::"memory");
  }
#endif
}

template <int M, int N>
__device__ __forceinline__ void settle(float (&d)[M][N]) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
    settle(d[i]);
  }
}

// Waits until at most `InFlight` groups, the latest ones, are under way. `d` are the results that are read from here
// on: the compiler, which knows of no wait, must not read them earlier.
template <int InFlight, typename... D>
__device__ __forceinline__ void wgmma_wait(D&... d) {
#ifndef __CUDACC__
  emulation::wgmma_wait(InFlight);
#elif FERRUM_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(InFlight) : "memory");
#endif
  (settle(d), ...);
}

constexpr int kSwizzleBytes = 1024;  // of eight rows of 128 bytes, whose 16-byte pieces p of row r lie at p ^ r

// Of a B of 16-bit numbers in rows (columns of the product) of 64 numbers along K, swizzled as above and aligned to
// kSwizzleBytes ("Matrix Descriptor Format"; the leading dimension is not used in this layout). The start of a step of
// 16 rows of K, 32 bytes on, is swizzled with the address.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* b) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStride = uint64_t{kSwizzleBytes >> 4} << 32;
  return kSwizzle128 | kStride | uint64_t{1} << 16 | (shared_address(b) & 0x3ffff) >> 4;
}

#if defined(__CUDACC__) && FERRUM_HAS_WGMMA
#define FERRUM_FLOATS(d, i)                                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FERRUM_WGMMA_M64N64K16(type)                                                                           \
  asm volatile(                                                                                                \
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %37, 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                              \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, keep, 1, 1, 0;\n}\n"      \
      : FERRUM_FLOATS(d, 0), FERRUM_FLOATS(d, 8), FERRUM_FLOATS(d, 16), FERRUM_FLOATS(d, 24)                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(keep)))
#endif

// D = A B, plus D where `keep`: A 64x16, B 16x64 of T = __half or __nv_bfloat16. `a` must outlive the wait.
template <typename T>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool keep) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
#ifndef __CUDACC__
  emulation::wgmma<T>(kHalf ? "wgmma.m64n64k16.f16" : "wgmma.m64n64k16.bf16", d, 64, a, b, keep);
#elif FERRUM_HAS_WGMMA
  if constexpr (kHalf) {
    FERRUM_WGMMA_M64N64K16("f16");
  } else {
    FERRUM_WGMMA_M64N64K16("bf16");
  }
#endif
}

}  // namespace ferrum::cuda
