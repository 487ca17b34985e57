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
// Scheduled for a processor with these instructions: for the generic one the products wait longer for their operands.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vnni,tune=icelake-server")
#endif

#include "cpu/gguf_tile_codes_avx512.h"
#include "cpu/gguf_tile_rows_avx512.h"

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

// A tile and the rows it is multiplied with.
struct TileRows {
  const uint8_t* tile;
  const GgufActivations& activations;
  const int32_t* row_ids;
  Ahead ahead;
  float* out;  // rows of kGgufPanel
};

// Adds vector P of a run to the dot products with R rows. With few rows memory is waited for, not the loads.
template <Type T, int R, int P>
inline __attribute__((always_inline)) void add_vector(const uint8_t* run, const RowCodes<R>& x, __m512i* dot) {
  const __m512i w = codes<T, P, (R > 2 && kTiling<T>.high_bits != 0)>(run);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    dot[r] = add_dot(dot[r], w, x.at[r] + 4 * P);
  }
}

// One or two rows are multiplied faster than weights come from memory, and then wait for those that are in the second
// level too: each half of a run asks the first level for what lies a little behind it.
template <Type T, int R, int Half>
inline __attribute__((always_inline)) void prefetch_near(const uint8_t* run) {
  constexpr int64_t kNearBytes = 1024, lines = R <= 2 ? kTiling<T>.run_bytes() / 2 / 64 : 0;
#pragma GCC unroll 4
  for (int64_t i = Half * lines; i < (Half + 1) * lines; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(run + kNearBytes + 64 * i), _MM_HINT_T0);
  }
}

template <Type T, int R, int Half>
inline __attribute__((always_inline)) void add_half_run(const uint8_t* run, const RowCodes<R>& x, __m512i* dot) {
  prefetch_near<T, R, Half>(run);
  add_vector<T, R, 4 * Half>(run, x, dot);
  add_vector<T, R, 4 * Half + 1>(run, x, dot);
  add_vector<T, R, 4 * Half + 2>(run, x, dot);
  add_vector<T, R, 4 * Half + 3>(run, x, dot);
}

template <int R>
inline void clear_out(float* out) {
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(out + r * kGgufPanel, _mm512_setzero_ps());
  }
}

inline void add_to(float* out, __m512 term) { _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), term)); }

// total += dot * scale j of the chunk
template <Type T, int R>
inline __attribute__((always_inline)) void add_scaled(const uint8_t* chunk, int64_t j, const __m512i* dot,
                                                      __m512i* total) {
  const __m512i scales = widen<T>(chunk + kTiling<T>.scales_at() + j * gguf::kTileRows);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    total[r] = _mm512_add_epi32(total[r], _mm512_mullo_epi32(dot[r], scales));
  }
}

// Pair j of the int16 factors of the activations' sums: mins or, without them, scales times -zero.
template <Type T>
inline __m512i factor_pairs(const uint8_t* chunk, int64_t j) {
  const uint8_t* at = chunk + (kTiling<T>.mins ? kTiling<T>.mins_at() : kTiling<T>.scales_at()) + j * 32;
  const __m512i pairs = _mm512_mask_blend_epi16(0xaaaaaaaau, widen<T>(at), _mm512_slli_epi32(widen<T>(at + 16), 16));
  return kTiling<T>.mins ? pairs : _mm512_mullo_epi16(pairs, _mm512_set1_epi16(-kTraitsOf<T>.zero));
}

