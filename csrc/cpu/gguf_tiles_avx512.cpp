// Products of tiled GGUF weights with int8 activations for AVX512 with VNNI: a tile's 16 columns are the lanes, its
// codes are unpacked in registers for a few rows at a time.
#if defined(__x86_64__)
#define FERRUM_LEVEL_AVX512
#include "cpu/simd.h"

#if defined(__clang__)
#define FERRUM_KEEP_ACCUMULATORS __attribute__((noinline))
#pragma clang attribute push(__attribute__((target("avx512vnni"))), apply_to = function)
#else
#define FERRUM_KEEP_ACCUMULATORS __attribute__((noinline, optimize("no-tree-coalesce-vars")))
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vnni")
#endif

#include "cpu/gguf_blocks_avx512.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

constexpr int64_t kPrefetchAhead = 8192;

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

// Vector P of a run: elements 4P ... 4P + 3 of the 16 columns.
template <Type T, int P>
inline __m512i codes(const uint8_t* run) {
  constexpr int low_bits = kTiling<T>.low_bits, high_bits = kTiling<T>.high_bits;
  if constexpr (low_bits == 8) {
    return load64(run + 64 * P);
  }
  constexpr int at = P * low_bits, high_at = P * high_bits;
  const __m512i low_mask = _mm512_set1_epi8((1 << low_bits) - 1);
  __m512i result = _mm512_and_si512(shift_right<at % 8>(load64(run + at / 8 * 64)), low_mask);
  if constexpr (high_bits != 0) {
    const __m512i line = load64(run + 64 * low_bits + high_at / 8 * 64);
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

// A chunk of N tiles and the R rows it is multiplied with.
struct ChunkRows {
  const uint8_t* chunk;  // of the first tile
  int64_t tile_bytes;    // to the next tile's
  int64_t k;             // the chunk's index
  const GgufActivations& activations;
  const int32_t* row_ids;
  int64_t prefetch;    // so many bytes ahead; 0: the chunk is in the cache
  float* out;          // rows of kGgufPanel, the sum of the chunks before
  int64_t out_stride;  // to the next tile's
};

template <Type T>
inline void prefetch_run(const uint8_t* run) {
#pragma GCC unroll 8
  for (int line = 0; line < kTiling<T>.low_bits + kTiling<T>.high_bits; ++line) {
    _mm_prefetch(reinterpret_cast<const char*>(run + 64 * line), _MM_HINT_T0);
  }
}

// Adds vector P of a run of N tiles to the dot products with R rows.
template <Type T, int R, int N, int P>
inline __attribute__((always_inline)) void add_vector(const uint8_t* run, int64_t tile_bytes, const int8_t* const* x,
                                                      __m512i (*dot)[N]) {
  __m512i w[N];
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    w[n] = codes<T, P>(run + n * tile_bytes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512i word = broadcast_word(x[r] + 4 * P);
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      dot[r][n] = _mm512_dpbusd_epi32(dot[r][n], w[n], word);
    }
  }
}

template <Type T, int R, int N, int Half>
inline __attribute__((always_inline)) void add_half_run(const uint8_t* run, int64_t tile_bytes, const int8_t* const* x,
                                                        __m512i (*dot)[N]) {
  add_vector<T, R, N, 4 * Half>(run, tile_bytes, x, dot);
  add_vector<T, R, N, 4 * Half + 1>(run, tile_bytes, x, dot);
  add_vector<T, R, N, 4 * Half + 2>(run, tile_bytes, x, dot);
  add_vector<T, R, N, 4 * Half + 3>(run, tile_bytes, x, dot);
}

inline void add_to(float* out, bool first, __m512 term) {
  _mm512_storeu_ps(out, _mm512_add_ps(first ? _mm512_setzero_ps() : _mm512_loadu_ps(out), term));
}

template <Type T>
inline __m512i widen(const uint8_t* bytes) {
  return kTiling<T>.is_signed ? _mm512_cvtepi8_epi32(load16(bytes)) : _mm512_cvtepu8_epi32(load16(bytes));
}

// total += dot * scale j of the chunk
template <Type T, int R, int N>
inline __attribute__((always_inline)) void add_scaled(const ChunkRows& p, int64_t j, const __m512i (*dot)[N],
                                                      __m512i (*total)[N]) {
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    const __m512i scales = widen<T>(p.chunk + n * p.tile_bytes + kTiling<T>.scales_at() + j * gguf::kTileRows);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      total[r][n] = _mm512_add_epi32(total[r][n], _mm512_mullo_epi32(dot[r][n], scales));
    }
  }
}

