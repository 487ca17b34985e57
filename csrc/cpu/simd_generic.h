// The vector of 16 float32 lanes as four of the compilers' own vectors of 16 bytes, a size that every 64-bit processor
// has. Included by simd.h.
#pragma once

#include <cmath>

namespace ferrum::cpu::FERRUM_LEVEL {

using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
using Bits = uint32_t __attribute__((vector_size(16)));

// At any address.
template <typename Vector>
inline Vector load_vector(const void* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
template <typename Vector>
inline void store_vector(void* to, Vector v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// Lanes of a (0 to 3) and of b (4 to 7).
template <int I, int J, int K, int L, typename Vector>
inline Vector shuffle(Vector a, Vector b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I, J, K, L);
#else
  return __builtin_shuffle(a, b, Ints{I, J, K, L});
#endif
}

inline Floats as_floats(Bits a) { return reinterpret_cast<Floats>(a); }
inline Bits as_bits(Floats a) { return reinterpret_cast<Bits>(a); }
inline Floats all(float x) { return Floats{x, x, x, x}; }
inline Bits all_bits(uint32_t x) { return Bits{x, x, x, x}; }

// Rounds twice where the processor has no fused operation: without the instruction it is a library call per lane.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(FP_FAST_FMAF)
  return Floats{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]), __builtin_fmaf(a[2], b[2], c[2]),
                __builtin_fmaf(a[3], b[3], c[3])};
#else
  return a * b + c;
#endif
}

constexpr int kParts = 4;

struct Vec {
  Floats v[kParts];
};

// Spelt out: a loop over the parts would keep them in memory until the compiler unrolls it.
template <typename Function>
inline Vec per_part(Function function) {
  return {{function(0), function(1), function(2), function(3)}};
}

inline Vec broadcast(float x) {
  return per_part([&](int) { return all(x); });
}
inline Vec operator+(Vec a, Vec b) {
  return per_part([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return per_part([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return per_part([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return per_part([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return per_part([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return per_part([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return per_part([&](int i) { return multiply_add(a.v[i], b.v[i], c.v[i]); });
}
// In two factors, so that the exponent of each stays normal while the product may overflow or become subnormal.
inline Vec times_power_of_two(Vec a, Vec n) {
  return per_part([&](int i) {
    const Floats number = n.v[i] == n.v[i] ? n.v[i] : all(0.0f);
    const Ints exponent = __builtin_convertvector(number, Ints);
    const Ints half = exponent >> 1;
    const Bits first = reinterpret_cast<Bits>(half + 127) << 23;
    const Bits second = reinterpret_cast<Bits>(exponent - half + 127) << 23;
    return a.v[i] * as_floats(first) * as_floats(second);
  });
}
inline uint32_t greater_mask(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int i = 0; i < kParts; ++i) {
    const Ints greater = a.v[i] > b.v[i];
    for (int lane = 0; lane < 4; ++lane) {
      mask |= (static_cast<uint32_t>(greater[lane]) & 1u) << (4 * i + lane);
    }
  }
  return mask;
}

// Of lanes and a bound below 2^31, which compare as signed numbers.
inline Ints below(Bits a, uint32_t bound) { return reinterpret_cast<Ints>(a) < static_cast<int32_t>(bound); }

// Every case is computed and one chosen.
inline Floats widen(Bits x, BFloat16) { return as_floats(x << 16); }
inline Floats widen(Bits x, Half) {
  constexpr uint32_t kRebias = 112u << 23;  // between the exponents of the two formats
  const Bits magnitude = x & 0x7fffu, shifted = magnitude << 13;
  // Below the smallest normal number the mantissa lacks its leading one: given to it, it is taken off again.
  const Bits subnormal = as_bits(as_floats(shifted + (kRebias + (1u << 23))) - 0x1p-14f);
  const Bits finite = below(magnitude, 0x400u) ? subnormal : shifted + kRebias;
  const Bits bits = below(magnitude, 0x7c00u) ? finite : shifted + 2 * kRebias;  // infinity or NaN
  return as_floats(bits | (x & 0x8000u) << 16);
}
inline Bits narrow(Floats x, BFloat16) {
  const Bits bits = as_bits(x);
  const Bits rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return (x == x ? rounded : bits | 0x400000u) >> 16;
}
inline Bits narrow(Floats x, Half) {
  const Bits sign = as_bits(x) >> 16 & 0x8000u, magnitude = as_bits(x) & 0x7fffffffu;
  const Bits normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Beside 0.5 one unit in the last place is 2^-24, the unit of subnormal halves: the addition does the rounding.
  const Bits subnormal = as_bits(as_floats(magnitude) + 0.5f) - as_bits(all(0.5f));
  const Bits finite = below(magnitude, 0x38800000u) ? subnormal : normal;  // 2^-14
  // Infinity from 65520 on, half a step above the largest.
  const Bits rounded = below(magnitude, 0x477ff000u) ? finite : all_bits(0x7c00u);
  return sign | (x == x ? rounded : all_bits(0x7e00u));
}

inline Vec load(const float* from) {
  return per_part([&](int i) { return load_vector<Floats>(from + 4 * i); });
}
inline void store(float* to, Vec a) {
  store_vector(to, a.v[0]);
  store_vector(to + 4, a.v[1]);
  store_vector(to + 8, a.v[2]);
  store_vector(to + 12, a.v[3]);
}
template <typename T>
inline Vec load(const T* from) {
  uint32_t bits[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    bits[i] = from[i].bits;
  }
  return per_part([&](int i) { return widen(load_vector<Bits>(bits + 4 * i), T{}); });
}
template <typename T>
inline void store(T* to, Vec a) {
  uint32_t bits[kLanes];
  for (int i = 0; i < kParts; ++i) {
    store_vector(bits + 4 * i, narrow(a.v[i], T{}));
  }
  for (int64_t i = 0; i < kLanes; ++i) {
    to[i].bits = static_cast<uint16_t>(bits[i]);
  }
}

// For simd.h's reductions.
inline Floats add_parts(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats max_parts(Vec a) { return larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3])); }

}  // namespace ferrum::cpu::FERRUM_LEVEL
