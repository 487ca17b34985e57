// int4 kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "common/int4.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,fma")
#endif

namespace ferrum::cpu {
namespace {

void halves_to_floats(const uint16_t* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  for (; i < count; ++i) {
    out[i] = _cvtsh_ss(in[i]);
  }
}

void floats_to_halves(const float* in, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < count; ++i) {
    out[i] = _cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT);
  }
}

}  // namespace
}  // namespace ferrum::cpu

#include "cpu/int4_rows.h"

namespace ferrum::cpu {
namespace {

using int4::kLineRows;
using int4::kTileColumns;

constexpr int64_t kPrefetchBytes = 4096;
// Bytes of a line of 8 rows. int4: rows b and 4 + b of a column share a byte; int8: rows 4 to 7 follow rows 0 to 3.
template <int Bits>
constexpr int64_t kLineBytes = kLineRows * kTileColumns * Bits / 8;
// Lines whose products fit an int16 sum. int4: 4 lines * 2 nibbles * (two products of at most 15 * 127) = 30480. int8:
// two products of at most 128 * 127 = 32512 already fill it.
constexpr int64_t kLinesPerSum = 4;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

inline __m256i broadcast_codes(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm256_set1_epi32(four);
}

// Half `h` (columns 8h..8h+7) of a tile's scales or zero points of one group.
inline __m256 load_scales(const PackedWeights& w, int64_t at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.scales + at)));
}

template <int Bits>
inline __m256i load_zeros(const PackedWeights& w, int64_t at) {
  return w.zeros ? _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.zeros + at)))
                 : _mm256_set1_epi32(1 << (Bits - 1));
}

// One group of one tile and where it lies.
template <int Bits>
struct Group {
  const uint8_t* line;
  int64_t lines;
  int64_t first_row;
  __m256 scales[2];
  __m256i zeros[2];

  Group(const PackedWeights& w, int64_t tile, int64_t g) {
    const int64_t first_line = g * w.group_lines;
    const int64_t at = (tile * w.groups + g) * kTileColumns;
    line = w.codes + (tile * w.lines + first_line) * kLineBytes<Bits>;
    lines = min64(w.group_lines, w.lines - first_line);
    first_row = first_line * kLineRows;
    for (int h = 0; h < 2; ++h) {
      scales[h] = load_scales(w, at + 8 * h);
      zeros[h] = load_zeros<Bits>(w, at + 8 * h);
    }
  }
};

// Lines [first, end) of a group of int4 weights times R rows, added to dot.
template <int R>
inline void add_lines_int4(const Group<4>& group, int64_t first, int64_t end, const int8_t* const* codes,
                           __m256i (*dot)[2]) {
  const __m256i low_nibbles = _mm256_set1_epi8(15);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sums[R][2];
  for (int r = 0; r < R; ++r) {
    sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  }
  for (int64_t i = first; i < end; ++i) {
    const uint8_t* line = group.line + i * kLineBytes<4>;
    _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
    for (int h = 0; h < 2; ++h) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32 * h));
      const __m256i even = _mm256_and_si256(packed, low_nibbles);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_nibbles);
      for (int r = 0; r < R; ++r) {
        const int8_t* code = codes[r] + i * kLineRows;
        sums[r][h] = _mm256_add_epi16(sums[r][h], _mm256_maddubs_epi16(even, broadcast_codes(code)));
        sums[r][h] = _mm256_add_epi16(sums[r][h], _mm256_maddubs_epi16(odd, broadcast_codes(code + 4)));
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < 2; ++h) {
      dot[r][h] = _mm256_add_epi32(dot[r][h], _mm256_madd_epi16(sums[r][h], ones));
    }
  }
}

