// Blocks to unsigned codes with integer scales, in plain C++ compiled once per instruction level (see simd.h). Layouts
// and formulas are in common/gguf.h.
#pragma once

#include "common/gguf.h"
#include "cpu/simd.h"

namespace ferrum::cpu::FERRUM_LEVEL {

// 256 elements of a row in the common form: one block of 256 (d[0], m[0] its d and dmin), or eight of 32 (d[j], m[j]
// of block j). Where a row ends inside, the blocks behind its end have codes and d of zero.
struct Chunk {
  alignas(64) uint8_t codes[gguf::kChunk];
  alignas(32) int16_t scales[16];  // of each 16 elements; blocks of 256 only
  alignas(32) int16_t mins[16];
  alignas(32) float d[8];
  alignas(32) float m[8];
};

inline float float_of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// float16 to float32, exactly.
inline float half(const uint8_t* bytes) {
  uint16_t bits;
  __builtin_memcpy(&bits, bytes, 2);
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = bits >> 10 & 31u, mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // mantissa * 2^-24, the sign kept on zeros
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return float_of_bits(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13);
}

// 2^(e - 127), halved because the codes are doubled; subnormal for the two smallest exponents.
inline float mxfp4_scale(uint8_t exponent) {
  return float_of_bits(exponent < 2 ? 0x00200000u << exponent : static_cast<uint32_t>(exponent - 1) << 23);
}

// Element i in the low nibble of byte i, 16 + i in the high.
inline void nibbles(const uint8_t* bytes, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = bytes[i] & 15;
    codes[16 + i] = bytes[i] >> 4;
  }
}

inline void add_fifth_bits(const uint8_t* high, uint8_t* codes) {
  uint32_t bits;
  __builtin_memcpy(&bits, high, 4);
  for (int i = 0; i < 32; ++i) {
    codes[i] |= static_cast<uint8_t>((bits >> i & 1u) << 4);
  }
}

inline void look_up(const uint8_t* bytes, const int8_t* values, int zero, uint8_t* codes) {
  nibbles(bytes, codes);
  for (int i = 0; i < 32; ++i) {
    codes[i] = static_cast<uint8_t>(values[codes[i]] + zero);
  }
}

inline void decode_small(const gguf::BlockQ4_0& b, uint8_t* codes, float& d, float&) {
  d = half(b.d);
  nibbles(b.codes, codes);
}
inline void decode_small(const gguf::BlockQ4_1& b, uint8_t* codes, float& d, float& m) {
  d = half(b.d);
  m = -half(b.m);  // the file adds it
  nibbles(b.codes, codes);
}
inline void decode_small(const gguf::BlockQ5_0& b, uint8_t* codes, float& d, float&) {
  d = half(b.d);
  nibbles(b.codes, codes);
  add_fifth_bits(b.high, codes);
}
inline void decode_small(const gguf::BlockQ5_1& b, uint8_t* codes, float& d, float& m) {
  d = half(b.d);
  m = -half(b.m);
  nibbles(b.codes, codes);
  add_fifth_bits(b.high, codes);
}
inline void decode_small(const gguf::BlockQ8_0& b, uint8_t* codes, float& d, float&) {
  d = half(b.d);
  for (int i = 0; i < 32; ++i) {
    codes[i] = static_cast<uint8_t>(b.codes[i] + 128);
  }
}
inline void decode_small(const gguf::BlockIQ4_NL& b, uint8_t* codes, float& d, float&) {
  d = half(b.d);
  look_up(b.codes, gguf::kNonlinear, 128, codes);
}
inline void decode_small(const gguf::BlockMXFP4& b, uint8_t* codes, float& d, float&) {
  d = mxfp4_scale(b.exponent);
  look_up(b.codes, gguf::kE2M1, 12, codes);
}

// Two bits of an element each, byte i of a run of 32 holding elements i, 32 + i, 64 + i, 96 + i.
inline void pairs_of_bits(const uint8_t* bytes, uint8_t* codes) {
  for (int run = 0; run < 2; ++run) {
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 32; ++i) {
        codes[128 * run + 32 * j + i] = bytes[32 * run + i] >> (2 * j) & 3;
      }
    }
  }
}

