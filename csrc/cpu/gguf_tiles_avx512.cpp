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

#include "cpu/gguf_tile_codes_avx512.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// What to prefetch while tiles are multiplied: the weights read next. Every run multiplied asks for its share of
// `lines`, so that several blocks of rows on the same tiles use the memory evenly. More requests wait in the second
// level than in the first.
struct Ahead {
  const uint8_t* at;
  int64_t lines;

  void prefetch() {
    for (int64_t i = 0; i < lines; ++i, at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    }
  }
};

// N tiles and the R rows they are multiplied with.
struct TileRows {
  const uint8_t* tile;
  int64_t tile_bytes;  // to the next tile
  const GgufActivations& activations;
  const int32_t* row_ids;
  Ahead ahead;
  float* out;          // rows of kGgufPanel
  int64_t out_stride;  // to the next tile's
};

// Adds vector P of a run of N tiles to the dot products with R rows, whose codes for the run are at x[r] + at.
template <Type T, int R, int N, int P>
inline __attribute__((always_inline)) void add_vector(const uint8_t* run, int64_t tile_bytes, const int8_t* const* x,
                                                      int64_t at, __m512i (*dot)[N]) {
  __m512i w[N];
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    w[n] = codes<T, P>(run + n * tile_bytes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512i word = broadcast_word(x[r] + at + 4 * P);
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      dot[r][n] = _mm512_dpbusd_epi32(dot[r][n], w[n], word);
    }
  }
}

template <Type T, int R, int N, int Half>
inline __attribute__((always_inline)) void add_half_run(const uint8_t* run, int64_t tile_bytes, const int8_t* const* x,
                                                        int64_t at, __m512i (*dot)[N]) {
  add_vector<T, R, N, 4 * Half>(run, tile_bytes, x, at, dot);
  add_vector<T, R, N, 4 * Half + 1>(run, tile_bytes, x, at, dot);
  add_vector<T, R, N, 4 * Half + 2>(run, tile_bytes, x, at, dot);
  add_vector<T, R, N, 4 * Half + 3>(run, tile_bytes, x, at, dot);
}

inline void add_to(float* out, __m512 term) { _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), term)); }

template <int R, int N>
inline void clear_out(const TileRows& p) {
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      _mm512_storeu_ps(p.out + r * kGgufPanel + n * p.out_stride, _mm512_setzero_ps());
    }
  }
}

// total += dot * scale j of the chunk
template <Type T, int R, int N>
inline __attribute__((always_inline)) void add_scaled(const uint8_t* chunk, int64_t tile_bytes, int64_t j,
                                                      const __m512i (*dot)[N], __m512i (*total)[N]) {
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    const __m512i scales = widen<T>(chunk + n * tile_bytes + kTiling<T>.scales_at() + j * gguf::kTileRows);
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

// Adds the terms of a tile's chunk of 256 to out: `total` has the scaled dot products of R rows, at[r] is row r's
// chunk.
template <Type T, int R, int N>
inline __attribute__((always_inline)) void finish_large(const GgufActivations& a, const uint8_t* chunk, int n,
                                                        const int64_t* at, const __m512i (*total)[N], float* out) {
  constexpr gguf::Tiling t = kTiling<T>;
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
    add_to(out + r * kGgufPanel, term);
  }
}

// Blocks of 256.
template <Type T, int R, int N>
FERRUM_KEEP_ACCUMULATORS void large_tiles(const TileRows& p) {
  constexpr gguf::Tiling t = kTiling<T>;
  const GgufActivations& a = p.activations;
  const int64_t tile_bytes = p.tile_bytes;
  const int8_t* x[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    x[r] = a.codes + p.row_ids[r] * a.chunks * gguf::kChunk;
  }
  clear_out<R, N>(p);
  Ahead ahead = p.ahead;
  const uint8_t* chunk = p.tile;
  for (int64_t k = 0; k < a.chunks; ++k, chunk += t.chunk_bytes()) {
    __m512i total[R][N];
    clear<R, N>(total);
    const uint8_t* run = chunk;
    int64_t at = k * gguf::kChunk;
    for (int64_t j = 0; j < 8; ++j, run += t.run_bytes(), at += gguf::kSmallBlock) {
      ahead.prefetch();
      __m512i dot[R][N];
      clear<R, N>(dot);
      add_half_run<T, R, N, 0>(run, tile_bytes, x, at, dot);
      if constexpr (t.scales == 16) {
        add_scaled<T, R, N>(chunk, tile_bytes, 2 * j, dot, total);
        clear<R, N>(dot);
      }
      add_half_run<T, R, N, 1>(run, tile_bytes, x, at, dot);
      add_scaled<T, R, N>(chunk, tile_bytes, t.scales == 16 ? 2 * j + 1 : j, dot, total);
    }
    int64_t rows_at[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      rows_at[r] = p.row_ids[r] * a.chunks + k;
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      finish_large<T, R, N>(a, chunk + n * tile_bytes, n, rows_at, total, p.out + n * p.out_stride);
    }
  }
}

