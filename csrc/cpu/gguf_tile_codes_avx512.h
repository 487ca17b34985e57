// What a chunk of a GGUF tile holds, in AVX512 registers with the tile's 16 rows for lanes. The layout is in
// common/gguf.h.
#pragma once

#include "cpu/gguf_blocks_avx512.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

template <Type T>
constexpr gguf::Tiling kTiling = gguf::tiling_of(T);

inline __m512i load64(const void* from) { return _mm512_loadu_si512(from); }
inline __m512 load_halves(const uint8_t* from) { return _mm512_cvtph_ps(load32(from)); }

template <int Shift>
inline __m512i shift_right(__m512i v) {
  if constexpr (Shift > 0) {
    return _mm512_srli_epi16(v, Shift);
  } else if constexpr (Shift < 0) {
    return _mm512_slli_epi16(v, -Shift);
  } else {
    return v;
  }
}

// A line of codes. Compilers read it again for each vector that has a part in it unless it is `Kept` in a register.
template <bool Kept>
inline __m512i load_line(const uint8_t* from) {
  __m512i line = load64(from);
  if constexpr (Kept) {
    __asm__("" : "+v"(line));
  }
  return line;
}

// Vector P of a run: elements 4P ... 4P + 3 of the 16 columns.
template <Type T, int P, bool KeepLines = false>
inline __m512i codes(const uint8_t* run) {
  constexpr int low_bits = kTiling<T>.low_bits, high_bits = kTiling<T>.high_bits;
  if constexpr (low_bits == 8) {
    return load64(run + 64 * P);
  }
  constexpr int at = P * low_bits, high_at = P * high_bits;
  const __m512i low_mask = _mm512_set1_epi8((1 << low_bits) - 1);
  const __m512i low = load_line<KeepLines>(run + at / 8 * 64);
  __m512i result = _mm512_and_si512(shift_right<at % 8>(low), low_mask);
  if constexpr (high_bits != 0) {
    const __m512i line = load_line<KeepLines>(run + 64 * low_bits + high_at / 8 * 64);
    const __m512i high_mask = _mm512_set1_epi8(((1 << high_bits) - 1) << low_bits);
    // (shifted & mask) | result
    result = _mm512_ternarylogic_epi32(shift_right<high_at % 8 - low_bits>(line), high_mask, result, 0xea);
  }
  if constexpr (kTiling<T>.table == gguf::kNonlinear) {
    const __m512i table = _mm512_broadcast_i32x4(load16(gguf::kNonlinear));
    result = _mm512_xor_si512(_mm512_shuffle_epi8(table, result), _mm512_set1_epi8(-128));
  } else if constexpr (kTiling<T>.table == gguf::kE2M1) {
    const __m512i table = _mm512_broadcast_i32x4(load16(gguf::kE2M1));
    result = _mm512_add_epi8(_mm512_shuffle_epi8(table, result), _mm512_set1_epi8(kTraitsOf<T>.zero));
  }
  return result;
}

// 16 integer scales or mins.
template <Type T>
inline __m512i widen(const uint8_t* bytes) {
  return kTiling<T>.is_signed ? _mm512_cvtepi8_epi32(load16(bytes)) : _mm512_cvtepu8_epi32(load16(bytes));
}

// The scales of block j of a chunk.
template <Type T>
inline __m512 block_scales(const uint8_t* chunk, int64_t j) {
  if constexpr (kTiling<T>.halves == 8) {
    return load_halves(chunk + kTiling<T>.d_at() + j * 32);
  }
  // 2^(e - 128), subnormal for the two smallest exponents.
  const __m512i e = _mm512_cvtepu8_epi32(load16(chunk + kTiling<T>.d_at() + j * 16));
  const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
  const __m512i subnormal = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
  const __mmask16 small = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, small, subnormal));
}

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL
