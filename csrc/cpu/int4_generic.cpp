// int4 kernels in portable C++.
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "common/int4.h"

namespace ferrum::cpu {
namespace {

// IEEE binary16 to binary32.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t mantissa = half & 0x3ffu;
  uint32_t bits;
  if (exponent == 0) {  // zero or subnormal: the mantissa counts units of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &magnitude, 4);
  } else if (exponent == 31) {
    bits = 0x7f800000u | mantissa << 13;
  } else {
    bits = (exponent + 112) << 23 | mantissa << 13;
  }
  bits |= sign;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// IEEE binary32 to binary16, to nearest even.
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    return sign | 0x7e00u;
  }
  if (bits >= 0x477ff000u) {  // rounds to 65536 or more
    return sign | 0x7c00u;
  }
  if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves units of 2^-24 in the low bits, rounded to nearest even
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10));
}

void halves_to_floats(const uint16_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = half_to_float(in[i]);
  }
}

void floats_to_halves(const float* in, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = float_to_half(in[i]);
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

// One group of one tile: code minus zero point, row-major, and the scales.
template <int Bits, typename T>
struct UnpackedGroup {
  static constexpr int64_t kLineBytes = kLineRows * kTileColumns * Bits / 8;
  int64_t rows;
  T weights[kMaxGroupSize][kTileColumns];
  float scales[kTileColumns];

  void unpack(const PackedWeights& w, int64_t tile, int64_t group) {
    const int64_t first_line = group * w.group_lines;
    const int64_t lines = w.lines - first_line < w.group_lines ? w.lines - first_line : w.group_lines;
    rows = lines * kLineRows;
    const uint8_t* line = w.codes + (tile * w.lines + first_line) * kLineBytes;
    const int64_t at = (tile * w.groups + group) * kTileColumns;
    for (int64_t i = 0; i < lines; ++i, line += kLineBytes) {
      for (int64_t c = 0; c < kTileColumns; ++c) {
        const int zero = w.zeros ? w.zeros[at + c] : 1 << (Bits - 1);
        for (int64_t b = 0; b < 4; ++b) {
          const int byte = line[4 * c + b];
          weights[8 * i + b][c] = static_cast<T>((Bits == 4 ? byte & 15 : byte) - zero);
          weights[8 * i + 4 + b][c] = static_cast<T>((Bits == 4 ? byte >> 4 : line[64 + 4 * c + b]) - zero);
        }
      }
    }
    halves_to_floats(w.scales + at, kTileColumns, scales);
  }
};

template <int Bits>
void int8_group(const UnpackedGroup<Bits, int16_t>& group, const int8_t* codes, float activation_scale, float* out) {
  int32_t dot[kTileColumns] = {};
  for (int64_t k = 0; k < group.rows; ++k) {
    const int16_t code = codes[k];
    for (int64_t c = 0; c < kTileColumns; ++c) {
      dot[c] += code * group.weights[k][c];
    }
  }
  for (int64_t c = 0; c < kTileColumns; ++c) {
    out[c] = out[c] + static_cast<float>(dot[c]) * (group.scales[c] * activation_scale);
  }
}

// Multiplies and adds apart where the processor has no fused operation: a call per element would be far slower.
template <int Bits>
void full_group(const UnpackedGroup<Bits, float>& group, const float* values, float* out) {
  float dot[kTileColumns] = {};
  for (int64_t k = 0; k < group.rows; ++k) {
    for (int64_t c = 0; c < kTileColumns; ++c) {
#if defined(FP_FAST_FMAF)
      dot[c] = __builtin_fmaf(values[k], group.weights[k][c], dot[c]);
#else
      dot[c] = dot[c] + values[k] * group.weights[k][c];
#endif
    }
  }
  for (int64_t c = 0; c < kTileColumns; ++c) {
    out[c] = out[c] + dot[c] * group.scales[c];
  }
}

// Runs `multiply(unpacked group, group, activation row, out)` over tiles, groups and rows.
template <int Bits, typename T, typename Multiply>
void for_each_group(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
                    const int32_t* row_ids, int64_t num_rows, float* out, const Multiply& multiply) {
  UnpackedGroup<Bits, T> unpacked;
  for (int64_t t = 0; t < num_tiles; ++t) {
    float* column = out + t * tile_step * kTileColumns;
    for (int64_t r = 0; r < num_rows; ++r) {
      __builtin_memset(column + r * kPanelColumns, 0, kTileColumns * sizeof(float));
    }
    for (int64_t g = 0; g < w.groups; ++g) {
      unpacked.unpack(w, first_tile + t * tile_step, g);
      for (int64_t r = 0; r < num_rows; ++r) {
        multiply(unpacked, g, row_ids[r], column + r * kPanelColumns);
      }
    }
  }
}

template <int Bits>
void by_int8(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const uint8_t*, float* out) {
  for_each_group<Bits, int16_t>(
      w, first_tile, tile_step, num_tiles, row_ids, num_rows, out,
      [&](const UnpackedGroup<Bits, int16_t>& unpacked, int64_t group, int64_t row, float* o) {
        const int8_t* codes = rows.codes + row * rows.packed_rows + group * w.group_lines * kLineRows;
        int8_group(unpacked, codes, rows.scales[row * rows.groups + group], o);
      });
}

template <int Bits>
void by_full(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const uint8_t*, float* out) {
  for_each_group<Bits, float>(w, first_tile, tile_step, num_tiles, row_ids, num_rows, out,
                              [&](const UnpackedGroup<Bits, float>& unpacked, int64_t group, int64_t row, float* o) {
                                const float* values =
                                    rows.values + row * rows.packed_rows + group * w.group_lines * kLineRows;
                                full_group(unpacked, values, o);
                              });
}

}  // namespace

const Int4Kernels& int4_kernels_generic() {
  static const Int4Kernels kernels{by_int8<4>, by_full<4>,   by_int8<8>,     by_full<8>, to_float,
                                   from_float, quantize_row, silu_mul_tiles, add_scaled};
  return kernels;
}

}  // namespace ferrum::cpu