// Adds the terms of a chunk of 256 to out: `total` has the scaled dot products of R rows, at[r] is row r's chunk. The
// zero point is still to be subtracted unless the dot products are `Centred`.
template <Type T, int R, bool Centred>
inline __attribute__((always_inline)) void finish_large(const GgufActivations& a, const uint8_t* chunk,
                                                        const int64_t* at, __m512i* total, float* out) {
  constexpr gguf::Tiling t = kTiling<T>;
  __m512i mins[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    mins[r] = _mm512_setzero_si512();
  }
  __m512i* rest = t.mins ? mins : total;
#pragma GCC unroll 8
  for (int64_t j = 0; j < (t.mins || !Centred ? t.scales / 2 : 0); ++j) {
    const __m512i factors = factor_pairs<T>(chunk, j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int16_t* sums = t.scales == 8 ? a.run_sums + at[r] * 8 : a.sums + at[r] * 16;
      rest[r] = add_dot(rest[r], factors, sums + 2 * j);
    }
  }
  const __m512 d = load_halves(chunk + t.d_at());
  const __m512 m = t.mins ? load_halves(chunk + t.m_at()) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512 scale = _mm512_set1_ps(a.scales[at[r]]);
    __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(total[r]), _mm512_mul_ps(d, scale));
    if (t.mins) {
      term = _mm512_sub_ps(term, _mm512_mul_ps(_mm512_cvtepi32_ps(mins[r]), _mm512_mul_ps(m, scale)));
    }
    add_to(out + r * kGgufPanel, term);
  }
}

// Whether dot products can fit 16 bits: less their zero point's part, which is known for runs of 16 codes only.
template <Type T>
constexpr bool kMayBeNarrow = kTiling<T>.mins || kTiling<T>.scales == 16;

// Whether they do with rows of these peaks, so that two of them are scaled at once.
template <Type T>
inline bool is_narrow(GgufPeaks peaks) {
  constexpr gguf::Tiling t = kTiling<T>;
  constexpr int reach = t.mins ? (1 << (t.low_bits + t.high_bits)) - 1 : kTraitsOf<T>.zero;
  return reach * (t.scales == 16 ? peaks.of_16 : peaks.of_32) <= 32767;
}

// What the dot products of a chunk start with: zeros or, where there are no mins, the zero point's part.
template <Type T, int R>
struct Starts {
  alignas(64) int32_t values[R][16];

  void load(const GgufActivations& a, const int64_t* at) {
    for (int r = 0; !kTiling<T>.mins && r < R; ++r) {
      const __m512i sums = _mm512_cvtepi16_epi32(load32(a.sums + at[r] * 16));
      constexpr int shift = __builtin_ctz(kTiling<T>.mins ? 1 : kTraitsOf<T>.zero);  // a power of two
      _mm512_store_si512(values[r], _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sums), shift));
    }
  }
  void set(int64_t j, __m512i* dot) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      dot[r] = kTiling<T>.mins ? _mm512_setzero_si512() : _mm512_set1_epi32(values[r][j]);
    }
  }
};

// total += dot products 2j and 2j + 1 times their scales, two int16 products in each lane.
template <Type T, int R>
inline __attribute__((always_inline)) void add_scaled_pair(const uint8_t* chunk, int64_t j, const __m512i* even,
                                                           const __m512i* odd, __m512i* total) {
  const uint8_t* at = chunk + kTiling<T>.scales_at() + j * 32;
  const __m512i scales = _mm512_mask_blend_epi16(0xaaaaaaaau, widen<T>(at), _mm512_slli_epi32(widen<T>(at + 16), 16));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512i pair = _mm512_mask_blend_epi16(0xaaaaaaaau, even[r], _mm512_slli_epi32(odd[r], 16));
    total[r] = _mm512_dpwssd_epi32(total[r], pair, scales);
  }
}

// total = the scaled dot products of a chunk with the rows x, that fit 16 bits.
template <Type T, int R>
inline __attribute__((always_inline)) void narrow_chunk(const uint8_t* chunk, RowCodes<R>& x,
                                                        const Starts<T, R>& starts, Ahead& ahead, __m512i* total) {
  constexpr gguf::Tiling t = kTiling<T>;
  __m512i even[R], odd[R];
  const uint8_t* run = chunk;
  if constexpr (t.scales == 16) {
    for (int64_t j = 0; j < 8; ++j, run += t.run_bytes(), x.next_run()) {
      ahead.prefetch();
      starts.set(2 * j, even);
      add_half_run<T, R, 0>(run, x, even);
      starts.set(2 * j + 1, odd);
      add_half_run<T, R, 1>(run, x, odd);
      add_scaled_pair<T, R>(chunk, j, even, odd, total);
    }
  } else {
    for (int64_t j = 0; j < 4; ++j, run += 2 * t.run_bytes(), x.next_run()) {
      ahead.prefetch();
      starts.set(2 * j, even);
      add_half_run<T, R, 0>(run, x, even);
      add_half_run<T, R, 1>(run, x, even);
      x.next_run();
      ahead.prefetch();
      starts.set(2 * j + 1, odd);
      add_half_run<T, R, 0>(run + t.run_bytes(), x, odd);
      add_half_run<T, R, 1>(run + t.run_bytes(), x, odd);
      add_scaled_pair<T, R>(chunk, j, even, odd, total);
    }
  }
}

