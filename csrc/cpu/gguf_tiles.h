// Packed rows to tiles and back to codes, in plain C++ compiled once per instruction level (see simd.h). The layout is
// in common/gguf.h.
#pragma once

#include "cpu/gguf_decode.h"

namespace ferrum::cpu::FERRUM_LEVEL {

inline uint32_t load_word(const uint8_t* from) {
  uint32_t word;
  __builtin_memcpy(&word, from, 4);
  return word;
}

// A byte in every byte of a word.
constexpr uint32_t each_byte(uint32_t byte) { return byte * 0x01010101u; }

// One row of a tile's chunk in the common form.
inline void decode_tile_row(gguf::Type type, const uint8_t* chunk, int64_t row, Chunk& out) {
  const gguf::Tiling t = gguf::tiling_of(type);
  const uint32_t low_mask = each_byte((1u << t.low_bits) - 1), high_mask = each_byte((1u << t.high_bits) - 1);
  for (int run = 0; run < 8; ++run) {
    const uint8_t* low = chunk + run * t.run_bytes() + 4 * row;
    const uint8_t* high = low + 64 * t.low_bits;
    for (int p = 0; p < 8; ++p) {
      const int at = p * t.low_bits, high_at = p * t.high_bits;
      uint32_t word = load_word(low + at / 8 * 64) >> at % 8 & low_mask;
      if (t.high_bits != 0) {
        word |= (load_word(high + high_at / 8 * 64) >> high_at % 8 & high_mask) << t.low_bits;
      }
      __builtin_memcpy(out.codes + 32 * run + 4 * p, &word, 4);
    }
  }
  if (t.table != nullptr) {
    const int zero = gguf::traits_of(type).zero;
    for (uint8_t& code : out.codes) {
      code = static_cast<uint8_t>(t.table[code] + zero);
    }
  }
  for (int64_t j = 0; t.scales != 0 && j < 16; ++j) {
    const int64_t at = j * t.scales / 16 * gguf::kTileRows + row;
    const uint8_t scale = chunk[t.scales_at() + at];
    out.scales[j] = t.is_signed ? static_cast<int8_t>(scale) : scale;
    out.mins[j] = t.mins ? chunk[t.mins_at() + at] : 0;
  }
  for (int64_t j = 0; j < 8; ++j) {
    out.d[j] = out.m[j] = 0.0f;
    if (t.halves == 0) {
      out.d[j] = mxfp4_scale(chunk[t.d_at() + j * gguf::kTileRows + row]);
    } else if (j < t.halves) {
      const int64_t at = 2 * (j * gguf::kTileRows + row);
      out.d[j] = half(chunk + t.d_at() + at);
      // Blocks of 32 add their m.
      out.m[j] = !t.mins ? 0.0f : t.scales == 0 ? -half(chunk + t.m_at() + at) : half(chunk + t.m_at() + at);
    }
  }
}

inline void dequantize_tile(const gguf::Traits& traits, const uint8_t* tile, int64_t elements, float* out) {
  const int64_t bytes = gguf::tiling_of(traits.type).chunk_bytes();
  Chunk chunk;
  for (int64_t row = 0; row < gguf::kTileRows; ++row) {
    for (int64_t k = 0; k < elements; k += gguf::kChunk) {
      decode_tile_row(traits.type, tile + k / gguf::kChunk * bytes, row, chunk);
      weights_of(traits, chunk, out + row * elements + k);
    }
  }
}

// The bytes of d and of m in a block, m's being -1 without mins.
struct ScaleFields {
  int64_t d, m;
};
constexpr ScaleFields scale_fields(gguf::Type type) {
  using gguf::Type;
  switch (type) {
    case Type::Q4_1:
    case Type::Q5_1:
    case Type::Q4_K:
    case Type::Q5_K:
      return {0, 2};
    case Type::Q2_K:
      return {80, 82};
    case Type::Q3_K:
      return {108, -1};
    case Type::Q6_K:
      return {208, -1};
    default:
      return {0, -1};
  }
}

// A block's codes as a file holds them: those that index a table are not looked up.
inline void raw_codes(gguf::Type type, const uint8_t* blocks, Chunk& out) {
  using gguf::Type;
  decode_chunk(type, blocks, gguf::kChunk, out);
  if (gguf::tiling_of(type).table != nullptr) {
    const gguf::Traits& traits = gguf::traits_of(type);
    const int64_t head = type == Type::MXFP4 ? 1 : type == Type::IQ4_NL ? 2 : 8;
    for (int64_t j = 0; j < 8; ++j) {
      const uint8_t* codes =
          traits.elements == gguf::kChunk ? blocks + head + 16 * j : blocks + j * traits.bytes + head;
      nibbles(codes, out.codes + 32 * j);
    }
  }
}

// The planes of codes [16][256], as words of 4 codes.
inline void pack_codes(const gguf::Tiling& t, const uint8_t (*codes)[gguf::kChunk], uint8_t* chunk) {
  const uint32_t low_mask = each_byte((1u << t.low_bits) - 1), high_mask = each_byte((1u << t.high_bits) - 1);
  for (int run = 0; run < 8; ++run) {
    uint32_t lines[10][gguf::kTileRows] = {};
    for (int p = 0; p < 8; ++p) {
      uint32_t words[gguf::kTileRows];
      for (int row = 0; row < gguf::kTileRows; ++row) {
        words[row] = load_word(codes[row] + 32 * run + 4 * p);
      }
      const int at = p * t.low_bits, high_at = p * t.high_bits;
      for (int row = 0; row < gguf::kTileRows; ++row) {
        lines[at / 8][row] |= (words[row] & low_mask) << at % 8;
      }
      for (int row = 0; t.high_bits != 0 && row < gguf::kTileRows; ++row) {
        lines[t.low_bits + high_at / 8][row] |= (words[row] >> t.low_bits & high_mask) << high_at % 8;
      }
    }
    __builtin_memcpy(chunk + run * t.run_bytes(), lines, static_cast<size_t>(t.run_bytes()));
  }
}

// Scales and mins of row `row`, from its decoded chunk and its blocks.
inline void pack_scales(const gguf::Traits& traits, const Chunk& in, const uint8_t* blocks, int64_t row,
                        uint8_t* chunk) {
  const gguf::Tiling t = gguf::tiling_of(traits.type);
  for (int64_t j = 0; j < t.scales; ++j) {
    const int64_t at = j * gguf::kTileRows + row;
    chunk[t.scales_at() + at] = static_cast<uint8_t>(in.scales[j * 16 / t.scales]);
    if (t.mins) {
      chunk[t.mins_at() + at] = static_cast<uint8_t>(in.mins[j * 16 / t.scales]);
    }
  }
  const ScaleFields fields = scale_fields(traits.type);
  for (int64_t j = 0; j < gguf::kChunk / traits.elements; ++j) {
    const uint8_t* block = blocks + j * traits.bytes;
    const int64_t at = j * gguf::kTileRows + row;
    if (t.halves == 0) {
      chunk[t.d_at() + at] = block[0];
      continue;
    }
    __builtin_memcpy(chunk + t.d_at() + 2 * at, block + fields.d, 2);
    if (t.mins) {
      __builtin_memcpy(chunk + t.m_at() + 2 * at, block + fields.m, 2);
    }
  }
}

// 16 packed rows, one after the other, to a tile. `elements` is a multiple of 256.
inline void pack_tile(const gguf::Traits& traits, const uint8_t* rows, int64_t elements, uint8_t* tile) {
  const gguf::Tiling t = gguf::tiling_of(traits.type);
  const int64_t row_bytes = elements / traits.elements * traits.bytes;
  const int64_t chunk_bytes = gguf::kChunk / traits.elements * traits.bytes;
  uint8_t codes[gguf::kTileRows][gguf::kChunk];
  Chunk decoded;
  for (int64_t k = 0; k < elements / gguf::kChunk; ++k, tile += t.chunk_bytes()) {
    __builtin_memset(tile + t.chunk_bytes() - 64, 0, 64);  // the padding
    for (int64_t row = 0; row < gguf::kTileRows; ++row) {
      const uint8_t* blocks = rows + row * row_bytes + k * chunk_bytes;
      raw_codes(traits.type, blocks, decoded);
      __builtin_memcpy(codes[row], decoded.codes, sizeof(decoded.codes));
      pack_scales(traits, decoded, blocks, row, tile);
    }
    pack_codes(t, codes, tile);
  }
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