inline void decode_large(const gguf::BlockQ2_K& b, Chunk& out) {
  out.d[0] = half(b.d);
  out.m[0] = half(b.dmin);
  for (int j = 0; j < 16; ++j) {
    out.scales[j] = b.scales[j] & 15;
    out.mins[j] = b.scales[j] >> 4;
  }
  pairs_of_bits(b.codes, out.codes);
}

inline void decode_large(const gguf::BlockQ3_K& b, Chunk& out) {
  out.d[0] = half(b.d);
  for (int j = 0; j < 16; ++j) {
    const int low = b.scales[j % 8] >> (j < 8 ? 0 : 4) & 15;
    const int high = b.scales[8 + j % 4] >> (2 * (j / 4)) & 3;
    out.scales[j] = static_cast<int16_t>((low | high << 4) - 32);
  }
  pairs_of_bits(b.codes, out.codes);
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 32; ++i) {
      out.codes[32 * j + i] |= static_cast<uint8_t>((b.high[i] >> j & 1) << 2);
    }
  }
}

// Eight scales and eight mins of 6 bits: the first four in the low bits of bytes 0..3 and 4..7, the last four in the
// nibbles of bytes 8..11 with their upper bits on top of the first four.
inline void six_bit_scales(const uint8_t* bytes, uint64_t& scales, uint64_t& mins) {
  uint32_t a, b, c;
  __builtin_memcpy(&a, bytes, 4);
  __builtin_memcpy(&b, bytes + 4, 4);
  __builtin_memcpy(&c, bytes + 8, 4);
  const uint64_t high_scales = (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u);
  const uint64_t high_mins = (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u);
  scales = (a & 0x3f3f3f3fu) | high_scales << 32;
  mins = (b & 0x3f3f3f3fu) | high_mins << 32;
}

inline void decode_scales(const uint8_t* bytes, Chunk& out) {
  uint64_t scales, mins;
  six_bit_scales(bytes, scales, mins);
  for (int j = 0; j < 16; ++j) {
    out.scales[j] = static_cast<int16_t>(scales >> (j / 2 * 8) & 63);
    out.mins[j] = static_cast<int16_t>(mins >> (j / 2 * 8) & 63);
  }
}

inline void decode_large(const gguf::BlockQ4_K& b, Chunk& out) {
  out.d[0] = half(b.d);
  out.m[0] = half(b.dmin);
  decode_scales(b.scales, out);
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 32; ++i) {
      out.codes[64 * j + i] = b.codes[32 * j + i] & 15;
      out.codes[64 * j + 32 + i] = b.codes[32 * j + i] >> 4;
    }
  }
}

inline void decode_large(const gguf::BlockQ5_K& b, Chunk& out) {
  out.d[0] = half(b.d);
  out.m[0] = half(b.dmin);
  decode_scales(b.scales, out);
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 32; ++i) {
      const uint8_t high = static_cast<uint8_t>(b.high[i] >> (2 * j));
      out.codes[64 * j + i] = static_cast<uint8_t>((b.codes[32 * j + i] & 15) | (high & 1) << 4);
      out.codes[64 * j + 32 + i] = static_cast<uint8_t>(b.codes[32 * j + i] >> 4 | (high & 2) << 3);
    }
  }
}

inline void decode_large(const gguf::BlockQ6_K& b, Chunk& out) {
  out.d[0] = half(b.d);
  for (int j = 0; j < 16; ++j) {
    out.scales[j] = b.scales[j];
  }
  pairs_of_bits(b.high, out.codes);
  for (int run = 0; run < 2; ++run) {
    for (int i = 0; i < 64; ++i) {
      uint8_t* codes = out.codes + 128 * run;
      codes[i] = static_cast<uint8_t>((b.low[64 * run + i] & 15) | codes[i] << 4);
      codes[64 + i] = static_cast<uint8_t>(b.low[64 * run + i] >> 4 | codes[64 + i] << 4);
    }
  }
}

inline void decode_large(const gguf::BlockIQ4_XS& b, Chunk& out) {
  out.d[0] = half(b.d);
  const int high = b.scales_high[0] | b.scales_high[1] << 8;
  for (int j = 0; j < 8; ++j) {
    const int low = b.scales_low[j / 2] >> (4 * (j % 2)) & 15;
    out.scales[2 * j] = out.scales[2 * j + 1] = static_cast<int16_t>((low | (high >> (2 * j) & 3) << 4) - 32);
    look_up(b.codes + 16 * j, gguf::kNonlinear, 128, out.codes + 32 * j);
  }
}

