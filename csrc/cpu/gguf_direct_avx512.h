// Products of a few rows of int8 activations with GGUF blocks for AVX512 with VNNI: a weight row is read forwards,
// once, and multiplied where it is unpacked, with the elements of a block along the lanes.
#pragma once

#include "cpu/gguf_blocks_avx512.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

constexpr int64_t kPrefetchBytes = 4096;

inline __m512i load64(const void* from) { return _mm512_loadu_si512(from); }

// The sums of the lanes of four vectors.
inline __m128i add_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
}
inline __m128i add_lanes(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  const __m256i all = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
// The sums of the lower and the upper eight lanes of four vectors: a's two sums, then b's, ...
inline __m256i add_half_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m512i pairs = _mm512_add_epi32(all, _mm512_shuffle_i32x4(all, all, 0xb1));
  const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, pairs));
}

// Indices that spread the 16 scales of a chunk over the 16-bit lanes of its code vectors: lane l of vector i has
// scale 4i + l / 8. (As 32-bit lanes for the types whose products need them: scale 4i + l / 4.)
inline __m512i scale_lanes(int i) {
  const __m512i lanes =
      _mm512_set_epi16(3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_add_epi16(lanes, _mm512_set1_epi16(static_cast<int16_t>(4 * i)));
}
inline __m512i wide_scale_lanes(int i) {
  const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * i));
}

template <Type T>
inline void spread_scales(__m256i scales, __m512i* out) {
  for (int i = 0; i < 4; ++i) {
    out[i] = kNarrow<T> ? _mm512_permutexvar_epi16(scale_lanes(i), _mm512_castsi256_si512(scales))
                        : _mm512_permutexvar_epi32(wide_scale_lanes(i), _mm512_cvtepi16_epi32(scales));
  }
}

// Lanes whose sum is that of scale * code * x over a chunk.
template <Type T>
inline __m512i scaled_products(const Registers& w, const __m512i* scales, const int8_t* x) {
  __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if constexpr (kNarrow<T>) {
      total = _mm512_dpwssd_epi32(total, _mm512_maddubs_epi16(w.codes[i], load64(x + 64 * i)), scales[i]);
    } else {
      const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.codes[i], load64(x + 64 * i));
      total = _mm512_add_epi32(total, _mm512_mullo_epi32(dot, scales[i]));
    }
  }
  return total;
}

// What a weight row's blocks of 256 gave, for four columns of R rows: lanes still to be added up.
template <int R>
struct Partial {
  __m512i dots[R][4];
  __m256i mins[R][4];
  alignas(16) uint32_t scales[4];  // float16 d, and above it dmin
};

// So many blocks of a row are multiplied before their lanes are added up, four columns at a time: rows are read
// forwards, one after the other, as they lie in memory.
constexpr int64_t kSegment = 16;

template <Type T, int R>
FERRUM_KEEP_ACCUMULATORS void multiply_segment(const GgufProduct& p, const uint8_t* blocks, int64_t first,
                                               int64_t count, int column, Partial<R>* partials) {
  const GgufActivations& a = p.activations;
  for (int64_t k = 0; k < count; ++k, blocks += kChunkBytes<T>) {
    for (int64_t line = 0; line < kChunkBytes<T>; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(blocks + kPrefetchBytes + line), _MM_HINT_T0);
    }
    Registers w;
    load_large<T>(blocks, w);
    __m512i scales[4];
    spread_scales<T>(w.scales, scales);
    partials[k].scales[column] = w.d_and_m;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t at = p.row_ids[r] * a.chunks + first + k;
      const __m512i dots = scaled_products<T>(w, scales, a.codes + at * gguf::kChunk);
      const __m256i mins = _mm256_madd_epi16(w.factors, load32(a.sums + at * 16));
      if (kTraitsOf<T>.mins) {
        partials[k].dots[r][column] = dots;
        partials[k].mins[r][column] = mins;
      } else {
        partials[k].dots[r][column] = _mm512_add_epi32(dots, _mm512_zextsi256_si512(mins));
      }
    }
  }
}

inline __m128 halves_to_floats(__m128i pairs, bool upper) {
  const __m128i order = upper ? _mm_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1)
                              : _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
  return _mm_cvtph_ps(_mm_shuffle_epi8(pairs, order));
}