// One line of int8 weights less 128 times R rows, added to dot. The product of unsigned and signed bytes is made of the
// magnitudes and the activations under the weights' signs.
template <int R>
inline void add_line_int8(const Group<8>& group, int64_t i, const int8_t* const* codes, __m256i (*dot)[2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  const uint8_t* line = group.line + i * kLineBytes<8>;
  _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes + 64), _MM_HINT_T0);
  for (int quad = 0; quad < 2; ++quad) {
    for (int h = 0; h < 2; ++h) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 64 * quad + 32 * h));
      const __m256i weights = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
      const __m256i magnitudes = _mm256_abs_epi8(weights);
      for (int r = 0; r < R; ++r) {
        const __m256i activations = _mm256_sign_epi8(broadcast_codes(codes[r] + i * kLineRows + 4 * quad), weights);
        dot[r][h] = _mm256_add_epi32(dot[r][h], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, activations), ones));
      }
    }
  }
}

// out += one group of R rows times one tile.
template <int Bits, int R>
void int8_group(const Group<Bits>& group, int64_t g, const ActivationRows& rows, const int32_t* row_ids,
                int64_t first_row, float* out) {
  const int8_t* codes[R];
  int64_t at[R];
  __m256i dot[R][2];
  for (int r = 0; r < R; ++r) {
    const int64_t row = row_ids[first_row + r];
    codes[r] = rows.codes + row * rows.packed_rows + group.first_row;
    at[r] = row * rows.groups + g;
    dot[r][0] = dot[r][1] = _mm256_setzero_si256();
    if constexpr (Bits == 4) {
      const __m256i sum = _mm256_set1_epi32(-rows.sums[at[r]]);
      dot[r][0] = _mm256_mullo_epi32(group.zeros[0], sum);
      dot[r][1] = _mm256_mullo_epi32(group.zeros[1], sum);
    }
  }
  if constexpr (Bits == 4) {
    for (int64_t first = 0; first < group.lines; first += kLinesPerSum) {
      add_lines_int4<R>(group, first, min64(first + kLinesPerSum, group.lines), codes, dot);
    }
  } else {
    for (int64_t i = 0; i < group.lines; ++i) {
      add_line_int8<R>(group, i, codes, dot);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < 2; ++h) {
      float* o = out + (first_row + r) * kPanelColumns + 8 * h;
      const __m256 scale = _mm256_mul_ps(group.scales[h], _mm256_set1_ps(rows.scales[at[r]]));
      const __m256 acc = g == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(o);
      _mm256_storeu_ps(o, _mm256_add_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(dot[r][h]), scale)));
    }
  }
}

template <int Bits>
void by_int8(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const TileStart&, float* out) {
  for (int64_t t = 0; t < num_tiles; ++t) {
    float* o = out + t * tile_step * kTileColumns;
    for (int64_t g = 0; g < w.groups; ++g) {
      const Group<Bits> group(w, first_tile + t * tile_step, g);
      int64_t r = 0;
      for (; r + 2 <= num_rows; r += 2) {
        int8_group<Bits, 2>(group, g, rows, row_ids, r, o);
      }
      if (r < num_rows) {
        int8_group<Bits, 1>(group, g, rows, row_ids, r, o);
      }
    }
  }
}

// The bits of 2^23 and 2^15: with a code at bit 0 or 8 or-ed into the mantissa the number is larger by just that code.
constexpr int32_t magic(int parity) { return (127 + 23 - 8 * parity) << 23; }

// Half h of a line for conversion to fp32: rows 2j and 2j + 1 have their codes at bits 0 and 8 of the lanes.
template <int Bits>
inline __m256i row_pair(const uint8_t* line, int h, int j) {
  const uint8_t* bytes = line + 32 * h + (Bits == 8 && j >= 2 ? 64 : 0);
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  return _mm256_srli_epi32(words, 16 * (j % 2) + (Bits == 4 && j >= 2 ? 4 : 0));
}