// `elements` of a row, at most 256, from `blocks` on.
template <typename Block>
inline void decode_smalls(const uint8_t* blocks, int64_t elements, Chunk& out) {
  for (int64_t j = 0; j < 8; ++j) {
    out.d[j] = out.m[j] = 0.0f;
    if (j * gguf::kSmallBlock < elements) {
      Block block;
      __builtin_memcpy(&block, blocks + j * static_cast<int64_t>(sizeof(Block)), sizeof(Block));
      decode_small(block, out.codes + j * gguf::kSmallBlock, out.d[j], out.m[j]);
    } else {
      __builtin_memset(out.codes + j * gguf::kSmallBlock, 0, gguf::kSmallBlock);
    }
  }
}

template <typename Block>
inline void decode_large(const uint8_t* bytes, Chunk& out) {
  Block block;
  __builtin_memcpy(&block, bytes, sizeof(Block));
  out.m[0] = 0.0f;
  decode_large(block, out);
}

inline void decode_chunk(gguf::Type type, const uint8_t* blocks, int64_t elements, Chunk& out) {
  using gguf::Type;
  switch (type) {
    case Type::Q4_0:
      return decode_smalls<gguf::BlockQ4_0>(blocks, elements, out);
    case Type::Q4_1:
      return decode_smalls<gguf::BlockQ4_1>(blocks, elements, out);
    case Type::Q5_0:
      return decode_smalls<gguf::BlockQ5_0>(blocks, elements, out);
    case Type::Q5_1:
      return decode_smalls<gguf::BlockQ5_1>(blocks, elements, out);
    case Type::Q8_0:
      return decode_smalls<gguf::BlockQ8_0>(blocks, elements, out);
    case Type::IQ4_NL:
      return decode_smalls<gguf::BlockIQ4_NL>(blocks, elements, out);
    case Type::MXFP4:
      return decode_smalls<gguf::BlockMXFP4>(blocks, elements, out);
    case Type::Q2_K:
      return decode_large<gguf::BlockQ2_K>(blocks, out);
    case Type::Q3_K:
      return decode_large<gguf::BlockQ3_K>(blocks, out);
    case Type::Q4_K:
      return decode_large<gguf::BlockQ4_K>(blocks, out);
    case Type::Q5_K:
      return decode_large<gguf::BlockQ5_K>(blocks, out);
    case Type::Q6_K:
      return decode_large<gguf::BlockQ6_K>(blocks, out);
    case Type::IQ4_XS:
      return decode_large<gguf::BlockIQ4_XS>(blocks, out);
    default:
      return;  // F32, F16 and BF16 have no codes
  }
}

// 256 float32 weights of a decoded chunk.
inline void weights_of(const gguf::Traits& traits, const Chunk& chunk, float* out) {
  const int zero = traits.zero;
  for (int64_t j = 0; j < 16; ++j) {
    const bool small = traits.elements == gguf::kSmallBlock;
    const float scale = small ? chunk.d[j / 2] : chunk.d[0] * static_cast<float>(chunk.scales[j]);
    // Without mins 0 is subtracted, which changes no number.
    const float min = !traits.mins ? 0.0f : small ? chunk.m[j / 2] : chunk.m[0] * static_cast<float>(chunk.mins[j]);
    for (int64_t i = 16 * j; i < 16 * j + 16; ++i) {
      out[i] = scale * static_cast<float>(chunk.codes[i] - zero) - min;
    }
  }
}

inline void dequantize_chunks(const gguf::Traits& traits, const uint8_t* blocks, int64_t elements, float* out) {
  alignas(64) float weights[gguf::kChunk];
  Chunk chunk;
  const int64_t chunk_bytes = gguf::kChunk / traits.elements * traits.bytes;
  for (int64_t k = 0; k < elements; k += gguf::kChunk, blocks += chunk_bytes) {
    const int64_t count = elements - k < gguf::kChunk ? elements - k : gguf::kChunk;
    decode_chunk(traits.type, blocks, count, chunk);
    weights_of(traits, chunk, weights);
    __builtin_memcpy(out + k, weights, static_cast<size_t>(count) * sizeof(float));
  }
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
