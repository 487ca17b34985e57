// GGUF blocks and tiles to float32 weights with AVX512, each operation rounded as common/gguf.h writes it.
#pragma once

#include "cpu/gguf_tile_codes_avx512.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// The factors of each 16 weights of a row's chunk.
struct Factors {
  alignas(64) float scales[16], mins[16];
};

// 256 weights of unsigned codes.
template <Type T>
inline void scale_codes(const __m512i* codes, const Factors& factors, float* out) {
  const __m512i zero = _mm512_set1_epi32(kTraitsOf<T>.zero);
  alignas(64) uint8_t bytes[gguf::kChunk];
  for (int i = 0; i < 4; ++i) {
    _mm512_store_si512(bytes + 64 * i, codes[i]);
  }
  for (int j = 0; j < 16; ++j) {
    const __m512i code = _mm512_sub_epi32(_mm512_cvtepu8_epi32(load16(bytes + 16 * j)), zero);
    __m512 weights = _mm512_mul_ps(_mm512_set1_ps(factors.scales[j]), _mm512_cvtepi32_ps(code));
    if (kTraitsOf<T>.mins) {
      weights = _mm512_sub_ps(weights, _mm512_set1_ps(factors.mins[j]));
    }
    _mm512_storeu_ps(out + 16 * j, weights);
  }
}

// Eight floats, each twice.
inline __m512 twice_each(__m256 v) {
  const __m512i order = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(order, _mm512_castps256_ps512(v));
}

// 256 weights of packed blocks, zeros behind the first `elements`.
template <Type T>
inline void weights_of_blocks(const uint8_t* blocks, int64_t elements, float* out) {
  Factors factors;
  if constexpr (kSmall<T>) {
    SmallRegisters w;
    load_small<T>(blocks, elements, w);
    _mm512_store_ps(factors.scales, twice_each(w.d));
    _mm512_store_ps(factors.mins, twice_each(w.m));
    scale_codes<T>(w.codes, factors, out);
  } else {
    Registers w;
    load_large<T>(blocks, w);
    const __m128 d_and_m = _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(w.d_and_m)));
    const __m512 d = _mm512_broadcastss_ps(d_and_m), m = _mm512_broadcastss_ps(_mm_movehdup_ps(d_and_m));
    _mm512_store_ps(factors.scales, _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(w.scales))));
    // With mins the factors are those.
    _mm512_store_ps(factors.mins, _mm512_mul_ps(m, _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(w.factors))));
    scale_codes<T>(w.codes, factors, out);
  }
}

// The factors of the 16 rows of a tile's chunk.
template <Type T>
inline void tile_factors(const uint8_t* chunk, Factors* rows) {
  constexpr gguf::Tiling t = kTiling<T>;
  __m512i scales[16], mins[16], columns[16];
  for (int j = 0; j < 16; ++j) {
    __m512 scale, min = _mm512_setzero_ps();
    if constexpr (kSmall<T>) {
      scale = block_scales<T>(chunk, j / 2);
      if (t.mins) {  // blocks of 32 add theirs
        min = _mm512_xor_ps(load_halves(chunk + t.m_at() + j / 2 * 32), _mm512_set1_ps(-0.0f));
      }
    } else {
      const int64_t at = j * t.scales / 16 * gguf::kTileRows;
      scale = _mm512_mul_ps(load_halves(chunk + t.d_at()), _mm512_cvtepi32_ps(widen<T>(chunk + t.scales_at() + at)));
      if (t.mins) {
        min = _mm512_mul_ps(load_halves(chunk + t.m_at()), _mm512_cvtepi32_ps(widen<T>(chunk + t.mins_at() + at)));
      }
    }
    scales[j] = _mm512_castps_si512(scale);
    mins[j] = _mm512_castps_si512(min);
  }
  transpose(scales, columns);
  for (int row = 0; row < 16; ++row) {
    _mm512_store_si512(rows[row].scales, columns[row]);
  }
  transpose(mins, columns);
  for (int row = 0; row < 16; ++row) {
    _mm512_store_si512(rows[row].mins, columns[row]);
  }
}

// The vectors of run J of four, each 64 elements of the 16 rows.
template <Type T, int P = 0>
inline void double_run(const uint8_t* runs, __m512i* out) {
  out[P] = codes<T, P % 8>(runs + P / 8 * kTiling<T>.run_bytes());
  if constexpr (P < 15) {
    double_run<T, P + 1>(runs, out);
  }
}

// 256 weights of each of a tile's 16 rows, `stride` floats apart.
template <Type T>
inline void weights_of_tile(const uint8_t* chunk, int64_t stride, float* out) {
  Factors factors[16];
  tile_factors<T>(chunk, factors);
  __m512i words[16], rows[16], row_codes[16][4];
  for (int i = 0; i < 4; ++i) {
    double_run<T>(chunk + 2 * i * kTiling<T>.run_bytes(), words);
    transpose(words, rows);
    for (int row = 0; row < 16; ++row) {
      row_codes[row][i] = rows[row];
    }
  }
  for (int row = 0; row < 16; ++row) {
    scale_codes<T>(row_codes[row], factors[row], out + row * stride);
  }
}

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL
