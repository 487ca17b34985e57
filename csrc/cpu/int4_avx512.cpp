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

template <int Bits>
constexpr int64_t kLineBytes = kLineRows * kTileColumns * Bits / 8;

// Rows 0 to 3 (half 0) or 4 to 7 (half 1) of a line, four to a lane.
template <int Bits>
inline __m512i half_line(const uint8_t* line, int half) {
  if constexpr (Bits == 8) {
    return _mm512_loadu_si512(line + 64 * half);
  }
  const __m512i both = _mm512_loadu_si512(line);
  return _mm512_and_si512(half == 0 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
}

// What is read next, prefetched while tiles are multiplied: codes line by line, scales and zero points group by group.
// Every line of T tiles asks for T lines' bytes, `step` behind what the line before asked for, so that several blocks
// of rows on the same tiles use the memory evenly. They wait in the second level: the first holds the tiles in use, and
// memory takes more requests from the second.
struct Ahead {
  const uint8_t* at;
  int64_t step;
  TileStart tile;

  template <int64_t Bytes>
  static void prefetch_bytes(const void* from) {
#pragma GCC unroll 8
    for (int64_t b = 0; b < Bytes; b += 64) {
      _mm_prefetch(static_cast<const char*>(from) + b, _MM_HINT_T1);
    }
  }
  template <int64_t Bytes>
  void prefetch_line(int64_t line) const {
    prefetch_bytes<Bytes>(at + line * step);
  }
  // Without this each group waits for its scales: they lie far from the codes, too few for a stream of their own.
  template <int64_t T>
  void prefetch_group(int64_t g) const {
    prefetch_bytes<2 * T * kTileColumns>(tile.scales + g * T * kTileColumns);
    if (tile.zeros) {
      prefetch_bytes<T * kTileColumns>(tile.zeros + g * T * kTileColumns);
    }
  }
};

// Starts the sums of a group at -(zero points * sum of the activations' codes). `next_tile`: from tile to tile.
template <int Bits, int R, int T>
inline void start_group(const PackedWeights& w, int64_t at, int64_t next_tile, const int32_t* const (&sums)[R],
                        int64_t g, __m512i (&dot)[R][T]) {
  if (w.zeros == nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        dot[r][t] = _mm512_set1_epi32(-(1 << (Bits - 1)) * sums[r][g]);
      }
    }
    return;
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const __m512i zeros = load_zeros<Bits>(w, at + t * next_tile);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      dot[r][t] = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-sums[r][g]));
    }
  }
}

