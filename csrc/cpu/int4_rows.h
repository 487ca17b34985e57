// Row-wise helpers of the int4 kernels in plain C++, compiled once per instruction level: the including file sets its
// target first and defines `halves_to_floats` and `floats_to_halves`. Everything is in an unnamed namespace, so that no
// level's code can be linked into another. Each operation is rounded as written: all levels give the same bits.
#include "cpu/int4_kernels.h"

namespace ferrum::cpu {
namespace {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer; the integer is the low part of the sum's bits.
constexpr float kRoundToInteger = 12582912.0f;
constexpr uint32_t kRoundToIntegerBits = 0x4b400000u;

void to_float(const void* in, FloatType type, int64_t count, float* out) {
  if (type == FloatType::f32) {
    __builtin_memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
  } else if (type == FloatType::f16) {
    halves_to_floats(static_cast<const uint16_t*>(in), count, out);
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(in);
    for (int64_t i = 0; i < count; ++i) {
      out[i] = bits_float(static_cast<uint32_t>(bits[i]) << 16);
    }
  }
}

void from_float(const float* in, int64_t count, FloatType type, void* out) {
  if (type == FloatType::f32) {
    __builtin_memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
  } else if (type == FloatType::f16) {
    floats_to_halves(in, count, static_cast<uint16_t*>(out));
  } else {
    uint16_t* bits = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t value = float_bits(in[i]);
      const uint32_t rounded = (value + 0x7fffu + ((value >> 16) & 1u)) >> 16;
      const bool nan = (value & 0x7fffffffu) > 0x7f800000u;
      bits[i] = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
    }
  }
}

void quantize_group(const float* in, int64_t count, int8_t* codes, float* scale, int32_t* sum) {
  // Compared as integers, the magnitudes order NaN above infinity above every number.
  int32_t magnitude = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = static_cast<int32_t>(float_bits(in[i]) & 0x7fffffffu);
    magnitude = bits > magnitude ? bits : magnitude;
  }
  const float largest = bits_float(static_cast<uint32_t>(magnitude));
  const bool finite = magnitude < 0x7f800000;
  // Below 2^-100 the inverse scale could overflow, and the group adds nothing that fp32 would keep.
  const bool zero = largest < 7.8886090522101181e-31f;
  *scale = zero ? 0.0f : largest / 127.0f;
  const float inverse = finite && !zero ? 127.0f / largest : 0.0f;
  int32_t total = 0;
  if (inverse == 0.0f) {
    __builtin_memset(codes, 0, static_cast<size_t>(count));
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t code = static_cast<int32_t>(float_bits(in[i] * inverse + kRoundToInteger) - kRoundToIntegerBits);
      codes[i] = static_cast<int8_t>(code);
      total += code;
    }
  }
  *sum = total;
}

void quantize_row(const float* in, int64_t packed_rows, int64_t group_size, int8_t* codes, float* scales,
                  int32_t* sums) {
  for (int64_t start = 0, g = 0; start < packed_rows; start += group_size, ++g) {
    const int64_t count = packed_rows - start < group_size ? packed_rows - start : group_size;
    quantize_group(in + start, count, codes + start, scales + g, sums + g);
  }
}

// exp(x) for x in [-87, 88], relative error below 3e-7: 2^n times the Taylor series of e^r, |r| <= ln(2)/2.
inline float exp_clamped(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + kRoundToInteger;
  const float n = shifted - kRoundToInteger;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln(2) in two parts: the first product is exact
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits_float((float_bits(shifted) - kRoundToIntegerBits + 127u) << 23);
}

void silu_mul_tiles(const float* panel_row, int64_t pairs, float* out) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const float* gate = panel_row + 32 * pair;
    const float* up = gate + 16;
    for (int c = 0; c < 16; ++c) {
      out[16 * pair + c] = gate[c] / (1.0f + exp_clamped(-gate[c])) * up[c];
    }
  }
}

void add_scaled(const float* in, float weight, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = out[i] + weight * in[i];
  }
}

}  // namespace
}  // namespace ferrum::cpu
