// The vector of 16 float32 lanes as plain loops, which a compiler turns into the vectors of the base architecture.
// Included by simd.h.
#pragma once

namespace ferrum::cpu::FERRUM_LEVEL {

struct Vec {
  float v[kLanes];
};

template <typename Function>
inline Vec per_lane(Function function) {
  Vec out;
  for (int64_t i = 0; i < kLanes; ++i) {
    out.v[i] = function(i);
  }
  return out;
}

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline Vec broadcast(float x) {
  return per_lane([&](int64_t) { return x; });
}
inline Vec operator+(Vec a, Vec b) {
  return per_lane([&](int64_t i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return per_lane([&](int64_t i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return per_lane([&](int64_t i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return per_lane([&](int64_t i) { return a.v[i] / b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return per_lane([&](int64_t i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return per_lane([&](int64_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
// Rounds twice: a fused one without the instruction is a library call per lane.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// In two factors, so that the exponent of each stays normal while the product may overflow or become subnormal.
inline Vec times_power_of_two(Vec a, Vec n) {
  return per_lane([&](int64_t i) {
    const int32_t exponent = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0;
    const int32_t half = exponent >> 1;
    const float first = from_bits(static_cast<uint32_t>(half + 127) << 23);
    return a.v[i] * first * from_bits(static_cast<uint32_t>(exponent - half + 127) << 23);
  });
}
inline uint32_t greater_mask(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int64_t i = 0; i < kLanes; ++i) {
    mask |= static_cast<uint32_t>(a.v[i] > b.v[i]) << i;
  }
  return mask;
}

inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return from_bits(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13);
}
inline BFloat16 narrow(float x, BFloat16) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = x == x ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x400000u;
  return {static_cast<uint16_t>(rounded >> 16)};
}
inline Half narrow(float x, Half) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000u;
  const uint32_t magnitude = to_bits(x) & 0x7fffffffu;
  uint32_t bits;
  if (magnitude > 0x7f800000u) {
    bits = 0x7e00u;
  } else if (magnitude >= to_bits(65520.0f)) {
    bits = 0x7c00u;
  } else if (magnitude < to_bits(0x1p-14f)) {
    // Beside 0.5 one unit in the last place is 2^-24, the unit of subnormal halves: the addition does the rounding.
    bits = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  } else {
    bits = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(sign | bits)};
}

inline Vec load(const float* from) {
  return per_lane([&](int64_t i) { return from[i]; });
}
inline void store(float* to, Vec a) { __builtin_memcpy(to, a.v, sizeof(a.v)); }
template <typename T>
inline Vec load(const T* from) {
  return per_lane([&](int64_t i) { return widen(from[i]); });
}
template <typename T>
inline void store(T* to, Vec a) {
  for (int64_t i = 0; i < kLanes; ++i) {
    to[i] = narrow(a.v[i], T{});
  }
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
