// Symmetric int8 quantisation of the heads of one token.
#include "cpu/kv_cache.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

inline Vec absolute(Vec x) { return max(x, broadcast(0.0f) - x); }

// Integers in -127..127, held as floats, as bytes.
inline void store_codes(int8_t* to, Vec integers, int64_t count) {
#if defined(FERRUM_LEVEL_AVX512)
  _mm_mask_storeu_epi8(to, first_lanes(count), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(integers.v)));
#elif defined(FERRUM_LEVEL_AVX2)
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(integers.low), _mm256_cvtps_epi32(integers.high));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  int8_t codes[kLanes];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes),
                   _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
  __builtin_memcpy(to, codes, static_cast<size_t>(count));
#else
  float lanes[kLanes];
  store(lanes, integers);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<int8_t>(lanes[i]);
  }
#endif
}

// Codes of one head; the scale belongs to it. An element that is not finite
// leaves no meaningful scale: the head then gets codes 0 and scale NaN, so that
// it reads back as NaN.
template <typename T>
inline float quantize_head(const T* x, int64_t size, int8_t* codes) {
  Vec largest = broadcast(1e-8f);
  Vec finite = broadcast(0.0f);  // becomes NaN at the first element that is NaN or infinite
  for_vectors(size, [&](int64_t i, int64_t count) {
    const Vec value = load_some(x + i, count);
    largest = max(absolute(value), largest);
    finite = fma(value, broadcast(0.0f), finite);
  });
  const float probe = reduce_add(finite);
  if (probe != probe) {
    __builtin_memset(codes, 0, static_cast<size_t>(size));
    return probe;
  }
  const float scale = reduce_max(largest) / 127.0f;
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest even integer
  for_vectors(size, [&](int64_t i, int64_t count) {
    const Vec ratio = load_some(x + i, count) / broadcast(scale);
    const Vec rounded = ratio + magic - magic;
    store_codes(codes + i, min(broadcast(127.0f), max(broadcast(-127.0f), rounded)), count);
  });
  return scale;
}

}  // namespace

void quantize_token(const QuantizedRows& rows, int64_t token, int64_t slot) {
  with_type(rows.dtype, [&](auto t) {
    const auto* x = static_cast<const decltype(t)*>(rows.x) + token * rows.token_stride;
    for (int64_t h = 0; h < rows.heads; ++h) {
      const int64_t row = slot * rows.heads + h;
      rows.scales[row] = quantize_head(x + h * rows.head_stride, rows.head_dim, rows.codes + row * rows.head_dim);
    }
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