// The terms of block j of a chunk, the `block`-th of the row.
template <Type T, int R, int N>
inline __attribute__((always_inline)) void small_run(const TileRows& p, const uint8_t* chunk, int64_t j, int64_t block,
                                                     const int8_t* const* x, const int64_t* first_block,
                                                     __m512 (*terms)[N]) {
  constexpr gguf::Tiling t = kTiling<T>;
  const GgufActivations& a = p.activations;
  const uint8_t* run = chunk + j * t.run_bytes();
  __m512i dot[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512i sum = _mm512_set1_epi32(a.run_sums[first_block[r] + block]);
    const __m512i start = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-kTraitsOf<T>.zero));
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      dot[r][n] = start;
    }
  }
  add_half_run<T, R, N, 0>(run, p.tile_bytes, x, block * gguf::kSmallBlock, dot);
  add_half_run<T, R, N, 1>(run, p.tile_bytes, x, block * gguf::kSmallBlock, dot);
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    const uint8_t* of_tile = chunk + n * p.tile_bytes;
    const __m512 d = block_scales<T>(of_tile, j);
    const __m512 m =
        t.mins ? _mm512_xor_ps(load_halves(of_tile + t.m_at() + j * 32), _mm512_set1_ps(-0.0f)) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float scale = a.scales[first_block[r] + block];
      terms[r][n] = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[r][n]), _mm512_mul_ps(d, _mm512_set1_ps(scale)));
      if (t.mins) {
        const float sum = static_cast<float>(a.run_sums[first_block[r] + block]);
        terms[r][n] = _mm512_sub_ps(terms[r][n], _mm512_mul_ps(m, _mm512_set1_ps(scale * sum)));
      }
    }
  }
}

// Blocks of 32.
template <Type T, int R, int N>
FERRUM_KEEP_ACCUMULATORS void small_tiles(const TileRows& p) {
  const int8_t* x[R];
  int64_t first_block[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    first_block[r] = p.row_ids[r] * p.activations.chunks * 8;
    x[r] = p.activations.codes + first_block[r] * gguf::kSmallBlock;
  }
  clear_out<R, N>(p);
  Ahead ahead = p.ahead;
  const uint8_t* chunk = p.tile;
  for (int64_t k = 0; k < p.activations.chunks; ++k, chunk += kTiling<T>.chunk_bytes()) {
    __m512 pairs[4][R][N], terms[R][N];
    for (int64_t j = 0; j < 8; j += 2) {
      ahead.prefetch();
      small_run<T, R, N>(p, chunk, j, 8 * k + j, x, first_block, pairs[j / 2]);
      ahead.prefetch();
      small_run<T, R, N>(p, chunk, j + 1, 8 * k + j + 1, x, first_block, terms);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
          pairs[j / 2][r][n] = _mm512_add_ps(pairs[j / 2][r][n], terms[r][n]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const __m512 term =
            _mm512_add_ps(_mm512_add_ps(pairs[0][r][n], pairs[1][r][n]), _mm512_add_ps(pairs[2][r][n], pairs[3][r][n]));
        add_to(p.out + r * kGgufPanel + n * p.out_stride, term);
      }
    }
  }
}

template <Type T, int R, int N>
void tiles(const TileRows& p) {
  if constexpr (kSmall<T>) {
    small_tiles<T, R, N>(p);
  } else {
    large_tiles<T, R, N>(p);
  }
}

using MultiplyTiles = void (*)(const TileRows&);

// Up to 8 rows take a tile at a time. More are taken in blocks of at most 6, as equal as can be, times two tiles, which
// wait in the second-level cache while all rows pass by.
template <Type T>
void multiply_tiles(const GgufProduct& p) {
  static constexpr MultiplyTiles kOne[] = {tiles<T, 1, 1>, tiles<T, 2, 1>, tiles<T, 3, 1>, tiles<T, 4, 1>,
                                           tiles<T, 5, 1>, tiles<T, 6, 1>, tiles<T, 7, 1>, tiles<T, 8, 1>};
  static constexpr MultiplyTiles kTwo[] = {tiles<T, 4, 2>, tiles<T, 5, 2>, tiles<T, 6, 2>};
  constexpr int64_t run_lines = (kTiling<T>.chunk_bytes() / 64 + 7) / 8;  // of one tile, chunk by chunk
  const int64_t tile_bytes = p.weights.tile_bytes(), num_tiles = p.columns / kGgufTile;
  const int64_t blocks = p.rows <= 8 ? 1 : (p.rows + 5) / 6;
  const uint8_t* tile = p.weights.blocks + p.first / kGgufTile * tile_bytes;
  for (int64_t t = 0; t < num_tiles;) {
    const int64_t width = blocks > 1 && t + 2 <= num_tiles ? 2 : 1;
    const bool last = t + width == num_tiles;
    const uint8_t* next = last ? p.next : tile + width * tile_bytes;
    const int64_t lines = next == nullptr ? 0 : (run_lines * width + blocks - 1) / blocks;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = p.rows * b / blocks, count = p.rows * (b + 1) / blocks - row;
      const Ahead ahead{next + b * p.activations.chunks * 8 * lines * 64, lines};
      (width == 2 ? kTwo[count - 4] : kOne[count - 1])(
          {tile, tile_bytes, p.activations, p.row_ids + row, ahead, tile_of(p, t) + row * kGgufPanel, p.tile_stride});
    }
    t += width;
    tile += width * tile_bytes;
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
