// Products with GGUF blocks and their weights in float32, a decoded chunk of 256 at a time: every level's kernels but
// for AVX512's int8.
#pragma once

#include "cpu/gguf.h"
#include "cpu/gguf_decode.h"
#include "cpu/gguf_tiles.h"
#if defined(FERRUM_LEVEL_AVX512)
#include "cpu/gguf_weights_avx512.h"
#endif

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// A chunk's row of activations.
struct ChunkRow {
  const int8_t* codes;
  const float* scales;
  const int16_t* sums;
};

inline ChunkRow chunk_row(const GgufActivations& a, int64_t row, int64_t chunk, int64_t scales_per_chunk) {
  const int64_t at = row * a.chunks + chunk;
  return {a.codes + at * gguf::kChunk, a.scales + at * scales_per_chunk, a.sums + at * 16};
}

inline float* out_of(const GgufProduct& p, int64_t column) {
  return p.out + column / kGgufTile * p.tile_stride + column % kGgufTile;
}

// Chunk k of a column's weights, from packed rows or from tiles.
inline void decode_column(const GgufProduct& p, int64_t column, int64_t k, Chunk& out) {
  const gguf::Traits& traits = *p.weights.traits;
  const int64_t row = p.first + column;
  if (p.weights.tiled) {
    const int64_t bytes = gguf::tiling_of(traits.type).chunk_bytes();
    const uint8_t* tile = p.weights.blocks + row / gguf::kTileRows * p.weights.tile_bytes();
    return decode_tile_row(traits.type, tile + k * bytes, row % gguf::kTileRows, out);
  }
  const int64_t bytes = gguf::kChunk / traits.elements * traits.bytes;
  decode_chunk(traits.type, p.weights.blocks + row * p.weights.row_bytes() + k * bytes,
               p.weights.in_features - k * gguf::kChunk, out);
}

#if defined(FERRUM_LEVEL_AVX2)

inline int32_t add_lanes(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// Products of 32 unsigned and 32 signed bytes: the sums over the first and the last 16 in the halves of the result.
// 16-bit sums of two products hold codes up to 129, and the wider ones are multiplied as 16 bits.
inline __m256i dot_halves(const uint8_t* codes, const int8_t* x, bool wide) {
  if (!wide) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)),
                                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  const auto sixteen = [&](int at) {
    const __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at)));
    const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + at)));
    const __m256i products = _mm256_madd_epi16(c, a);
    return _mm_add_epi32(_mm256_castsi256_si128(products), _mm256_extracti128_si256(products, 1));
  };
  return _mm256_set_m128i(sixteen(16), sixteen(0));
}

inline int32_t scaled_dot(const Chunk& w, const int8_t* x, bool wide) {
  __m256i total = _mm256_setzero_si256();
  for (int j = 0; j < 8; ++j) {
    const __m256i scales = _mm256_set_m128i(_mm_set1_epi32(w.scales[2 * j + 1]), _mm_set1_epi32(w.scales[2 * j]));
    total = _mm256_add_epi32(total, _mm256_mullo_epi32(dot_halves(w.codes + 32 * j, x + 32 * j, wide), scales));
  }
  return add_lanes(total);
}

inline int32_t small_dot(const uint8_t* codes, const int8_t* x, bool wide) {
  return add_lanes(dot_halves(codes, x, wide));
}

inline float large_term(const gguf::Traits& traits, const Chunk& w, const ChunkRow& x) {
  const int16_t* factors = traits.mins ? w.mins : w.scales;
  int32_t sum = 0;
  for (int j = 0; j < 16; ++j) {
    sum += factors[j] * x.sums[j];
  }
  const int32_t dot = scaled_dot(w, x.codes, traits.zero > 63);
  if (traits.mins) {
    return static_cast<float>(dot) * (w.d[0] * x.scales[0]) - static_cast<float>(sum) * (w.m[0] * x.scales[0]);
  }
  return static_cast<float>(dot - traits.zero * sum) * (w.d[0] * x.scales[0]);
}

inline float small_term(const gguf::Traits& traits, const Chunk& w, const ChunkRow& x) {
  float terms[8];
  for (int j = 0; j < 8; ++j) {
    const int32_t sum = x.sums[2 * j] + x.sums[2 * j + 1];
    const int32_t dot = small_dot(w.codes + 32 * j, x.codes + 32 * j, traits.zero > 63) - traits.zero * sum;
    terms[j] = static_cast<float>(dot) * (w.d[j] * x.scales[j]);
    if (traits.mins) {
      terms[j] = terms[j] - w.m[j] * (x.scales[j] * static_cast<float>(sum));
    }
  }
  return ((terms[0] + terms[1]) + (terms[2] + terms[3])) + ((terms[4] + terms[5]) + (terms[6] + terms[7]));
}

inline void int8_columns(const GgufProduct& p) {
  const gguf::Traits& traits = *p.weights.traits;
  const bool small = traits.elements == gguf::kSmallBlock;
  Chunk chunk;
  for (int64_t c = 0; c < p.columns; ++c) {
    float* out = out_of(p, c);
    for (int64_t k = 0; k < p.activations.chunks; ++k) {
      decode_column(p, c, k, chunk);
      for (int64_t r = 0; r < p.rows; ++r) {
        const ChunkRow x = chunk_row(p.activations, p.row_ids[r], k, small ? 8 : 1);
        const float before = k == 0 ? 0.0f : out[r * kGgufPanel];
        out[r * kGgufPanel] = before + (small ? small_term(traits, chunk, x) : large_term(traits, chunk, x));
      }
    }
  }
}

#endif

// Rows by columns whose sums stay in registers, and how many columns are decoded at a time.
#if defined(FERRUM_LEVEL_AVX512)
constexpr int kFullRows = 4, kFullColumns = 4, kDecodedColumns = 16;
#elif defined(FERRUM_LEVEL_AVX2)
constexpr int kFullRows = 2, kFullColumns = 2, kDecodedColumns = 2;
#else
constexpr int kFullRows = 1, kFullColumns = 2, kDecodedColumns = 2;
#endif

// Chunk k of `columns` columns from `first` on in float32, zeros for the other columns of a step.
inline void decode_columns(const GgufProduct& p, int64_t first, int64_t columns, int64_t k,
                           float (*weights)[gguf::kChunk]) {
  const gguf::Traits& traits = *p.weights.traits;
#if defined(FERRUM_LEVEL_AVX512)
  for_type(traits.type, [&](auto type) {
    constexpr Type T = decltype(type)::value;
    if (p.weights.tiled) {  // whole tiles
      return weights_of_tile<T>(p.weights.at(p.first + first) + k * kTiling<T>.chunk_bytes(), gguf::kChunk, *weights);
    }
    for (int64_t c = 0; c < columns; ++c) {
      const uint8_t* blocks = p.weights.at(p.first + first + c) + k * kChunkBytes<T>;
      weights_of_blocks<T>(blocks, p.weights.in_features - k * gguf::kChunk, weights[c]);
    }
  });
#else
  Chunk chunk;
  for (int64_t c = 0; c < columns; ++c) {
    decode_column(p, first + c, k, chunk);
    weights_of(traits, chunk, weights[c]);
  }
#endif
  for (int64_t c = columns; c < kDecodedColumns; ++c) {
    __builtin_memset(weights[c], 0, sizeof(weights[c]));
  }
}

// sums[r][c] += one chunk of row r times column c, lane by lane.
template <int R>
inline void add_chunk(const float (*weights)[gguf::kChunk], const float* const* values, Vec (*sums)[kFullColumns]) {
  Vec acc[R][kFullColumns];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < kFullColumns; ++c) {
      acc[r][c] = sums[r][c];
    }
  }
  for (int64_t k = 0; k < gguf::kChunk; k += kLanes) {
    Vec w[kFullColumns];
    for (int c = 0; c < kFullColumns; ++c) {
      w[c] = load(weights[c] + k);
    }
    for (int r = 0; r < R; ++r) {
      const Vec x = load(values[r] + k);
      for (int c = 0; c < kFullColumns; ++c) {
        acc[r][c] = fma(x, w[c], acc[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < kFullColumns; ++c) {
      sums[r][c] = acc[r][c];
    }
  }
}

inline void full_columns(const GgufProduct& p) {
  constexpr int groups = kDecodedColumns / kFullColumns;
  alignas(64) float weights[kDecodedColumns][gguf::kChunk];
  Vec sums[groups][kGgufRowBlock][kFullColumns];
  const float* values[kGgufRowBlock];
  for (int64_t first = 0; first < p.columns; first += kDecodedColumns) {
    const int64_t columns = smaller(kDecodedColumns, p.columns - first);
    for (int g = 0; g < groups; ++g) {
      for (int64_t r = 0; r < p.rows; ++r) {
        for (int c = 0; c < kFullColumns; ++c) {
          sums[g][r][c] = broadcast(0.0f);
        }
      }
    }
    for (int64_t k = 0; k < p.activations.chunks; ++k) {
      decode_columns(p, first, columns, k, weights);
      for (int64_t r = 0; r < p.rows; ++r) {
        values[r] = p.activations.values + (p.row_ids[r] * p.activations.chunks + k) * gguf::kChunk;
      }
      for (int g = 0; g < groups; ++g) {
        int64_t r = 0;
        for (; r + kFullRows <= p.rows; r += kFullRows) {
          add_chunk<kFullRows>(weights + g * kFullColumns, values + r, sums[g] + r);
        }
        for (; r < p.rows; ++r) {
          add_chunk<1>(weights + g * kFullColumns, values + r, sums[g] + r);
        }
      }
    }
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < p.rows; ++r) {
        out_of(p, first + c)[r * kGgufPanel] = reduce_add(sums[c / kFullColumns][r][c % kFullColumns]);
      }
    }
  }
}

#if defined(FERRUM_LEVEL_AVX512)

// The sums of 16 bytes each of 256, as 16-bit lanes.
inline __m256i sums_of_16(const __m512i* bytes) {
  __m512i words = _mm512_setzero_si512();  // four vectors' sums of eight bytes in the quarters of 64-bit lanes
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i) {
    words = _mm512_or_si512(_mm512_slli_epi64(words, 16), _mm512_sad_epu8(bytes[i], _mm512_setzero_si512()));
  }
  words = _mm512_add_epi16(words, _mm512_shuffle_epi32(words, _MM_PERM_BADC));
  const __m256i order = _mm256_setr_epi16(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_castsi256_si512(order), words));
}

// gguf_sums of whole chunks.
inline GgufPeaks sums_of_chunks(const int8_t* codes, int64_t chunks, int16_t* sums, int16_t* run_sums) {
  __m256i most_of_16 = _mm256_setzero_si256(), most_of_32 = _mm256_setzero_si256();
  for (int64_t k = 0; k < chunks; ++k, codes += gguf::kChunk, sums += 16, run_sums += 8) {
    __m512i biased[4], magnitudes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i line = _mm512_loadu_si512(codes + 64 * i);
      biased[i] = _mm512_xor_si512(line, _mm512_set1_epi8(-128));
      magnitudes[i] = _mm512_abs_epi8(line);
    }
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i sum = _mm256_sub_epi16(sums_of_16(biased), _mm256_set1_epi16(16 * 128));
    const __m256i magnitude = sums_of_16(magnitudes), run_sum = _mm256_madd_epi16(sum, ones);
    const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(magnitude, ones), _mm256_abs_epi32(run_sum));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), sum);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(run_sums), _mm256_cvtepi32_epi16(run_sum));
    most_of_16 = _mm256_max_epi16(most_of_16, magnitude);
    most_of_32 = _mm256_max_epi32(most_of_32, _mm256_srli_epi32(both, 1));
  }
  const __m512i of_16 = _mm512_cvtepi16_epi32(most_of_16);
  return {static_cast<int16_t>(_mm512_reduce_max_epi32(of_16)),
          static_cast<int16_t>(_mm512_reduce_max_epi32(_mm512_zextsi256_si512(most_of_32)))};
}

#endif

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL

#if defined(FERRUM_LEVEL_GENERIC)
#include "cpu/gguf_words.h"
#endif

namespace ferrum::cpu::FERRUM_LEVEL {

void gguf_full_columns(const GgufProduct& product) { full_columns(product); }

GgufPeaks gguf_sums(const int8_t* codes, int64_t width, int16_t* sums, int16_t* run_sums) {
#if defined(FERRUM_LEVEL_AVX512)
  return sums_of_chunks(codes, width / gguf::kChunk, sums, run_sums);
#else
  int most_of_16 = 0, most_of_32 = 0;
  for (int64_t j = 0; j < width / 32; ++j) {
    int sum[2] = {}, magnitude[2] = {};
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 16; ++i) {
        const int code = codes[32 * j + 16 * half + i];
        sum[half] += code;
        magnitude[half] += code < 0 ? -code : code;
      }
      sums[2 * j + half] = static_cast<int16_t>(sum[half]);
      most_of_16 = magnitude[half] > most_of_16 ? magnitude[half] : most_of_16;
    }
    const int total = sum[0] + sum[1];
    const int one_sign = (magnitude[0] + magnitude[1] + (total < 0 ? -total : total)) / 2;
    run_sums[j] = static_cast<int16_t>(total);
    most_of_32 = one_sign > most_of_32 ? one_sign : most_of_32;
  }
  return {static_cast<int16_t>(most_of_16), static_cast<int16_t>(most_of_32)};
#endif
}

#if defined(FERRUM_LEVEL_AVX512)

void gguf_dequantize_row(const gguf::Traits& traits, const uint8_t* blocks, int64_t elements, float* out) {
  for_type(traits.type, [&](auto type) {
    constexpr Type T = decltype(type)::value;
    int64_t k = 0;
    for (; k + gguf::kChunk <= elements; k += gguf::kChunk, blocks += kChunkBytes<T>) {
      weights_of_blocks<T>(blocks, gguf::kChunk, out + k);
    }
    if (k < elements) {
      alignas(64) float weights[gguf::kChunk];
      weights_of_blocks<T>(blocks, elements - k, weights);
      __builtin_memcpy(out + k, weights, static_cast<size_t>(elements - k) * sizeof(float));
    }
  });
}

void gguf_dequantize_tile(const gguf::Traits& traits, const uint8_t* tile, int64_t elements, float* out) {
  for_type(traits.type, [&](auto type) {
    constexpr Type T = decltype(type)::value;
    for (int64_t k = 0; k < elements; k += gguf::kChunk, tile += kTiling<T>.chunk_bytes()) {
      weights_of_tile<T>(tile, elements, out + k);
    }
  });
}

#else

void gguf_dequantize_row(const gguf::Traits& traits, const uint8_t* blocks, int64_t elements, float* out) {
  dequantize_chunks(traits, blocks, elements, out);
}

void gguf_dequantize_tile(const gguf::Traits& traits, const uint8_t* tile, int64_t elements, float* out) {
  dequantize_tile(traits, tile, elements, out);
}

void gguf_int8_columns(const GgufProduct& product) { int8_columns(product); }

#endif

void gguf_pack_tile(const gguf::Traits& traits, const uint8_t* rows, int64_t elements, uint8_t* tile) {
  pack_tile(traits, rows, elements, tile);
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
