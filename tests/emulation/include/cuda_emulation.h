// CUDA's names for the kernels of csrc/cuda, compiled as plain C++. NVIDIA's own headers give the vector types, half
// and bfloat16, which work on the host; this file gives what they leave to nvcc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "ptx_emulation.h"
#include "simt.h"
#include "wgmma_emulation.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ thread_local  // in a function: one object for the block. All of them lie in the library's TLS block.
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::ferrum::emulation::this_thread())
#define blockIdx (::ferrum::emulation::this_block())
#define blockDim (::ferrum::emulation::this_launch().block)
#define gridDim (::ferrum::emulation::this_launch().grid)
constexpr int warpSize = 32;

namespace ferrum::emulation {

void run_cuda(const char* name, dim3 grid, dim3 block, size_t shared_bytes, bool early, std::function<void()> kernel);

// What <<<grid, block, shared_bytes>>> does, at once; early: with programmatic stream serialization.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, bool early,
            Arguments&&... arguments) {
  run_cuda(name, grid, block, shared_bytes, early, [&] { kernel(arguments...); });
}

// What all threads of a block get: in how many of them `predicate` holds.
inline int count_true(int predicate, const char* name, Site site) {
  struct Operand {
    int in, out;
  } operand{predicate, 0};
  block_collective(name, site, operand, [](Operand* const* threads) {
    const auto end = threads + threads_in_block();
    const int count = std::count_if(threads, end, [](const Operand* t) { return t != nullptr && t->in != 0; });
    std::for_each(threads, end, [=](Operand* t) { t != nullptr ? void(t->out = count) : void(); });
  });
  return operand.out;
}

// What lane `lane` gets: `function(values, lane)`, where values[i] points to what lane i gives, or is null.
template <class T, class Function>
auto exchange(const char* name, Site site, unsigned mask, T value, const Function& function) {
  struct Operand {
    T in;
    decltype(function(static_cast<const T* const*>(nullptr), 0)) out;
  } operand{value, {}};
  warp_collective(name, site, mask, operand, [&](Operand* const* lanes) {
    const T* values[warpSize];
    std::transform(lanes, lanes + warpSize, values, [](Operand* o) { return o != nullptr ? &o->in : nullptr; });
    for (int lane = 0; lane < warpSize; ++lane) {
      if (lanes[lane] != nullptr) {
        lanes[lane]->out = function(values, lane);
      }
    }
  });
  return operand.out;
}

// The lanes for whose value `predicate(value, this lane's)` holds.
template <class T, class Predicate>
unsigned vote(const char* name, Site site, unsigned mask, T value, const Predicate& predicate) {
  return exchange(name, site, mask, value, [&](const T* const* values, int lane) {
    unsigned votes = 0;
    for (int i = 0; i < warpSize; ++i) {
      votes |= values[i] != nullptr && predicate(*values[i], *values[lane]) ? 1u << i : 0u;
    }
    return votes;
  });
}

template <class T, class Function>
T reduce(const char* name, Site site, unsigned mask, T value, const Function& function) {
  return exchange(name, site, mask, value, [&](const T* const* values, int lane) {
    T result = *values[lane];
    for (int i = 0; i < warpSize; ++i) {
      result = values[i] != nullptr && i != lane ? function(result, *values[i]) : result;
    }
    return result;
  });
}

// `source(first, last)` gives the lane to read, of the segment of `width` lanes that holds this one.
template <class T, class Source>
T shuffle(const char* name, Site site, unsigned mask, T value, int width, const Source& source) {
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0) {
    fail(std::string(name) + ": width " + std::to_string(width) + " is no power of two up to 32");
  }
  const int first = static_cast<int>(this_lane()) & ~(width - 1);
  const std::pair<T, int> given{value, source(first, first + width - 1)};
  return exchange(name, site, mask, given, [=](const std::pair<T, int>* const* values, int lane) {
    const int from = values[lane]->second;
    if (values[from] == nullptr) {
      fail(std::string(name) + ": lane " + std::to_string(lane) + " reads lane " + std::to_string(from) +
           ", which takes no part");
    }
    return values[from]->first;
  });
}

}  // namespace ferrum::emulation

// ---- barriers and votes. The default argument is where the call stands: threads that meet at different ones diverged.

#define FERRUM_AT ::ferrum::emulation::Site site = ::ferrum::emulation::Site::here()