// Pairs of int16 factors of the activations' sums: mins or, without them, scales.
template <Type T>
inline __m512i factor_pairs(const uint8_t* chunk, int64_t j) {
  const uint8_t* at = chunk + (kTiling<T>.mins ? kTiling<T>.mins_at() : kTiling<T>.scales_at()) + j * 32;
  return _mm512_mask_blend_epi16(0xaaaaaaaau, widen<T>(at), _mm512_slli_epi32(widen<T>(at + 16), 16));
}

// Adds the terms of a tile's chunk of 256 to out: `total` has the scaled dot products of R rows.
template <Type T, int R, int N>
inline __attribute__((always_inline)) void finish_large(const ChunkRows& p, int n, const int64_t* at,
                                                        const __m512i (*total)[N]) {
  constexpr gguf::Tiling t = kTiling<T>;
  const GgufActivations& a = p.activations;
  const uint8_t* chunk = p.chunk + n * p.tile_bytes;
  __m512i rest[R][1];
  clear<R, 1>(rest);
#pragma GCC unroll 8
  for (int64_t j = 0; j < t.scales / 2; ++j) {
    const __m512i factors = factor_pairs<T>(chunk, j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int16_t* sums = t.scales == 8 ? a.run_sums + at[r] * 8 : a.sums + at[r] * 16;
      rest[r][0] = _mm512_dpwssd_epi32(rest[r][0], factors, broadcast_word(sums + 2 * j));
    }
  }
  const __m512 d = load_halves(chunk + t.d_at());
  const __m512 m = t.mins ? load_halves(chunk + t.m_at()) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512 scale = _mm512_set1_ps(a.scales[at[r]]);
    const __m512i zeros = _mm512_mullo_epi32(rest[r][0], _mm512_set1_epi32(kTraitsOf<T>.zero));
    const __m512i dots = t.mins ? total[r][n] : _mm512_sub_epi32(total[r][n], zeros);
    __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(dots), _mm512_mul_ps(d, scale));
    if (t.mins) {
      term = _mm512_sub_ps(term, _mm512_mul_ps(_mm512_cvtepi32_ps(rest[r][0]), _mm512_mul_ps(m, scale)));
    }
    add_to(p.out + r * kGgufPanel + n * p.out_stride, p.k == 0, term);
  }
}

// Blocks of 256.
template <Type T, int R, int N>
FERRUM_KEEP_ACCUMULATORS void large_chunk(const ChunkRows& p) {
  constexpr gguf::Tiling t = kTiling<T>;
  const int8_t* x[R];
  int64_t at[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    at[r] = p.row_ids[r] * p.activations.chunks + p.k;
    x[r] = p.activations.codes + at[r] * gguf::kChunk;
  }
  __m512i total[R][N];
  clear<R, N>(total);
  const uint8_t* run = p.chunk;
  for (int64_t j = 0; j < 8; ++j, run += t.run_bytes()) {
    for (int64_t n = 0; p.prefetch != 0 && n < N; ++n) {
      prefetch_run<T>(run + n * p.tile_bytes + p.prefetch);
    }
    __m512i dot[R][N];
    clear<R, N>(dot);
    add_half_run<T, R, N, 0>(run, p.tile_bytes, x, dot);
    if constexpr (t.scales == 16) {
      add_scaled<T, R, N>(p, 2 * j, dot, total);
      clear<R, N>(dot);
    }
    add_half_run<T, R, N, 1>(run, p.tile_bytes, x, dot);
    add_scaled<T, R, N>(p, t.scales == 16 ? 2 * j + 1 : j, dot, total);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      x[r] += 32;
    }
  }
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    finish_large<T, R, N>(p, n, at, total);
  }
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

