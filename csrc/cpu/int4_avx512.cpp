// int4 kernels for AVX512 with VNNI.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "common/int4.h"

#if defined(__clang__)
#define FERRUM_KEEP_ACCUMULATORS __attribute__((noinline))
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma"))), \
                             apply_to = function)
#else
#define FERRUM_KEEP_ACCUMULATORS __attribute__((noinline, optimize("no-tree-coalesce-vars")))
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")
#pragma GCC diagnostic ignored "-Wuninitialized"  // false positives in GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace ferrum::cpu {
namespace {

void halves_to_floats(const uint16_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i;
    const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1u);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, in + i)));
  }
}

void floats_to_halves(const float* in, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i;
    const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1u);
    const __m256i halves = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(mask, in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(out + i, mask, halves);
  }
}

}  // namespace
}  // namespace ferrum::cpu

#include "cpu/int4_rows.h"

namespace ferrum::cpu {
namespace {

using int4::kLineRows;
using int4::kTileColumns;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

inline __m512i broadcast_codes(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm512_set1_epi32(four);
}

inline __m512 load_scales(const PackedWeights& w, int64_t at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.scales + at)));
}

template <int Bits>
inline __m512i load_zeros(const PackedWeights& w, int64_t at) {
  return w.zeros ? _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + at)))
                 : _mm512_set1_epi32(1 << (Bits - 1));
}

// acc + float(dot) * (weight_scale * activation_scale)
inline __m512 add_group(__m512 acc, __m512i dot, __m512 weight_scales, float activation_scale) {
  const __m512 scale = _mm512_mul_ps(weight_scales, _mm512_set1_ps(activation_scale));
  return _mm512_add_ps(acc, _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale));
}

// The eight rows of a line: rows 0 to 3 in `even`, 4 to 7 in `odd`, four to a lane.
template <int Bits>
struct Line {
  static constexpr int64_t kBytes = kLineRows * kTileColumns * Bits / 8;
  __m512i even, odd;

  explicit Line(const uint8_t* line) {
    const __m512i first = _mm512_loadu_si512(line);
    if constexpr (Bits == 4) {
      const __m512i low_nibbles = _mm512_set1_epi8(15);
      even = _mm512_and_si512(first, low_nibbles);
      odd = _mm512_and_si512(_mm512_srli_epi16(first, 4), low_nibbles);
    } else {
      even = first;
      odd = _mm512_loadu_si512(line + 64);
    }
  }
};

// What to prefetch while tiles are multiplied: the codes read next. Every line multiplied asks for the `step` bytes
// that are its share, so that several blocks of rows on the same tiles use the memory evenly.
struct Ahead {
  const uint8_t* at;
  int64_t step;
  bool few_rows;

  void prefetch(int64_t share) const {
    const char* address = reinterpret_cast<const char*>(at + share * step);
    if (few_rows) {  // memory is the limit: more requests wait in the second level than in the first
      _mm_prefetch(address, _MM_HINT_T1);
    } else {
      _mm_prefetch(address, _MM_HINT_T0);
    }
  }
};

// R rows times one tile, unpacked in registers: where several blocks of rows need the tile, it waits in the first-level
// cache and unpacking it again takes execution slots that the dot products leave free.
template <int Bits, int R>
FERRUM_KEEP_ACCUMULATORS void int8_block(const PackedWeights& w, int64_t tile, const ActivationRows& rows,
                                         const int32_t* row_ids, Ahead ahead, float* out) {
  const int8_t* codes[R];
  int64_t first_group[R];
  __m512 acc[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int64_t row = row_ids[r];
    codes[r] = rows.codes + row * rows.packed_rows;
    first_group[r] = row * rows.groups;
    acc[r] = _mm512_setzero_ps();
  }
  const uint8_t* line = w.codes + tile * w.lines * Line<Bits>::kBytes;
  int64_t i = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t at = (tile * w.groups + g) * kTileColumns;
    const __m512i zeros = load_zeros<Bits>(w, at);
    __m512i low[R], high[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      low[r] = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-rows.sums[first_group[r] + g]));
      high[r] = _mm512_setzero_si512();
    }
    for (const int64_t end = min64(i + w.group_lines, w.lines); i < end; ++i, line += Line<Bits>::kBytes) {
      ahead.prefetch(i);
      const Line<Bits> weights(line);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        low[r] = _mm512_dpbusd_epi32(low[r], weights.even, broadcast_codes(codes[r] + i * kLineRows));
        high[r] = _mm512_dpbusd_epi32(high[r], weights.odd, broadcast_codes(codes[r] + i * kLineRows + 4));
      }
    }
    const __m512 scales = load_scales(w, at);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      acc[r] = add_group(acc[r], _mm512_add_epi32(low[r], high[r]), scales, rows.scales[first_group[r] + g]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(out + r * kPanelColumns, acc[r]);
  }
}