// Blocks of 256.
template <Type T, int R>
void direct_large(const GgufProduct& p, int64_t tile) {
  const GgufActivations& a = p.activations;
  Partial<R> partials[kSegment];
  for (int quad = 0; quad < kGgufTile; quad += 4) {
    __m128 acc[R];
    for (int r = 0; r < R; ++r) {
      acc[r] = _mm_setzero_ps();
    }
    for (int64_t first = 0; first < a.chunks; first += kSegment) {
      const int64_t count = smaller(kSegment, a.chunks - first);
      for (int c = 0; c < 4; ++c) {
        const uint8_t* blocks = row_of(p, tile * kGgufTile + quad + c) + first * kChunkBytes<T>;
        multiply_segment<T, R>(p, blocks, first, count, c, partials);
      }
      for (int64_t k = 0; k < count; ++k) {
        const Partial<R>& partial = partials[k];
        const __m128i scales = _mm_load_si128(reinterpret_cast<const __m128i*>(partial.scales));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m128 x = _mm_set1_ps(a.scales[p.row_ids[r] * a.chunks + first + k]);
          const __m512i* dots = partial.dots[r];
          const __m128i dot = add_lanes(dots[0], dots[1], dots[2], dots[3]);
          __m128 term = _mm_mul_ps(_mm_cvtepi32_ps(dot), _mm_mul_ps(halves_to_floats(scales, false), x));
          if (kTraitsOf<T>.mins) {
            const __m256i* mins = partial.mins[r];
            const __m128 min = _mm_cvtepi32_ps(add_lanes(mins[0], mins[1], mins[2], mins[3]));
            term = _mm_sub_ps(term, _mm_mul_ps(min, _mm_mul_ps(halves_to_floats(scales, true), x)));
          }
          acc[r] = _mm_add_ps(acc[r], term);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      _mm_storeu_ps(tile_of(p, tile) + r * kGgufPanel + quad, acc[r]);
    }
  }
}

// ((0+1)+(2+3))+((4+5)+(6+7))
inline float add_pairwise(__m256 v) {
  v = _mm256_add_ps(v, _mm256_permute_ps(v, 0xb1));
  v = _mm256_add_ps(v, _mm256_permute_ps(v, 0x4e));
  return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}

// The sums of 32 activations, from those of 16.
inline __m256i sums_of_32(const int16_t* sums) { return _mm256_madd_epi16(load32(sums), _mm256_set1_epi16(1)); }

// Blocks of 32, one column at a time.
template <Type T, int R>
FERRUM_KEEP_ACCUMULATORS void direct_small(const GgufProduct& p, int64_t tile) {
  const GgufActivations& a = p.activations;
  const __m256i zero = _mm256_set1_epi32(kTraitsOf<T>.zero);
  for (int64_t c = 0; c < kGgufTile; ++c) {
    const uint8_t* blocks = row_of(p, tile * kGgufTile + c);
    float acc[R] = {};
    for (int64_t k = 0; k < a.chunks; ++k, blocks += kChunkBytes<T>) {
      for (int64_t line = 0; line < kChunkBytes<T>; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(blocks + kPrefetchBytes + line), _MM_HINT_T0);
      }
      SmallRegisters w;
      load_small<T>(blocks, p.weights.in_features - k * gguf::kChunk, w);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t at = p.row_ids[r] * a.chunks + k;
        __m512i dots[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          dots[i] =
              _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.codes[i], load64(a.codes + at * gguf::kChunk + 64 * i));
        }
        const __m256i sums = sums_of_32(a.sums + at * 16);
        const __m256i dot =
            _mm256_sub_epi32(add_half_lanes(dots[0], dots[1], dots[2], dots[3]), _mm256_mullo_epi32(sums, zero));
        const __m256 x = _mm256_loadu_ps(a.scales + at * 8);
        __m256 term = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(w.d, x));
        if (kTraitsOf<T>.mins) {
          term = _mm256_sub_ps(term, _mm256_mul_ps(w.m, _mm256_mul_ps(x, _mm256_cvtepi32_ps(sums))));
        }
        acc[r] = acc[r] + add_pairwise(term);
      }
    }
    for (int r = 0; r < R; ++r) {
      tile_of(p, tile)[r * kGgufPanel + c] = acc[r];
    }
  }
}

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL
