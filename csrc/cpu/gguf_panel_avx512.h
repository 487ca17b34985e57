// Products of many rows of int8 activations with GGUF blocks for AVX512 with VNNI: 16 columns of a chunk are unpacked
// and transposed into a panel that stays in the first-level cache while all rows pass by.
#pragma once

#include "cpu/gguf_blocks_avx512.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// A chunk of N tiles for many rows. Vectors have the tile's 16 columns in their lanes: codes[s] the four bytes of
// elements 4s ... 4s + 3, scales[j] the scale of elements 16j ..., factors[j] the pair for elements 32j ....
template <int N>
struct Panel {
  __m512i codes[64][N];
  __m512i scales[16][N], factors[8][N];
  __m512 d[8][N], m[8][N];
};

template <Type T, int N>
void unpack_panel(const GgufProduct& p, int64_t tile, int64_t k, Panel<N>& panel) {
  const int64_t row_bytes = p.weights.row_bytes();
  __m512i rows[4][16], scales[16], factors[16], columns[16];
  alignas(64) uint32_t block_scales[16];
  for (int t = 0; t < N; ++t) {
    for (int c = 0; c < kGgufTile; ++c) {
      const uint8_t* blocks = row_of(p, (tile + t) * kGgufTile + c) + k * kChunkBytes<T>;
      for (int64_t line = 0; line < kChunkBytes<T>; line += 64) {  // the same chunk of the next panel
        _mm_prefetch(reinterpret_cast<const char*>(blocks + N * kGgufTile * row_bytes + line), _MM_HINT_T1);
      }
      if constexpr (kSmall<T>) {
        SmallRegisters w;
        load_small<T>(blocks, p.weights.in_features - k * gguf::kChunk, w);
        for (int i = 0; i < 4; ++i) {
          rows[i][c] = w.codes[i];
        }
        scales[c] = _mm512_zextsi256_si512(_mm256_castps_si256(w.d));
        factors[c] = _mm512_zextsi256_si512(_mm256_castps_si256(w.m));
      } else {
        Registers w;
        load_large<T>(blocks, w);
        for (int i = 0; i < 4; ++i) {
          rows[i][c] = w.codes[i];
        }
        scales[c] = _mm512_cvtepi16_epi32(w.scales);
        factors[c] = _mm512_zextsi256_si512(w.factors);
        block_scales[c] = w.d_and_m;
      }
    }
    for (int i = 0; i < 4; ++i) {
      transpose(rows[i], columns);
      for (int s = 0; s < 16; ++s) {
        panel.codes[16 * i + s][t] = columns[s];
      }
    }
    transpose(scales, columns);
    for (int j = 0; j < 16; ++j) {
      if (!kSmall<T>) {
        panel.scales[j][t] = columns[j];
      } else if (j < 8) {
        panel.d[j][t] = _mm512_castsi512_ps(columns[j]);
      }
    }
    transpose(factors, columns);
    for (int j = 0; j < 8; ++j) {
      if (!kSmall<T>) {
        panel.factors[j][t] = columns[j];
      } else {
        panel.m[j][t] = _mm512_castsi512_ps(columns[j]);
      }
    }
    if (!kSmall<T>) {
      const __m512i pairs = _mm512_load_si512(block_scales);
      panel.d[0][t] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
      panel.m[0][t] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
    }
  }
}

// Adds `quads` steps of four elements from step `first` on to the dot products of R rows with N tiles.
template <int R, int N>
inline __attribute__((always_inline)) void add_products(const __m512i (*codes)[N], int first, int quads,
                                                        const int8_t* const* x, __m512i (*dot)[N]) {
  for (int s = first; s < first + quads; ++s) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i word = broadcast_word(x[r] + 4 * s);
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) {
        dot[r][t] = _mm512_dpbusd_epi32(dot[r][t], codes[s][t], word);
      }
    }
  }
}

// Where R rows of a block begin.
template <int R>
struct BlockRows {
  const int8_t* codes[R];
  int64_t at[R];
  float* out;

  BlockRows(const GgufProduct& p, int64_t tile, int64_t first, int64_t k) : out(tile_of(p, tile) + first * kGgufPanel) {
    for (int r = 0; r < R; ++r) {
      at[r] = p.row_ids[first + r] * p.activations.chunks + k;
      codes[r] = p.activations.codes + at[r] * gguf::kChunk;
    }
  }
};

inline void add_to(float* out, bool first, __m512 term) {
  _mm512_storeu_ps(out, _mm512_add_ps(first ? _mm512_setzero_ps() : _mm512_loadu_ps(out), term));
}

