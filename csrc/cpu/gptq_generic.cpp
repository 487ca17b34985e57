// The gptq row kernel in portable C++.
#include <cstdint>

namespace ferrum::cpu {
namespace {

// IEEE binary32 to binary16, to nearest even.
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    return sign | 0x7e00u;
  }
  if (bits >= 0x477ff000u) {  // half of the largest step above 65504: infinity
    return sign | 0x7c00u;
  }
  if (bits >= 0x38800000u) {  // normal: drop 13 bits of the mantissa, move the exponent's bias from 127 to 15
    return sign | static_cast<uint16_t>((bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13);
  }
  // Subnormal: a value below 2^-14 counts units of 2^-24, which is what 0.5 has as its last mantissa bit.
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, 4);
  magnitude += 0.5f;
  __builtin_memcpy(&bits, &magnitude, 4);
  return sign | static_cast<uint16_t>(bits & 0xffffu);
}

void floats_to_halves(const float* in, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = float_to_half(in[i]);
  }
}

}  // namespace
}  // namespace ferrum::cpu

#include "cpu/gptq_row.h"

void ferrum::cpu::gptq_row_generic(const GptqRow& row, GptqOutput type, void* out) { dequantize_row(row, type, out); }