inline void __syncthreads(FERRUM_AT) { ferrum::emulation::count_true(0, "__syncthreads", site); }
inline int __syncthreads_count(int predicate, FERRUM_AT) {
  return ferrum::emulation::count_true(predicate, "__syncthreads_count", site);
}
inline int __syncthreads_or(int predicate, FERRUM_AT) {
  return ferrum::emulation::count_true(predicate, "__syncthreads_or", site) != 0;
}
inline int __syncthreads_and(int predicate, FERRUM_AT) {
  return ferrum::emulation::count_true(predicate == 0, "__syncthreads_and", site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FERRUM_AT) {
  ferrum::emulation::vote("__syncwarp", site, mask, 0, [](int, int) { return true; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FERRUM_AT) {
  return ferrum::emulation::vote("__ballot_sync", site, mask, predicate, [](int p, int) { return p != 0; });
}
inline int __any_sync(unsigned mask, int predicate, FERRUM_AT) {
  return ferrum::emulation::vote("__any_sync", site, mask, predicate, [](int p, int) { return p != 0; }) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FERRUM_AT) {
  return ferrum::emulation::vote("__all_sync", site, mask, predicate, [](int p, int) { return p == 0; }) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, FERRUM_AT) {
  return ferrum::emulation::vote("__match_any_sync", site, mask, value, [](T a, T b) { return a == b; });
}
// Hardware may name any set of lanes that holds the caller; a correct kernel works with the smallest.
inline unsigned __activemask() { return 1u << ferrum::emulation::this_lane(); }

template <class T>
T __reduce_add_sync(unsigned mask, T value, FERRUM_AT) {
  return ferrum::emulation::reduce("__reduce_add_sync", site, mask, value, [](T a, T b) { return T(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, FERRUM_AT) {
  return ferrum::emulation::reduce("__reduce_max_sync", site, mask, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, FERRUM_AT) {
  return ferrum::emulation::reduce("__reduce_min_sync", site, mask, value, [](T a, T b) { return a < b ? a : b; });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, FERRUM_AT) {
  return ferrum::emulation::shuffle("__shfl_sync", site, mask, value, width,
                                    [=](int first, int) { return first | (from & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, FERRUM_AT) {
  const int lane = ferrum::emulation::this_lane(), from = lane - static_cast<int>(delta);
  return ferrum::emulation::shuffle("__shfl_up_sync", site, mask, value, width,
                                    [=](int first, int) { return from < first ? lane : from; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FERRUM_AT) {
  const int lane = ferrum::emulation::this_lane(), from = lane + static_cast<int>(delta);
  return ferrum::emulation::shuffle("__shfl_down_sync", site, mask, value, width,
                                    [=](int, int last) { return from > last ? lane : from; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, FERRUM_AT) {
  const int lane = ferrum::emulation::this_lane(), from = lane ^ bits;
  return ferrum::emulation::shuffle("__shfl_xor_sync", site, mask, value, width,
                                    [=](int, int last) { return from > last ? lane : from; });
}

// ---- memory

inline void __threadfence() {}
[[noreturn]] inline void __trap() { ferrum::emulation::fail("__trap"); }

template <class T, class Function>
T ferrum_atomic(T* at, const Function& function) {
  ferrum::emulation::maybe_yield();  // another thread may come between any two of this one's atomics
  const T old = *at;
  *at = function(old);
  return old;
}
template <class T>
T atomicAdd(T* at, std::common_type_t<T> x) {
  return ferrum_atomic(at, [=](T old) { return T(old + x); });
}
template <class T>
T atomicOr(T* at, std::common_type_t<T> x) {
  return ferrum_atomic(at, [=](T old) { return T(old | x); });
}
template <class T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> x) {
  ferrum::emulation::yield();  // locks spin on it
  return ferrum_atomic(at, [=](T old) { return old == expected ? x : old; });
}

// ---- arithmetic

template <class T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }  // of a number and a NaN, the number
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }

// Conversions of CUDA saturate, and make 0 of a NaN.
inline int ferrum_saturate(double x) {
  return std::isnan(x) ? 0 : static_cast<int>(fmin(fmax(x, -2147483648.0), 2147483647.0));
}
inline int __float2int_rn(float x) { return ferrum_saturate(nearbyintf(x)); }
inline int __float2int_rz(float x) { return ferrum_saturate(truncf(x)); }
inline int __float2int_rd(float x) { return ferrum_saturate(floorf(x)); }
inline int __float2int_ru(float x) { return ferrum_saturate(ceilf(x)); }

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) {
    reversed |= (x >> i & 1u) << (31 - i);
  }
  return reversed;
}
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<unsigned long long>(x) * y >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  return ferrum::emulation::prmt(x, y, selector & 0x7777u);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  }
  return c;
}

// Products of two half or bfloat16 numbers are exact in float64, and so, but for the rarest ties, is the sum.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                        __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(static_cast<double>(__bfloat162float(a)) * __bfloat162float(b) + __bfloat162float(c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                            __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}