// R rows times T tiles, unpacked in registers: execution slots that the dot products leave free do it. 6 rows and 4
// tiles take 24 of the 32 registers, so that 10 loads feed 24 dot products; the fp32 sums wait in `out`.
template <int Bits, int R, int T>
FERRUM_KEEP_ACCUMULATORS void int8_block(const PackedWeights& w, int64_t first_tile, int64_t tile_step,
                                         const ActivationRows& rows, const int32_t* row_ids, Ahead ahead, float* out) {
  const int8_t* codes[R];
  const float* row_scales[R];
  const int32_t* row_sums[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int64_t row = row_ids[r];
    codes[r] = rows.codes + row * rows.packed_rows;
    row_scales[r] = rows.scales + row * rows.groups;
    row_sums[r] = rows.sums + row * rows.groups;
  }
  const int64_t tile_bytes = tile_step * w.lines * kLineBytes<Bits>;
  const int64_t next_tile = tile_step * w.groups * kTileColumns;
  const uint8_t* line = w.codes + first_tile * w.lines * kLineBytes<Bits>;
  int64_t i = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t at = (first_tile * w.groups + g) * kTileColumns;
    ahead.prefetch_group<T>(g);
    __m512i dot[R][T];
    start_group<Bits>(w, at, next_tile, row_sums, g, dot);
    for (const int64_t end = min64(i + w.group_lines, w.lines); i < end; ++i, line += kLineBytes<Bits>) {
      ahead.prefetch_line<T * kLineBytes<Bits>>(i);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512i weights[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          weights[t] = half_line<Bits>(line + t * tile_bytes, half);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m512i activations = broadcast_codes(codes[r] + i * kLineRows + 4 * half);
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) {
            dot[r][t] = _mm512_dpbusd_epi32(dot[r][t], weights[t], activations);
          }
        }
      }
    }
    const __mmask16 started = g == 0 ? 0 : 0xffff;
    __m512 scales[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      scales[t] = load_scales(w, at + t * next_tile);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        __asm__ volatile("" : "+v"(dot[r][t]));  // in this order: all conversions first would not fit the registers
        float* o = out + r * kPanelColumns + t * tile_step * kTileColumns;
        const __m512 acc = _mm512_maskz_loadu_ps(started, o);
        _mm512_storeu_ps(o, add_group(acc, dot[r][t], scales[t], row_scales[r][g]));
      }
    }
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
  const int64_t tile_bytes = tile_step * w.lines * kLineBytes<Bits>;
  const uint8_t* line = w.codes + first_tile * w.lines * kLineBytes<Bits>;
  int64_t i = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    ahead.prefetch_group<T>(g);
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
    for (const int64_t end = min64(i + w.group_lines, w.lines); i < end; ++i, line += kLineBytes<Bits>) {
      ahead.prefetch_line<T * kLineBytes<Bits>>(i);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
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

using Block = void (*)(const PackedWeights&, int64_t, int64_t, const ActivationRows&, const int32_t*, Ahead, float*);

// Runs the blocks over a panel: `width` tiles at a time, by blocks[rows - 1] for blocks of at most kRows rows, as equal
// as can be.
template <int Bits, size_t kRows>
void for_each_block(const Block (&blocks)[kRows], int64_t width, const PackedWeights& w, int64_t first_tile,
                    int64_t tile_step, int64_t num_tiles, const ActivationRows& rows, const int32_t* row_ids,
                    int64_t num_rows, const TileStart& next, float* out) {
  const int64_t count = int4::ceil_div(num_rows, kRows);
  const int64_t step = int4::ceil_div(width * kLineBytes<Bits>, count);
  for (int64_t t = 0; t < num_tiles; t += width) {
    const int64_t tile = first_tile + t * tile_step;
    const TileStart ahead = t + width < num_tiles ? w.tile(tile + width * tile_step) : next;
    for (int64_t b = 0; b < count; ++b) {
      const int64_t row = num_rows * b / count;
      const int64_t block_rows = num_rows * (b + 1) / count - row;
      blocks[block_rows - 1](w, tile, tile_step, rows, row_ids + row,
                             Ahead{ahead.codes + b * w.lines * step, step, ahead},
                             out + row * kPanelColumns + t * tile_step * kTileColumns);
    }
  }
}

template <int Bits, int T>
constexpr Block kInt8Blocks[] = {int8_block<Bits, 1, T>, int8_block<Bits, 2, T>, int8_block<Bits, 3, T>,
                                 int8_block<Bits, 4, T>, int8_block<Bits, 5, T>, int8_block<Bits, 6, T>};

template <int Bits>
void by_int8(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const TileStart& next, float* out) {
  const int64_t width = num_tiles % 4 == 0 ? 4 : num_tiles % 2 == 0 ? 2 : 1;
  const auto& blocks = width == 4 ? kInt8Blocks<Bits, 4> : width == 2 ? kInt8Blocks<Bits, 2> : kInt8Blocks<Bits, 1>;
  for_each_block<Bits>(blocks, width, w, first_tile, tile_step, num_tiles, rows, row_ids, num_rows, next, out);
}

template <int Bits>
constexpr Block kFullBlocks[] = {full_block<Bits, 1, 1>, full_block<Bits, 2, 1>, full_block<Bits, 3, 1>,
                                 full_block<Bits, 4, 1>, full_block<Bits, 5, 1>, full_block<Bits, 6, 1>,
                                 full_block<Bits, 7, 1>, full_block<Bits, 8, 1>};
template <int Bits>
constexpr Block kWideFullBlocks[] = {full_block<Bits, 1, 4>, full_block<Bits, 2, 4>};

template <int Bits>
void by_full(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const TileStart& next, float* out) {
  // One or two chains would leave the multipliers waiting for each other's results: take four tiles side by side.
  if (num_rows <= 2 && num_tiles % 4 == 0) {
    for_each_block<Bits>(kWideFullBlocks<Bits>, 4, w, first_tile, tile_step, num_tiles, rows, row_ids, num_rows, next,
                         out);
  } else {
    for_each_block<Bits>(kFullBlocks<Bits>, 1, w, first_tile, tile_step, num_tiles, rows, row_ids, num_rows, next, out);
  }
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