// The same for any dot products, which still have their zero point.
template <Type T, int R>
inline __attribute__((always_inline)) void wide_chunk(const uint8_t* chunk, RowCodes<R>& x, Ahead& ahead,
                                                      __m512i* total) {
  constexpr gguf::Tiling t = kTiling<T>;
  const uint8_t* run = chunk;
  for (int64_t j = 0; j < 8; ++j, run += t.run_bytes(), x.next_run()) {
    ahead.prefetch();
    __m512i dot[R][1];
    clear<R, 1>(dot);
    add_half_run<T, R, 0>(run, x, *dot);
    if constexpr (t.scales == 16) {
      add_scaled<T, R>(chunk, 2 * j, *dot, total);
      clear<R, 1>(dot);
    }
    add_half_run<T, R, 1>(run, x, *dot);
    add_scaled<T, R>(chunk, t.scales == 16 ? 2 * j + 1 : j, *dot, total);
  }
}

// Blocks of 256.
template <Type T, int R, bool Narrow>
FERRUM_KEEP_ACCUMULATORS void large_tile(const TileRows& p) {
  const GgufActivations& a = p.activations;
  RowCodes<R> x(a, p.row_ids);
  clear_out<R>(p.out);
  Ahead ahead = p.ahead;
  Starts<T, R> starts;
  const uint8_t* chunk = p.tile;
  for (int64_t k = 0; k < a.chunks; ++k, chunk += kTiling<T>.chunk_bytes()) {
    int64_t rows_at[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      rows_at[r] = p.row_ids[r] * a.chunks + k;
    }
    __m512i total[R][1];
    clear<R, 1>(total);
    if constexpr (Narrow) {
      starts.load(a, rows_at);
      narrow_chunk<T, R>(chunk, x, starts, ahead, *total);
    } else {
      wide_chunk<T, R>(chunk, x, ahead, *total);
    }
    finish_large<T, R, Narrow>(a, chunk, rows_at, *total, p.out);
  }
}

// What R rows bring to the eight blocks of a chunk, side by side so that they take few address registers.
template <int R>
struct BlockFactors {
  alignas(32) int32_t starts[R][8];            // -zero * sum
  alignas(32) float scales[R][8], mins[R][8];  // mins: of the weights' m, scale * sum

  void load(const GgufActivations& a, int r, int64_t block, int zero) {
    const __m256i sums = _mm256_cvtepi16_epi32(load16(a.run_sums + block));
    const __m256 scale = _mm256_loadu_ps(a.scales + block);
    _mm256_store_si256(reinterpret_cast<__m256i*>(starts[r]), _mm256_mullo_epi32(sums, _mm256_set1_epi32(-zero)));
    _mm256_store_ps(scales[r], scale);
    _mm256_store_ps(mins[r], _mm256_mul_ps(scale, _mm256_cvtepi32_ps(sums)));
  }
};

// The terms of block j of a chunk.
template <Type T, int R>
inline __attribute__((always_inline)) void small_run(const uint8_t* chunk, int64_t j, RowCodes<R>& x,
                                                     const BlockFactors<R>& factors, __m512* terms) {
  constexpr gguf::Tiling t = kTiling<T>;
  const uint8_t* run = chunk + j * t.run_bytes();
  __m512i dot[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    dot[r] = _mm512_set1_epi32(factors.starts[r][j]);
  }
  add_half_run<T, R, 0>(run, x, dot);
  add_half_run<T, R, 1>(run, x, dot);
  x.next_run();
  const __m512 d = block_scales<T>(chunk, j);
  const __m512 m =
      t.mins ? _mm512_xor_ps(load_halves(chunk + t.m_at() + j * 32), _mm512_set1_ps(-0.0f)) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(factors.scales[r][j]));
    terms[r] = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[r]), scale);
    if (t.mins) {
      terms[r] = _mm512_sub_ps(terms[r], _mm512_mul_ps(m, _mm512_set1_ps(factors.mins[r][j])));
    }
  }
}

