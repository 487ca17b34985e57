// The vector of 16 float32 lanes for AVX512. Included by simd.h.
#pragma once

namespace ferrum::cpu::FERRUM_LEVEL {

struct Vec {
  __m512 v;
};

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec times_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline uint32_t greater_mask(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }

inline __m256 add_halves(Vec a) { return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }
inline __m256 max_halves(Vec a) { return _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }

inline __m512 widen(__m256i bits, Half) { return _mm512_cvtph_ps(bits); }
inline __m512 widen(__m256i bits, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m256i narrow(__m512 v, Half) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
inline __m256i narrow(__m512 v, BFloat16) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

inline Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline Vec load(const float* from, int64_t count) { return {_mm512_maskz_loadu_ps(first_lanes(count), from)}; }
inline void store(float* to, Vec a) { _mm512_storeu_ps(to, a.v); }
inline void store(float* to, Vec a, int64_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), a.v); }
template <typename T>
inline Vec load(const T* from) {
  return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), T{})};
}
template <typename T>
inline Vec load(const T* from, int64_t count) {
  return {widen(_mm256_maskz_loadu_epi16(first_lanes(count), from), T{})};
}
template <typename T>
inline void store(T* to, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(a.v, T{}));
}
template <typename T>
inline void store(T* to, Vec a, int64_t count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), narrow(a.v, T{}));
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