// `Quads` steps share a scale: 4 or, where scales come in equal pairs, 8.
template <int R, int N, bool Mins, int Quads>
FERRUM_KEEP_ACCUMULATORS void large_block(const GgufProduct& p, const Panel<N>& panel, int64_t tile, int64_t first,
                                          int64_t k) {
  const BlockRows<R> rows(p, tile, first, k);
  __m512i total[R][N];
  clear<R, N>(total);
  for (int s = 0; s < 64; s += Quads) {
    __m512i dot[R][N];
    clear<R, N>(dot);
    add_products<R, N>(panel.codes, s, Quads, rows.codes, dot);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) {
        total[r][t] = _mm512_add_epi32(total[r][t], _mm512_mullo_epi32(dot[r][t], panel.scales[s / 4][t]));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512 x = _mm512_set1_ps(p.activations.scales[rows.at[r]]);
    const int16_t* sums = p.activations.sums + rows.at[r] * 16;
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) {
      __m512i rest = Mins ? _mm512_setzero_si512() : total[r][t];
      for (int j = 0; j < 8; ++j) {
        rest = _mm512_dpwssd_epi32(rest, panel.factors[j][t], broadcast_word(sums + 2 * j));
      }
      __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(Mins ? total[r][t] : rest), _mm512_mul_ps(panel.d[0][t], x));
      if (Mins) {
        term = _mm512_sub_ps(term, _mm512_mul_ps(_mm512_cvtepi32_ps(rest), _mm512_mul_ps(panel.m[0][t], x)));
      }
      add_to(rows.out + r * kGgufPanel + t * p.tile_stride, k == 0, term);
    }
  }
}

template <int R, int N, bool Mins>
FERRUM_KEEP_ACCUMULATORS void small_block(const GgufProduct& p, const Panel<N>& panel, int64_t tile, int64_t first,
                                          int64_t k) {
  const BlockRows<R> rows(p, tile, first, k);
  const int zero = p.weights.traits->zero;
  __m512 terms[8][R][N];
  for (int j = 0; j < 8; ++j) {
    __m512i dot[R][N];
    clear<R, N>(dot);
    add_products<R, N>(panel.codes, 8 * j, 8, rows.codes, dot);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int16_t* sums = p.activations.sums + rows.at[r] * 16 + 2 * j;
      const int sum = sums[0] + sums[1];
      const float scale = p.activations.scales[rows.at[r] * 8 + j];
      const __m512 x = _mm512_set1_ps(scale);
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) {
        const __m512i centred = _mm512_sub_epi32(dot[r][t], _mm512_set1_epi32(zero * sum));
        terms[j][r][t] = _mm512_mul_ps(_mm512_cvtepi32_ps(centred), _mm512_mul_ps(panel.d[j][t], x));
        if (Mins) {
          const __m512 min = _mm512_mul_ps(panel.m[j][t], _mm512_set1_ps(scale * static_cast<float>(sum)));
          terms[j][r][t] = _mm512_sub_ps(terms[j][r][t], min);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < N; ++t) {
      __m512 pairs[4];
      for (int j = 0; j < 4; ++j) {
        pairs[j] = _mm512_add_ps(terms[2 * j][r][t], terms[2 * j + 1][r][t]);
      }
      const __m512 term = _mm512_add_ps(_mm512_add_ps(pairs[0], pairs[1]), _mm512_add_ps(pairs[2], pairs[3]));
      add_to(rows.out + r * kGgufPanel + t * p.tile_stride, k == 0, term);
    }
  }
}

template <Type T, int N, int R>
inline void block(const GgufProduct& p, const Panel<N>& panel, int64_t tile, int64_t first, int64_t k) {
  if constexpr (kSmall<T>) {
    small_block<R, N, kTraitsOf<T>.mins>(p, panel, tile, first, k);
  } else {
    constexpr bool pairs = T == Type::Q4_K || T == Type::Q5_K || T == Type::IQ4_XS;
    large_block<R, N, kTraitsOf<T>.mins, pairs ? 8 : 4>(p, panel, tile, first, k);
  }
}

template <Type T, int N>
void panel_columns(const GgufProduct& p, int64_t tile) {
  Panel<N> panel;
  for (int64_t k = 0; k < p.activations.chunks; ++k) {
    unpack_panel<T, N>(p, tile, k, panel);
    int64_t r = 0;
    for (; r + 6 <= p.rows; r += 6) {
      block<T, N, 6>(p, panel, tile, r, k);
    }
    if (r + 3 <= p.rows) {
      block<T, N, 3>(p, panel, tile, r, k);
      r += 3;
    }
    if (r + 2 == p.rows) {
      block<T, N, 2>(p, panel, tile, r, k);
    } else if (r < p.rows) {
      block<T, N, 1>(p, panel, tile, r, k);
    }
  }
}

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL
