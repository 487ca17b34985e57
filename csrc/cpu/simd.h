// One vector of 16 float32 lanes at three instruction levels, and what the families share around it.
//
// Every family has a `<family>_kernels.h`, compiled once per level by a thin file that defines FERRUM_LEVEL_AVX512,
// FERRUM_LEVEL_AVX2 or neither before it includes this header. All that depends on the level lives in a namespace of
// the level's name: an inline function of one level must never stand in for that of another when the library is
// linked. For the same reason kernels use no function templates of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ferrum::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Rows of this many elements that make one task worth a thread: about 32 K elements, a few microseconds.
inline int64_t rows_per_task(int64_t row_elements) {
  const int64_t rows = 32768 / (row_elements > 0 ? row_elements : 1);
  return rows > 0 ? rows : 1;
}

}  // namespace ferrum::cpu

// Declares a kernel of every level, and picks the one of the level in force.
#if defined(__x86_64__)
#define FERRUM_DECLARE_LEVELS(...) \
  namespace generic {              \
  __VA_ARGS__                      \
  }                                \
  namespace avx2 {                 \
  __VA_ARGS__                      \
  }                                \
  namespace avx512 {               \
  __VA_ARGS__                      \
  }
#define FERRUM_FOR_LEVEL(function) \
  (active_isa() == Isa::avx512 ? &avx512::function : active_isa() == Isa::avx2 ? &avx2::function : &generic::function)
#else
#define FERRUM_DECLARE_LEVELS(...) \
  namespace generic {              \
  __VA_ARGS__                      \
  }
#define FERRUM_FOR_LEVEL(function) (&generic::function)
#endif

// Stands at the end of a level's file.
#define FERRUM_END_LEVEL

#if defined(FERRUM_LEVEL_AVX512)
#define FERRUM_LEVEL avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#undef FERRUM_END_LEVEL
#define FERRUM_END_LEVEL _Pragma("clang attribute pop")
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#elif defined(FERRUM_LEVEL_AVX2)
#define FERRUM_LEVEL avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#undef FERRUM_END_LEVEL
#define FERRUM_END_LEVEL _Pragma("clang attribute pop")
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#elif defined(FERRUM_LEVEL_GENERIC)
#define FERRUM_LEVEL generic
#endif

#if defined(FERRUM_LEVEL)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the "undefined" operands inside its own intrinsics for uninitialised variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace ferrum::cpu::FERRUM_LEVEL {

constexpr int64_t kLanes = 16;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace ferrum::cpu::FERRUM_LEVEL

// Vec: broadcast, + - * /, fma(a, b, c) = a * b + c, times_power_of_two(a, n) = a * 2^n for integers n,
// greater_mask(a, b) with bit i for lane i, load and store of float, Half and BFloat16 rounding to nearest even.
// min and max return b where the comparison is false, hence where a or b is NaN.
#if defined(FERRUM_LEVEL_AVX512)
#include "cpu/simd_avx512.h"
#elif defined(FERRUM_LEVEL_AVX2)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_generic.h"
#endif

namespace ferrum::cpu::FERRUM_LEVEL {

#if !defined(FERRUM_LEVEL_AVX512)
// The first `count` (at most 16) elements, zeros behind them.
template <typename T>
inline Vec load(const T* from, int64_t count) {
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, from, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}
template <typename T>
inline void store(T* to, Vec a, int64_t count) {
  T lanes[kLanes];
  store(lanes, a);
  __builtin_memcpy(to, lanes, static_cast<size_t>(count) * sizeof(T));
}
#endif

// Sum and largest of the lanes. Lane i meets i+8, then i+4, i+2, i+1: one order at every level.
#if defined(FERRUM_LEVEL_AVX512) || defined(FERRUM_LEVEL_AVX2)
inline float reduce_add(Vec a) {
  const __m256 eight = add_halves(a);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(Vec a) {
  const __m256 eight = max_halves(a);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
inline float reduce_add(Vec a) {
  const Floats four = add_parts(a);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
inline float reduce_max(Vec a) {
  const Floats four = max_parts(a);
  const Floats two = larger(four, shuffle<2, 3, 0, 1>(four, four));
  return two[0] > two[1] ? two[0] : two[1];
}
#endif

// e^x within about one unit in the last place: x = n ln 2 + r with |r| <= ln(2)/2, then the Taylor series of e^r, whose
// first term left out, r^8/8!, is below 6e-9. NaN gives NaN; the clamp covers infinities and overflow to both sides.
inline Vec exp(Vec x) {
  const Vec clamped = min(broadcast(89.0f), max(broadcast(-104.0f), x));
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = fma(clamped, broadcast(1.44269504f), magic) - magic;
  Vec r = fma(n, broadcast(-0.693359375f), clamped);  // ln 2 in two parts, n times the first is exact
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec sum = broadcast(1.0f / 5040.0f);
  sum = fma(sum, r, broadcast(1.0f / 720.0f));
  sum = fma(sum, r, broadcast(1.0f / 120.0f));
  sum = fma(sum, r, broadcast(1.0f / 24.0f));
  sum = fma(sum, r, broadcast(1.0f / 6.0f));
  sum = fma(sum, r, broadcast(0.5f));
  sum = fma(sum, r, broadcast(1.0f));
  sum = fma(sum, r, broadcast(1.0f));
  return times_power_of_two(sum, n);
}

// Calls function(i, count) for the elements [i, i + count) of a row: whole vectors, then what is left.
template <typename Function>
inline void for_vectors(int64_t size, Function function) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    function(i, kLanes);
  }
  if (i < size) {
    function(i, size - i);
  }
}

// As load and store of whole vectors unless count says otherwise (it is a constant in the main loop of for_vectors).
template <typename T>
inline Vec load_some(const T* from, int64_t count) {
  return count == kLanes ? load(from) : load(from, count);
}
template <typename T>
inline void store_some(T* to, Vec a, int64_t count) {
  if (count == kLanes) {
    store(to, a);
  } else {
    store(to, a, count);
  }
}

// function(T{}) with the element type of a run-time dtype.
template <typename Function>
inline void with_type(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::float32:
      return function(float{});
    case Dtype::float16:
      return function(Half{});
    case Dtype::bfloat16:
      return function(BFloat16{});
  }
}

// function(T{}, W{}) where a vector of weights has the activations' dtype T or is float32.
template <typename Function>
inline void with_types(Dtype dtype, bool float_weight, Function function) {
  with_type(dtype, [&](auto t) {
    if (float_weight) {
      function(t, float{});
    } else {
      function(t, t);
    }
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
#endif  // FERRUM_LEVEL
