// The row kernel in plain loops, which every compiler turns into vectors, compiled once per instruction level: the
// including file sets its target first and defines `floats_to_halves(const float*, int64_t, uint16_t*)`. In an unnamed
// namespace, so that no level's code can be linked into another.
#include "cpu/gptq_kernels.h"

namespace ferrum::cpu {
namespace {

// Columns that are computed in fp32 before they are rounded: stays in the first-level cache.
constexpr int64_t kChunk = 512;

void dequantize_chunk(const GptqRow& row, int64_t first, int64_t count, float* out) {
  const int32_t* low = row.low + first;
  const int32_t* zeros = row.zeros + first;
  const float* scales = row.scales + first;
  const int shift = row.shift;
  const uint32_t mask = row.mask;
  if (row.high == nullptr) {
    for (int64_t n = 0; n < count; ++n) {
      const uint32_t code = (static_cast<uint32_t>(low[n]) >> shift) & mask;
      out[n] = static_cast<float>(static_cast<int32_t>(code) - zeros[n]) * scales[n];
    }
    return;
  }
  const int32_t* high = row.high + first;
  const int up = 32 - shift;
  for (int64_t n = 0; n < count; ++n) {
    const uint32_t code = (static_cast<uint32_t>(low[n]) >> shift | static_cast<uint32_t>(high[n]) << up) & mask;
    out[n] = static_cast<float>(static_cast<int32_t>(code) - zeros[n]) * scales[n];
  }
}

void floats_to_bfloat16(const float* in, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, in + i, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out[i] = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
  }
}

void dequantize_row(const GptqRow& row, GptqOutput type, void* out) {
  if (type == GptqOutput::f32) {
    dequantize_chunk(row, 0, row.columns, static_cast<float*>(out));
    return;
  }
  float values[kChunk];
  uint16_t* rounded = static_cast<uint16_t*>(out);
  for (int64_t first = 0; first < row.columns; first += kChunk) {
    const int64_t count = row.columns - first < kChunk ? row.columns - first : kChunk;
    dequantize_chunk(row, first, count, values);
    if (type == GptqOutput::f16) {
      floats_to_halves(values, count, rounded + first);
    } else {
      floats_to_bfloat16(values, count, rounded + first);
    }
  }
}

}  // namespace
}  // namespace ferrum::cpu