// R rows kept in fp32 times T tiles, unpacked in registers. A chain of fused additions per row and column.
template <int Bits, int R, int T>
void full_block(const PackedWeights& w, int64_t first_tile, int64_t tile_step, const ActivationRows& rows,
                const int32_t* row_ids, float* out) {
  const __m256i mask = _mm256_set1_epi32((1 << Bits) - 1);
  const float* values[R];
  for (int r = 0; r < R; ++r) {
    values[r] = rows.values + row_ids[r] * rows.packed_rows;
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    __m256 dot[R][T][2], biases[T][2][2];
    const uint8_t* line[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const Group<Bits> group(w, first_tile + t * tile_step, g);
      line[t] = group.line;
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 2
        for (int parity = 0; parity < 2; ++parity) {
          const __m256 number = _mm256_castsi256_ps(_mm256_set1_epi32(magic(parity)));
          biases[t][h][parity] = _mm256_add_ps(number, _mm256_cvtepi32_ps(group.zeros[h]));
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          dot[r][t][h] = _mm256_setzero_ps();
        }
      }
    }
    const int64_t first_line = g * w.group_lines;
    const int64_t last_line = min64(first_line + w.group_lines, w.lines);
    for (int64_t i = first_line; i < last_line; ++i) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        for (int64_t b = 0; b < kLineBytes<Bits>; b += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(line[t] + kPrefetchBytes + b), _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int k = 0; k < kLineRows; ++k) {
          __m256 weights[2];
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const __m256i words = row_pair<Bits>(line[t], h, k / 2);
            const __m256i code = _mm256_and_si256(words, k % 2 ? _mm256_slli_epi32(mask, 8) : mask);
            const __m256i bits = _mm256_or_si256(code, _mm256_set1_epi32(magic(k % 2)));
            weights[h] = _mm256_sub_ps(_mm256_castsi256_ps(bits), biases[t][h][k % 2]);  // code - zero point, exact
          }
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const __m256 value = _mm256_broadcast_ss(values[r] + i * kLineRows + k);
            dot[r][t][0] = _mm256_fmadd_ps(value, weights[0], dot[r][t][0]);
            dot[r][t][1] = _mm256_fmadd_ps(value, weights[1], dot[r][t][1]);
          }
        }
        line[t] += kLineBytes<Bits>;
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const int64_t at = ((first_tile + t * tile_step) * w.groups + g) * kTileColumns;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          float* o = out + r * kPanelColumns + t * tile_step * kTileColumns + 8 * h;
          const __m256 acc = g == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(o);
          _mm256_storeu_ps(o, _mm256_add_ps(acc, _mm256_mul_ps(dot[r][t][h], load_scales(w, at + 8 * h))));
        }
      }
    }
  }
}

template <int Bits>
void by_full(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const TileStart&, float* out) {
  using Block = void (*)(const PackedWeights&, int64_t, int64_t, const ActivationRows&, const int32_t*, float*);
  static constexpr Block kBlocks[] = {full_block<Bits, 1, 1>, full_block<Bits, 2, 1>, full_block<Bits, 3, 1>,
                                      full_block<Bits, 4, 1>};
  // One or two rows of one tile would leave the multipliers waiting for each other's results.
  static constexpr Block kWideBlocks[] = {full_block<Bits, 1, 4>, full_block<Bits, 2, 2>};
  const int64_t width = num_rows == 1 ? 4 : num_rows == 2 ? 2 : 1;
  const int64_t blocks = int4::ceil_div(num_rows, 4);
  for (int64_t t = 0; t < num_tiles;) {
    const bool wide = width > 1 && t + width <= num_tiles;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = num_rows * b / blocks;
      const Block multiply = (wide ? kWideBlocks : kBlocks)[num_rows * (b + 1) / blocks - row - 1];
      multiply(w, first_tile + t * tile_step, tile_step, rows, row_ids + row,
               out + row * kPanelColumns + t * tile_step * kTileColumns);
    }
    t += wide ? width : 1;
  }
}

}  // namespace

const Int4Kernels& int4_kernels_avx2() {
  static const Int4Kernels kernels{by_int8<4>, by_full<4>,   by_int8<8>,     by_full<8>, to_float,
                                   from_float, quantize_row, silu_mul_tiles, add_scaled};
  return kernels;
}

}  // namespace ferrum::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