// Blocks of 32.
template <Type T, int R>
FERRUM_KEEP_ACCUMULATORS void small_tile(const TileRows& p) {
  const GgufActivations& a = p.activations;
  RowCodes<R> x(a, p.row_ids);
  clear_out<R>(p.out);
  Ahead ahead = p.ahead;
  const uint8_t* chunk = p.tile;
  BlockFactors<R> factors;
  for (int64_t k = 0; k < a.chunks; ++k, chunk += kTiling<T>.chunk_bytes()) {
    for (int r = 0; r < R; ++r) {
      factors.load(a, r, (p.row_ids[r] * a.chunks + k) * 8, kTraitsOf<T>.zero);
    }
    __m512 pairs[4][R], terms[R];
    for (int64_t j = 0; j < 8; j += 2) {
      ahead.prefetch();
      small_run<T, R>(chunk, j, x, factors, pairs[j / 2]);
      ahead.prefetch();
      small_run<T, R>(chunk, j + 1, x, factors, terms);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        pairs[j / 2][r] = _mm512_add_ps(pairs[j / 2][r], terms[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 term =
          _mm512_add_ps(_mm512_add_ps(pairs[0][r], pairs[1][r]), _mm512_add_ps(pairs[2][r], pairs[3][r]));
      add_to(p.out + r * kGgufPanel, term);
    }
  }
}

// The largest of each peak of some rows.
inline GgufPeaks peaks_of(const GgufActivations& a, const int32_t* row_ids, int rows) {
  GgufPeaks most = a.peaks[row_ids[0]];
  for (int r = 1; r < rows; ++r) {
    const GgufPeaks mine = a.peaks[row_ids[r]];
    most.of_16 = mine.of_16 > most.of_16 ? mine.of_16 : most.of_16;
    most.of_32 = mine.of_32 > most.of_32 ? mine.of_32 : most.of_32;
  }
  return most;
}

template <Type T, int R>
void multiply_tile(const TileRows& p) {
  if constexpr (kSmall<T>) {
    return small_tile<T, R>(p);
  } else {
    if constexpr (kMayBeNarrow<T>) {
      if (is_narrow<T>(peaks_of(p.activations, p.row_ids, R))) {
        return large_tile<T, R, true>(p);
      }
    }
    return large_tile<T, R, false>(p);
  }
}

// A tile at a time, for blocks of at most 8 rows that are as equal as can be.
template <Type T>
void multiply_tiles(const GgufProduct& p) {
  using Multiply = void (*)(const TileRows&);
  static constexpr Multiply kMultiply[] = {multiply_tile<T, 1>, multiply_tile<T, 2>, multiply_tile<T, 3>,
                                           multiply_tile<T, 4>, multiply_tile<T, 5>, multiply_tile<T, 6>,
                                           multiply_tile<T, 7>, multiply_tile<T, 8>};
  constexpr int64_t run_lines = (kTiling<T>.chunk_bytes() / 64 + 7) / 8;  // an eighth of a chunk
  const int64_t tile_bytes = p.weights.tile_bytes(), tiles = p.columns / kGgufTile;
  const int64_t blocks = (p.rows + 7) / 8;
  const uint8_t* tile = p.weights.at(p.first);
  for (int64_t t = 0; t < tiles; ++t, tile += tile_bytes) {
    const uint8_t* next = t + 1 < tiles ? tile + tile_bytes : p.next;
    const int64_t lines = next == nullptr ? 0 : (run_lines + blocks - 1) / blocks;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = p.rows * b / blocks, count = p.rows * (b + 1) / blocks - row;
      const Ahead ahead{next + b * p.activations.chunks * 8 * lines * 64, lines};
      kMultiply[count - 1]({tile, p.activations, p.row_ids + row, ahead, tile_of(p, t) + row * kGgufPanel});
    }
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
