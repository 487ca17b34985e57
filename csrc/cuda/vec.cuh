// N consecutive elements moved by one memory instruction, and their values in float32.
#pragma once

#include "cuda/launch.h"

namespace ferrum::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T, int N>
struct alignas(N * sizeof(T)) Vec {
  T values[N];
};

template <int N, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  const Vec<T, N> packed = *reinterpret_cast<const Vec<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = to_float(packed.values[i]);
  }
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Vec<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    packed.values[i] = from_float<T>(from[i]);
  }
  *reinterpret_cast<Vec<T, N>*>(to) = packed;
}

// A row of `size` elements of any alignment may be read as vectors of N where this holds for every pointer and stride.
template <int N, typename T>
bool can_vectorize(const void* base, int64_t stride, int64_t size) {
  return size % N == 0 && stride % N == 0 && reinterpret_cast<uintptr_t>(base) % (N * sizeof(T)) == 0;
}

// Calls f(T{}) with the device type of `dtype`.
template <typename F>
void for_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::float16:
      return f(__half{});
    case Dtype::bfloat16:
      return f(__nv_bfloat16{});
  }
}

}  // namespace ferrum::cuda
