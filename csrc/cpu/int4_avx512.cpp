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

using int4::kLineBytes;
using int4::kLineRows;
using int4::kMaxGroupSize;
using int4::kSymmetricZero;
using int4::kTileColumns;

// Far enough ahead to cover the latency of memory at the rate one core reads.
constexpr int64_t kPrefetchBytes = 4096;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

inline __m512i broadcast_codes(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm512_set1_epi32(four);
}

inline __m512 load_scales(const Int4Weights& w, int64_t at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.scales + at)));
}

inline __m512i load_zeros(const Int4Weights& w, int64_t at) {
  return w.zeros ? _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + at)))
                 : _mm512_set1_epi32(kSymmetricZero);
}

// acc + float(dot) * (weight_scale * activation_scale)
inline __m512 add_group(__m512 acc, __m512i dot, __m512 weight_scales, float activation_scale) {
  const __m512 scale = _mm512_mul_ps(weight_scales, _mm512_set1_ps(activation_scale));
  return _mm512_add_ps(acc, _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale));
}

// Few rows: every packed line is read once, straight into R dot products. Bound by memory for R <= 4.
template <int R>
FERRUM_KEEP_ACCUMULATORS void int8_direct(const Int4Weights& w, int64_t tile, const ActivationRows& rows,
                                          const int32_t* row_ids, float* out) {
  const __m512i low_nibbles = _mm512_set1_epi8(15);
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
  const uint8_t* line = w.codes + tile * w.lines * kLineBytes;
  int64_t first_line = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t at = (tile * w.groups + g) * kTileColumns;
    const __m512i zeros = load_zeros(w, at);
    __m512i low[R], high[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      low[r] = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-rows.sums[first_group[r] + g]));
      high[r] = _mm512_setzero_si512();
    }
    const int64_t last_line = min64(first_line + w.group_lines, w.lines);
    for (int64_t i = first_line; i < last_line; ++i, line += kLineBytes) {
      const __m512i packed = _mm512_loadu_si512(line);
      _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
      const __m512i even = _mm512_and_si512(packed, low_nibbles);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_nibbles);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        low[r] = _mm512_dpbusd_epi32(low[r], even, broadcast_codes(codes[r] + i * kLineRows));
        high[r] = _mm512_dpbusd_epi32(high[r], odd, broadcast_codes(codes[r] + i * kLineRows + 4));
      }
    }
    first_line = last_line;
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

// One group of T tiles, unpacked to one byte per weight: step s holds rows 4s..4s+3 of the T tiles side by side.
template <int T>
struct Int8Panel {
  alignas(64) uint8_t codes[kMaxGroupSize / 4][T][kLineBytes];
  __m512 scales[T];
  __m512i zeros[T];
  int64_t steps;

  void unpack(const Int4Weights& w, int64_t first_tile, int64_t tile_step, int64_t g) {
    const __m512i low_nibbles = _mm512_set1_epi8(15);
    const int64_t first_line = g * w.group_lines;
    const int64_t lines = min64(w.group_lines, w.lines - first_line);
    steps = 2 * lines;
    // What will be unpacked two groups from now: in these tiles, or at the beginning of the next panel's.
    const int64_t ahead = g + 2 < w.groups ? 2 * w.group_lines : (T * tile_step - 1) * w.lines + 2 * w.group_lines;
    for (int t = 0; t < T; ++t) {
      const int64_t tile = first_tile + t * tile_step;
      const uint8_t* line = w.codes + (tile * w.lines + first_line) * kLineBytes;
      for (int64_t i = 0; i < lines; ++i, line += kLineBytes) {
        _mm_prefetch(reinterpret_cast<const char*>(line + ahead * kLineBytes), _MM_HINT_T0);
        const __m512i packed = _mm512_loadu_si512(line);
        _mm512_store_si512(codes[2 * i][t], _mm512_and_si512(packed, low_nibbles));
        _mm512_store_si512(codes[2 * i + 1][t], _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_nibbles));
      }
      const int64_t at = (tile * w.groups + g) * kTileColumns;
      scales[t] = load_scales(w, at);
      zeros[t] = load_zeros(w, at);
    }
  }
};

// Adds one group of R rows times T tiles to out: R * T accumulators stay in registers. That needs the loops unrolled
// early and, with GCC 12, the attribute: else half of the accumulators spill and the block takes twice the time.
template <int R, int T>
FERRUM_KEEP_ACCUMULATORS void int8_block(const Int8Panel<T>& panel, int64_t g, int64_t group_size,
                                         const ActivationRows& rows, const int32_t* row_ids, int64_t first_row,
                                         int64_t tile_step, float* out) {
  const int8_t* codes[R];
  int64_t group[R];
  __m512i dot[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int64_t row = row_ids[first_row + r];
    codes[r] = rows.codes + row * rows.packed_rows + g * group_size;
    group[r] = row * rows.groups + g;
    const __m512i sum = _mm512_set1_epi32(-rows.sums[group[r]]);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      dot[r][t] = _mm512_mullo_epi32(panel.zeros[t], sum);
    }
  }
  int64_t s = 0;
  do {
    __m512i weights[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      weights[t] = _mm512_load_si512(panel.codes[s][t]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i activations = broadcast_codes(codes[r] + 4 * s);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        dot[r][t] = _mm512_dpbusd_epi32(dot[r][t], weights[t], activations);
      }
    }
  } while (++s < panel.steps);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      float* o = out + (first_row + r) * kPanelColumns + t * tile_step * kTileColumns;
      const __m512 acc = g == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(o);
      _mm512_storeu_ps(o, add_group(acc, dot[r][t], panel.scales[t], rows.scales[group[r]]));
    }
  }
}

template <int T>
void int8_panel(const Int4Weights& w, int64_t first_tile, int64_t tile_step, const ActivationRows& rows,
                const int32_t* row_ids, int64_t num_rows, float* out) {
  Int8Panel<T> panel;
  const int64_t group_size = w.group_lines * kLineRows;
  for (int64_t g = 0; g < w.groups; ++g) {
    panel.unpack(w, first_tile, tile_step, g);
    int64_t r = 0;
    for (; r + 6 <= num_rows; r += 6) {
      int8_block<6, T>(panel, g, group_size, rows, row_ids, r, tile_step, out);
    }
    switch (num_rows - r) {
      case 5:
        int8_block<5, T>(panel, g, group_size, rows, row_ids, r, tile_step, out);
        break;
      case 4:
        int8_block<4, T>(panel, g, group_size, rows, row_ids, r, tile_step, out);
        break;
      case 3:
        int8_block<3, T>(panel, g, group_size, rows, row_ids, r, tile_step, out);
        break;
      case 2:
        int8_block<2, T>(panel, g, group_size, rows, row_ids, r, tile_step, out);
        break;
      case 1:
        int8_block<1, T>(panel, g, group_size, rows, row_ids, r, tile_step, out);
        break;
      default:
        break;
    }
  }
}

void int8_few_rows(const Int4Weights& w, int64_t tile, const ActivationRows& rows, const int32_t* row_ids,
                   int64_t num_rows, float* out) {
  switch (num_rows) {
    case 8:
      int8_direct<8>(w, tile, rows, row_ids, out);
      break;
    case 7:
      int8_direct<7>(w, tile, rows, row_ids, out);
      break;
    case 6:
      int8_direct<6>(w, tile, rows, row_ids, out);
      break;
    case 5:
      int8_direct<5>(w, tile, rows, row_ids, out);
      break;
    case 4:
      int8_direct<4>(w, tile, rows, row_ids, out);
      break;
    case 3:
      int8_direct<3>(w, tile, rows, row_ids, out);
      break;
    case 2:
      int8_direct<2>(w, tile, rows, row_ids, out);
      break;
    case 1:
      int8_direct<1>(w, tile, rows, row_ids, out);
      break;
    default:
      break;
  }
}

void int8_tiles(const Int4Weights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
                const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, float* out) {
  // Twice eight rows still cost less straight from the packed tile, then in the first-level cache, than unpacking it.
  if (num_rows <= 16) {
    const int64_t first_rows = num_rows <= 8 ? num_rows : (num_rows + 1) / 2;
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t tile = first_tile + t * tile_step;
      float* o = out + t * tile_step * kTileColumns;
      int8_few_rows(w, tile, rows, row_ids, first_rows, o);
      if (first_rows < num_rows) {
        int8_few_rows(w, tile, rows, row_ids + first_rows, num_rows - first_rows, o + first_rows * kPanelColumns);
      }
    }
    return;
  }
  int64_t t = 0;
  for (; t + 4 <= num_tiles; t += 4) {
    int8_panel<4>(w, first_tile + t * tile_step, tile_step, rows, row_ids, num_rows,
                  out + t * tile_step * kTileColumns);
  }
  for (; t + 2 <= num_tiles; t += 2) {
    int8_panel<2>(w, first_tile + t * tile_step, tile_step, rows, row_ids, num_rows,
                  out + t * tile_step * kTileColumns);
  }
  if (t < num_tiles) {
    int8_panel<1>(w, first_tile + t * tile_step, tile_step, rows, row_ids, num_rows,
                  out + t * tile_step * kTileColumns);
  }
}

