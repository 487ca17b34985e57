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
using int4::kMaxGroupSize;
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
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const uint8_t*, float* out) {
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

// One group of one tile as fp32 (code - zero): 8 KiB.
struct FullPanel {
  alignas(32) float weights[kMaxGroupSize][kTileColumns];

  template <int Bits>
  void unpack(const Group<Bits>& group) {
    const __m256i mask = _mm256_set1_epi32((1 << Bits) - 1);
    for (int64_t i = 0; i < group.lines; ++i) {
      const uint8_t* line = group.line + i * kLineBytes<Bits>;
      _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
      for (int h = 0; h < 2; ++h) {
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32 * h));
        __m256i second;
        if constexpr (Bits == 4) {
          second = _mm256_srli_epi32(first, 4);
        } else {
          second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 64 + 32 * h));
        }
#pragma GCC unroll 8
        for (int k = 0; k < kLineRows; ++k) {
          const __m256i code = _mm256_and_si256(_mm256_srli_epi32(k < 4 ? first : second, 8 * (k % 4)), mask);
          _mm256_store_ps(weights[8 * i + k] + 8 * h, _mm256_cvtepi32_ps(_mm256_sub_epi32(code, group.zeros[h])));
        }
      }
    }
  }
};

template <int Bits, int R>
void full_block(const FullPanel& panel, const Group<Bits>& group, int64_t g, const ActivationRows& rows,
                const int32_t* row_ids, int64_t first_row, float* out) {
  const float* values[R];
  __m256 dot[R][2];
  for (int r = 0; r < R; ++r) {
    const int64_t row = row_ids[first_row + r];
    values[r] = rows.values + row * rows.packed_rows + group.first_row;
    dot[r][0] = dot[r][1] = _mm256_setzero_ps();
  }
  for (int64_t s = 0; s < group.lines * kLineRows; ++s) {
    const __m256 first = _mm256_load_ps(panel.weights[s]);
    const __m256 second = _mm256_load_ps(panel.weights[s] + 8);
    for (int r = 0; r < R; ++r) {
      const __m256 value = _mm256_set1_ps(values[r][s]);
      dot[r][0] = _mm256_fmadd_ps(value, first, dot[r][0]);
      dot[r][1] = _mm256_fmadd_ps(value, second, dot[r][1]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < 2; ++h) {
      float* o = out + (first_row + r) * kPanelColumns + 8 * h;
      const __m256 acc = g == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(o);
      _mm256_storeu_ps(o, _mm256_add_ps(acc, _mm256_mul_ps(dot[r][h], group.scales[h])));
    }
  }
}

template <int Bits>
void by_full(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const uint8_t*, float* out) {
  FullPanel panel;
  for (int64_t t = 0; t < num_tiles; ++t) {
    float* o = out + t * tile_step * kTileColumns;
    for (int64_t g = 0; g < w.groups; ++g) {
      const Group<Bits> group(w, first_tile + t * tile_step, g);
      panel.unpack(group);
      int64_t r = 0;
      for (; r + 4 <= num_rows; r += 4) {
        full_block<Bits, 4>(panel, group, g, rows, row_ids, r, o);
      }
      for (; r < num_rows; ++r) {
        full_block<Bits, 1>(panel, group, g, rows, row_ids, r, o);
      }
    }
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