// Blocks of 32.
template <Type T, int R, int N>
FERRUM_KEEP_ACCUMULATORS void small_chunk(const ChunkRows& p) {
  constexpr gguf::Tiling t = kTiling<T>;
  const int8_t* x[R];
  const int16_t* sums[R];
  const float* scales[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int64_t at = (p.row_ids[r] * p.activations.chunks + p.k) * 8;
    x[r] = p.activations.codes + at * gguf::kSmallBlock;
    sums[r] = p.activations.run_sums + at;
    scales[r] = p.activations.scales + at;
  }
  __m512 pairs[4][R][N];
  const uint8_t* run = p.chunk;
  for (int64_t j = 0; j < 8; ++j, run += t.run_bytes()) {
    for (int64_t n = 0; p.prefetch != 0 && n < N; ++n) {
      prefetch_run<T>(run + n * p.tile_bytes + p.prefetch);
    }
    __m512i dot[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i start = _mm512_set1_epi32(-kTraitsOf<T>.zero * sums[r][j]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        dot[r][n] = start;
      }
    }
    add_half_run<T, R, N, 0>(run, p.tile_bytes, x, dot);
    add_half_run<T, R, N, 1>(run, p.tile_bytes, x, dot);
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const uint8_t* chunk = p.chunk + n * p.tile_bytes;
      const __m512 d = block_scales<T>(chunk, j);
      const __m512 m =
          t.mins ? _mm512_xor_ps(load_halves(chunk + t.m_at() + j * 32), _mm512_set1_ps(-0.0f)) : _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float scale = scales[r][j];
        __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[r][n]), _mm512_mul_ps(d, _mm512_set1_ps(scale)));
        if (t.mins) {
          const float sum = static_cast<float>(sums[r][j]);
          term = _mm512_sub_ps(term, _mm512_mul_ps(m, _mm512_set1_ps(scale * sum)));
        }
        pairs[j / 2][r][n] = j % 2 == 0 ? term : _mm512_add_ps(pairs[j / 2][r][n], term);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      x[r] += 32;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const __m512 term =
          _mm512_add_ps(_mm512_add_ps(pairs[0][r][n], pairs[1][r][n]), _mm512_add_ps(pairs[2][r][n], pairs[3][r][n]));
      add_to(p.out + r * kGgufPanel + n * p.out_stride, p.k == 0, term);
    }
  }
}

template <Type T, int R, int N>
void multiply_chunk(const ChunkRows& p) {
  if constexpr (kSmall<T>) {
    small_chunk<T, R, N>(p);
  } else {
    large_chunk<T, R, N>(p);
  }
}

using MultiplyChunk = void (*)(const ChunkRows&);

// A few rows: tiles are read as one stream, whatever that takes.
template <Type T>
void few_rows(const GgufProduct& p, const uint8_t* tile) {
  static constexpr MultiplyChunk kMultiply[] = {
      multiply_chunk<T, 1, 1>, multiply_chunk<T, 2, 1>, multiply_chunk<T, 3, 1>, multiply_chunk<T, 4, 1>,
      multiply_chunk<T, 5, 1>, multiply_chunk<T, 6, 1>, multiply_chunk<T, 7, 1>, multiply_chunk<T, 8, 1>};
  for (int64_t t = 0; t < p.columns / kGgufTile; ++t) {
    for (int64_t k = 0; k < p.activations.chunks; ++k, tile += kTiling<T>.chunk_bytes()) {
      kMultiply[p.rows - 1]({tile, 0, k, p.activations, p.row_ids, kPrefetchAhead, tile_of(p, t), 0});
    }
  }
}

// Many rows, in blocks of at most 6 that are as equal as can be, times two tiles: a chunk of the tiles stays in the
// first-level cache while all rows pass by.
template <Type T>
void many_rows(const GgufProduct& p, const uint8_t* first, int64_t tile_bytes) {
  static constexpr MultiplyChunk kOne[] = {multiply_chunk<T, 4, 1>, multiply_chunk<T, 5, 1>, multiply_chunk<T, 6, 1>};
  static constexpr MultiplyChunk kTwo[] = {multiply_chunk<T, 4, 2>, multiply_chunk<T, 5, 2>, multiply_chunk<T, 6, 2>};
  const int64_t blocks = (p.rows + 5) / 6, tiles = p.columns / kGgufTile;
  for (int64_t k = 0; k < p.activations.chunks; ++k) {
    const int64_t at = k * kTiling<T>.chunk_bytes();
    // The next chunk of the same tiles, or the first of those behind them.
    const int64_t next = k + 1 < p.activations.chunks ? kTiling<T>.chunk_bytes() : tiles * tile_bytes - at;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = p.rows * b / blocks, count = p.rows * (b + 1) / blocks - row;
      for (int64_t t = 0; t < tiles; t += 2) {
        const uint8_t* chunk = first + t * tile_bytes + at;
        (t + 1 < tiles ? kTwo : kOne)[count - 4]({chunk, tile_bytes, k, p.activations, p.row_ids + row,
                                                  b == 0 ? next : 0, tile_of(p, t) + row * kGgufPanel, p.tile_stride});
      }
    }
  }
}

template <Type T>
void multiply_tiles(const GgufProduct& p) {
  const int64_t tile_bytes = p.activations.chunks * kTiling<T>.chunk_bytes();
  const uint8_t* tile = p.weights.blocks + p.first / kGgufTile * tile_bytes;
  if (p.rows <= 8) {
    few_rows<T>(p, tile);
  } else {
    many_rows<T>(p, tile, tile_bytes);
  }
}

}  // namespace

void gguf_int8_tiles(const GgufProduct& product) {
  for_type(product.weights.traits->type, [&](auto type) { multiply_tiles<decltype(type)::value>(product); });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL

#if defined(__clang__)
#pragma clang attribute pop
#endif
FERRUM_END_LEVEL
#endif
