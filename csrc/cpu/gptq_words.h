// Vectors of 16 packed words at the level in force, beside the floats of
// simd.h.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu::FERRUM_LEVEL {

// plus_two_to_23(words, mask) is the float 2^23 + (word & mask), for masks
// below 2^23.
constexpr uint32_t kBitsOfTwoTo23 = 0x4b000000u;

#if defined(FERRUM_LEVEL_AVX512)

struct Words {
  __m512i v;
};

inline Words broadcast_words(uint32_t word) { return {_mm512_set1_epi32(static_cast<int>(word))}; }
inline Words load_all_words(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
inline Words shift_right(Words a, int by) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(by))}; }
// (high:low) >> by for 0 < by < 32
inline Words shift_pair(Words low, Words high, int by) {
  const __m512i upper = _mm512_sll_epi32(high.v, _mm_cvtsi32_si128(32 - by));
  return {_mm512_or_si512(shift_right(low, by).v, upper)};
}
inline Vec plus_two_to_23(Words a, Words mask) {
  const __m512i exponent = _mm512_set1_epi32(static_cast<int>(kBitsOfTwoTo23));
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(a.v, mask.v, exponent, 0xea))};  // a & mask | exponent
}

#elif defined(FERRUM_LEVEL_AVX2)

struct Words {
  __m256i low, high;
};

inline Words broadcast_words(uint32_t word) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(word));
  return {all, all};
}
inline Words load_all_words(const int32_t* from) {
  const __m256i* vectors = reinterpret_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
}
inline Words shift_right(Words a, int by) {
  const __m128i count = _mm_cvtsi32_si128(by);
  return {_mm256_srl_epi32(a.low, count), _mm256_srl_epi32(a.high, count)};
}
inline Words shift_pair(Words low, Words high, int by) {
  const Words lower = shift_right(low, by);
  const __m128i count = _mm_cvtsi32_si128(32 - by);
  return {_mm256_or_si256(lower.low, _mm256_sll_epi32(high.low, count)),
          _mm256_or_si256(lower.high, _mm256_sll_epi32(high.high, count))};
}
inline Vec plus_two_to_23(Words a, Words mask) {
  const __m256i exponent = _mm256_set1_epi32(static_cast<int>(kBitsOfTwoTo23));
  return {_mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(a.low, mask.low), exponent)),
          _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(a.high, mask.high), exponent))};
}

#else

struct Words {
  Bits v[kParts];
};

template <typename Function>
inline Words words_per_part(Function function) {
  return {{function(0), function(1), function(2), function(3)}};
}
inline Words broadcast_words(uint32_t word) {
  return words_per_part([&](int) { return all_bits(word); });
}
inline Words load_all_words(const int32_t* from) {
  return words_per_part([&](int i) { return load_vector<Bits>(from + 4 * i); });
}
inline Words shift_right(Words a, int by) {
  return words_per_part([&](int i) { return a.v[i] >> static_cast<uint32_t>(by); });
}
inline Words shift_pair(Words low, Words high, int by) {
  const uint32_t right = static_cast<uint32_t>(by), left = 32 - right;
  return words_per_part([&](int i) { return low.v[i] >> right | high.v[i] << left; });
}
inline Vec plus_two_to_23(Words a, Words mask) {
  return per_part([&](int i) { return as_floats((a.v[i] & mask.v[i]) | kBitsOfTwoTo23); });
}

#endif

// The first `count` words, of which there may be more than 16 or none; zeros
// behind them.
inline Words load_words(const int32_t* from, int64_t count) {
  if (count >= kLanes) {
    return load_all_words(from);
  }
  int32_t lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    lanes[i] = from[i];
  }
  return load_all_words(lanes);
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