// A line for conversion to fp32: rows 2j and 2j + 1 have their codes at bits 0 and 8 of the lanes of words[j].
template <int Bits>
struct Lanes {
  __m512i words[kLineRows / 2];

  explicit Lanes(const uint8_t* line) {
    const __m512i first = _mm512_loadu_si512(line);
    const __m512i second = Bits == 4 ? _mm512_srli_epi32(first, 4) : _mm512_loadu_si512(line + 64);
    words[0] = first;
    words[1] = _mm512_srli_epi32(first, 16);
    words[2] = second;
    words[3] = _mm512_srli_epi32(second, 16);
  }

  // The bits of 2^23 and 2^15: with a code or-ed into the mantissa the number is larger by just that code.
  static constexpr int32_t magic(int parity) { return (127 + 23 - 8 * parity) << 23; }

  // Row k's codes less the zero points, exact, for biases[p] = magic(p) as a number + zero points.
  __m512 row(int k, const __m512 (&biases)[2]) const {
    const int parity = k % 2;
    const __m512i mask = _mm512_set1_epi32(((1 << Bits) - 1) << 8 * parity);
    const __m512i bits = _mm512_ternarylogic_epi32(words[k / 2], mask, _mm512_set1_epi32(magic(parity)), 0xea);
    return _mm512_sub_ps(_mm512_castsi512_ps(bits), biases[parity]);  // bits = (word & mask) | magic
  }

  static void set_biases(__m512i zeros, __m512 (&biases)[2]) {
    for (int parity = 0; parity < 2; ++parity) {
      const __m512 magic_number = _mm512_castsi512_ps(_mm512_set1_epi32(magic(parity)));
      biases[parity] = _mm512_add_ps(magic_number, _mm512_cvtepi32_ps(zeros));
    }
  }
};

// R rows kept in fp32 times T tiles. A chain of fused additions per row and column; R * T of them at once.
template <int Bits, int R, int T>
FERRUM_KEEP_ACCUMULATORS void full_block(const PackedWeights& w, int64_t first_tile, int64_t tile_step,
                                         const ActivationRows& rows, const int32_t* row_ids, Ahead ahead, float* out) {
  const float* values[R];
  __m512 acc[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    values[r] = rows.values + row_ids[r] * rows.packed_rows;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      acc[r][t] = _mm512_setzero_ps();
    }
  }
  const int64_t tile_bytes = tile_step * w.lines * Line<Bits>::kBytes;
  const uint8_t* line = w.codes + first_tile * w.lines * Line<Bits>::kBytes;
  int64_t i = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512 dot[R][T], biases[T][2];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const int64_t at = ((first_tile + t * tile_step) * w.groups + g) * kTileColumns;
      Lanes<Bits>::set_biases(load_zeros<Bits>(w, at), biases[t]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        dot[r][t] = _mm512_setzero_ps();
      }
    }
    for (const int64_t end = min64(i + w.group_lines, w.lines); i < end; ++i, line += Line<Bits>::kBytes) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        ahead.prefetch(t * w.lines + i);
        const Lanes<Bits> lanes(line + t * tile_bytes);