// One group of two tiles as fp32 (code - zero): 16 KiB, half of the first-level cache.
struct FullPanel {
  alignas(64) float weights[kMaxGroupSize][2][kTileColumns];
  __m512 scales[2];
  int64_t steps;

  void unpack(const Int4Weights& w, int64_t tile, int64_t slot, int64_t g) {
    const int64_t first_line = g * w.group_lines;
    const int64_t lines = min64(w.group_lines, w.lines - first_line);
    steps = lines * kLineRows;
    const int64_t at = (tile * w.groups + g) * kTileColumns;
    const __m512i zeros = load_zeros(w, at);
    const __m512i low_nibble = _mm512_set1_epi32(15);
    scales[slot] = load_scales(w, at);
    const uint8_t* line = w.codes + (tile * w.lines + first_line) * kLineBytes;
    for (int64_t i = 0; i < lines; ++i, line += kLineBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
      const __m512i packed = _mm512_loadu_si512(line);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        const __m512i nibble = _mm512_and_si512(_mm512_srli_epi32(packed, k < 4 ? 8 * k : 8 * k - 28), low_nibble);
        _mm512_store_ps(weights[8 * i + k][slot], _mm512_cvtepi32_ps(_mm512_sub_epi32(nibble, zeros)));
      }
    }
  }
};

template <int R>
void full_block(const FullPanel& panel, int64_t g, int64_t group_size, const ActivationRows& rows,
                const int32_t* row_ids, int64_t first_row, int64_t tile_step, int64_t num_tiles, float* out) {
  const float* values[R];
  __m512 dot[R][2];
  for (int r = 0; r < R; ++r) {
    const int64_t row = row_ids[first_row + r];
    values[r] = rows.values + row * rows.packed_rows + g * group_size;
    dot[r][0] = dot[r][1] = _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < panel.steps; ++s) {
    const __m512 first = _mm512_load_ps(panel.weights[s][0]);
    const __m512 second = _mm512_load_ps(panel.weights[s][1]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 value = _mm512_set1_ps(values[r][s]);
      dot[r][0] = _mm512_fmadd_ps(value, first, dot[r][0]);
      dot[r][1] = _mm512_fmadd_ps(value, second, dot[r][1]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t t = 0; t < num_tiles; ++t) {
      float* o = out + (first_row + r) * kPanelColumns + t * tile_step * kTileColumns;
      const __m512 acc = g == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(o);
      _mm512_storeu_ps(o, _mm512_add_ps(acc, _mm512_mul_ps(dot[r][t], panel.scales[t])));
    }
  }
}

void full_tiles(const Int4Weights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
                const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, float* out) {
  FullPanel panel;
  const int64_t group_size = w.group_lines * kLineRows;
  for (int64_t t = 0; t < num_tiles; t += 2) {
    const int64_t pair = min64(2, num_tiles - t);
    float* o = out + t * tile_step * kTileColumns;
    for (int64_t g = 0; g < w.groups; ++g) {
      for (int64_t slot = 0; slot < 2; ++slot) {  // a single last tile is taken twice and written once
        panel.unpack(w, first_tile + (t + min64(slot, pair - 1)) * tile_step, slot, g);
      }
      int64_t r = 0;
      for (; r + 8 <= num_rows; r += 8) {
        full_block<8>(panel, g, group_size, rows, row_ids, r, tile_step, pair, o);
      }
      for (; r + 4 <= num_rows; r += 4) {
        full_block<4>(panel, g, group_size, rows, row_ids, r, tile_step, pair, o);
      }
      for (; r + 2 <= num_rows; r += 2) {
        full_block<2>(panel, g, group_size, rows, row_ids, r, tile_step, pair, o);
      }
      if (r < num_rows) {
        full_block<1>(panel, g, group_size, rows, row_ids, r, tile_step, pair, o);
      }
    }
  }
}

}  // namespace

const Int4Kernels& int4_kernels_avx512() {
  static const Int4Kernels kernels{int8_tiles,   full_tiles,     to_float,  from_float,
                                   quantize_row, silu_mul_tiles, add_scaled};
  return kernels;
}

}  // namespace ferrum::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