#pragma GCC unroll 8
        for (int k = 0; k < kLineRows; ++k) {
          const __m512 weights = lanes.row(k, biases[t]);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            dot[r][t] = _mm512_fmadd_ps(_mm512_set1_ps(values[r][i * kLineRows + k]), weights, dot[r][t]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m512 scales = load_scales(w, ((first_tile + t * tile_step) * w.groups + g) * kTileColumns);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        acc[r][t] = _mm512_add_ps(acc[r][t], _mm512_mul_ps(dot[r][t], scales));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      _mm512_storeu_ps(out + r * kPanelColumns + t * tile_step * kTileColumns, acc[r][t]);
    }
  }
}

// Calls multiply(block, tiles, tile, ahead, first row) for the tiles of a panel, `width` at a time, and for blocks of
// at most 8 rows as equal as can be.
template <int Bits, typename Multiply>
void for_each_block(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles, int64_t width,
                    int64_t num_rows, const uint8_t* next, const Multiply& multiply) {
  constexpr int64_t kRows = 8;
  const int64_t blocks = int4::ceil_div(num_rows, kRows);
  const int64_t step = int4::ceil_div(Line<Bits>::kBytes, blocks);
  for (int64_t t = 0; t < num_tiles;) {
    const int64_t tiles = t + width <= num_tiles ? width : 1;
    const int64_t tile = first_tile + t * tile_step;
    t += tiles;
    const uint8_t* ahead = t < num_tiles ? w.codes + (first_tile + t * tile_step) * w.lines * Line<Bits>::kBytes : next;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = num_rows * b / blocks;
      multiply(num_rows * (b + 1) / blocks - row, tiles, tile,
               Ahead{ahead + b * tiles * w.lines * step, step, blocks == 1}, row);
    }
  }
}

template <int Bits>
void by_int8(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const uint8_t* next, float* out) {
  using Block = void (*)(const PackedWeights&, int64_t, const ActivationRows&, const int32_t*, Ahead, float*);
  static constexpr Block kBlocks[] = {int8_block<Bits, 1>, int8_block<Bits, 2>, int8_block<Bits, 3>,
                                      int8_block<Bits, 4>, int8_block<Bits, 5>, int8_block<Bits, 6>,
                                      int8_block<Bits, 7>, int8_block<Bits, 8>};
  for_each_block<Bits>(w, first_tile, tile_step, num_tiles, 1, num_rows, next,
                       [&](int64_t block, int64_t, int64_t tile, Ahead ahead, int64_t row) {
                         kBlocks[block - 1](w, tile, rows, row_ids + row, ahead,
                                            out + row * kPanelColumns + (tile - first_tile) * kTileColumns);
                       });
}

template <int Bits>
void by_full(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const uint8_t* next, float* out) {
  using Block = void (*)(const PackedWeights&, int64_t, int64_t, const ActivationRows&, const int32_t*, Ahead, float*);
  static constexpr Block kBlocks[] = {full_block<Bits, 1, 1>, full_block<Bits, 2, 1>, full_block<Bits, 3, 1>,
                                      full_block<Bits, 4, 1>, full_block<Bits, 5, 1>, full_block<Bits, 6, 1>,
                                      full_block<Bits, 7, 1>, full_block<Bits, 8, 1>};
  static constexpr Block kWideBlocks[] = {full_block<Bits, 1, 4>, full_block<Bits, 2, 4>};
  // One or two chains would leave the multipliers waiting for each other's results: take four tiles side by side.
  const int64_t width = num_rows <= 2 ? 4 : 1;
  for_each_block<Bits>(w, first_tile, tile_step, num_tiles, width, num_rows, next,
                       [&](int64_t block, int64_t tiles, int64_t tile, Ahead ahead, int64_t row) {
                         const Block multiply = tiles == 1 ? kBlocks[block - 1] : kWideBlocks[block - 1];
                         multiply(w, tile, tile_step, rows, row_ids + row, ahead,
                                  out + row * kPanelColumns + (tile - first_tile) * kTileColumns);
                       });
}

}  // namespace

const Int4Kernels& int4_kernels_avx512() {
  static const Int4Kernels kernels{by_int8<4>, by_full<4>,   by_int8<8>,     by_full<8>, to_float,
                                   from_float, quantize_row, silu_mul_tiles, add_scaled};
  return kernels;
}

}  // namespace ferrum::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
