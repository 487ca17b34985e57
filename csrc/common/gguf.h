// GGUF block formats, without torch: the blocks as they lie in a file, and what a kernel must know of each type.
//
// A row of K weights is a run of blocks. The facts are those of ggml (ggml-common.h, ggml-quants.c) as the Python
// package `gguf` documents them. Every quantised type fits one of two forms, for element k of a block:
//   blocks of 32:   weight = d * (code - zero) - m
//   blocks of 256:  weight = (d * scale[k / 16]) * (code - zero) - dmin * min[k / 16]
// with unsigned codes, small integer scales and mins, and each operation rounded to float32 as written.
#pragma once

#include <cstdint>

namespace ferrum::gguf {

// ggml_type, as stored in a file.
enum class Type : int64_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  IQ4_NL = 20,
  IQ4_XS = 23,
  BF16 = 30,
  MXFP4 = 39,
};

// float16 bits and every other field as bytes: blocks of odd sizes follow each other without padding.
using Half = uint8_t[2];

struct BlockQ4_0 {
  Half d;
  uint8_t codes[16];  // element i low nibble, 16 + i high
};
struct BlockQ4_1 {
  Half d, m;
  uint8_t codes[16];
};
struct BlockQ5_0 {
  Half d;
  uint8_t high[4];  // bit i: the fifth bit of element i
  uint8_t codes[16];
};
struct BlockQ5_1 {
  Half d, m;
  uint8_t high[4];
  uint8_t codes[16];
};
struct BlockQ8_0 {
  Half d;
  int8_t codes[32];
};
struct BlockQ2_K {
  uint8_t scales[16];  // scale in the low nibble, min in the high
  uint8_t codes[64];   // two bits each: byte i of a run of 32 holds elements i, 32 + i, 64 + i, 96 + i
  Half d, dmin;
};
struct BlockQ3_K {
  uint8_t high[32];    // bit j of byte i: set, element 32 * j + i has no 4 subtracted
  uint8_t codes[64];   // as in Q2_K
  uint8_t scales[12];  // sixteen of 6 bits: low nibbles in bytes 0..7, high pairs in bytes 8..11
  Half d;
};
struct BlockQ4_K {
  Half d, dmin;
  uint8_t scales[12];  // eight scales and eight mins of 6 bits
  uint8_t codes[128];  // byte i of a run of 32 holds elements i and 32 + i
};
struct BlockQ5_K {
  Half d, dmin;
  uint8_t scales[12];
  uint8_t high[32];  // bit j of byte i: the fifth bit of element 32 * j + i
  uint8_t codes[128];
};
struct BlockQ6_K {
  uint8_t low[128];  // byte i of a run of 64 holds elements i and 64 + i
  uint8_t high[64];  // byte i of a run of 32 holds two bits of elements i, 32 + i, 64 + i, 96 + i
  int8_t scales[16];
  Half d;
};
struct BlockIQ4_NL {
  Half d;
  uint8_t codes[16];  // indices into kNonlinear
};
struct BlockIQ4_XS {
  Half d;
  uint8_t scales_high[2];
  uint8_t scales_low[4];
  uint8_t codes[128];  // eight runs laid out like Q4_0
};
struct BlockMXFP4 {
  uint8_t exponent;   // e8m0
  uint8_t codes[16];  // e2m1
};

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20);
static_assert(sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24 && sizeof(BlockQ8_0) == 34);
static_assert(sizeof(BlockQ2_K) == 84 && sizeof(BlockQ3_K) == 110 && sizeof(BlockQ4_K) == 144);
static_assert(sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210);
static_assert(sizeof(BlockIQ4_NL) == 18 && sizeof(BlockIQ4_XS) == 136 && sizeof(BlockMXFP4) == 17);

// What the 4-bit codes of IQ4_NL and IQ4_XS stand for, and of MXFP4 (doubled, so that they are integers).
constexpr int8_t kNonlinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Elements a kernel decodes at a time: one block of 256, or eight of 32.
constexpr int64_t kChunk = 256;
constexpr int64_t kSmallBlock = 32;

struct Traits {
  Type type;
  const char* name;
  int64_t elements, bytes;  // of a block
  int zero;                 // what is subtracted from an unsigned code
  bool mins;                // whether a min is subtracted
};

constexpr Traits kTraits[] = {
    {Type::F32, "F32", 1, 4, 0, false},
    {Type::F16, "F16", 1, 2, 0, false},
    {Type::Q4_0, "Q4_0", 32, sizeof(BlockQ4_0), 8, false},
    {Type::Q4_1, "Q4_1", 32, sizeof(BlockQ4_1), 0, true},
    {Type::Q5_0, "Q5_0", 32, sizeof(BlockQ5_0), 16, false},
    {Type::Q5_1, "Q5_1", 32, sizeof(BlockQ5_1), 0, true},
    {Type::Q8_0, "Q8_0", 32, sizeof(BlockQ8_0), 128, false},
    {Type::Q2_K, "Q2_K", 256, sizeof(BlockQ2_K), 0, true},
    {Type::Q3_K, "Q3_K", 256, sizeof(BlockQ3_K), 4, false},
    {Type::Q4_K, "Q4_K", 256, sizeof(BlockQ4_K), 0, true},
    {Type::Q5_K, "Q5_K", 256, sizeof(BlockQ5_K), 0, true},
    {Type::Q6_K, "Q6_K", 256, sizeof(BlockQ6_K), 32, false},
    {Type::IQ4_NL, "IQ4_NL", 32, sizeof(BlockIQ4_NL), 128, false},
    {Type::IQ4_XS, "IQ4_XS", 256, sizeof(BlockIQ4_XS), 128, false},
    {Type::BF16, "BF16", 1, 2, 0, false},
    {Type::MXFP4, "MXFP4", 32, sizeof(BlockMXFP4), 12, false},
};

// nullptr for an unknown type.
constexpr const Traits* find_traits(int64_t type) {
  for (const Traits& traits : kTraits) {
    if (static_cast<int64_t>(traits.type) == type) {
      return &traits;
    }
  }
  return nullptr;
}

constexpr const Traits& traits_of(Type type) { return *find_traits(static_cast<int64_t>(type)); }

constexpr int64_t chunks(int64_t in_features) { return (in_features + kChunk - 1) / kChunk; }

// Tiles: the same information rearranged for products, in about as many bytes. 16 rows stand side by side, their
// weights in chunks of 256. A chunk of a tile is
//   8 runs of 32 elements, each low_bits lines of 64 bytes and then high_bits of them,
//   scales  uint8 or int8 [scales][16], mins uint8 [scales][16]        (blocks of 256)
//   d, m    float16 [1 or 8][16], or the exponents uint8 [8][16] of MXFP4
//   padding to whole lines.
// In a run, vector p (0 ... 7) has byte b of 32-bit lane c for element 4p + b of row c. Of a plane of n bits a line has
// 8 / n vectors, vector p in line p * n / 8 at bit p * n % 8 of every byte; codes are low | high << low_bits.
constexpr int64_t kTiled = 1 << 16;  // added to the number of a type
constexpr int64_t kTileRows = 16;

struct Tiling {
  int low_bits, high_bits;
  int64_t scales;  // integer scales of a row and chunk: 0, 8 or 16
  bool is_signed;  // they are
  bool mins;
  int64_t halves;       // float16 scales of a row and chunk: 1 or 8; 0 for exponents
  const int8_t* table;  // what a code stands for, less the zero point; nullptr: itself

  constexpr int64_t run_bytes() const { return 64 * (low_bits + high_bits); }
  constexpr int64_t scales_at() const { return 8 * run_bytes(); }
  constexpr int64_t mins_at() const { return scales_at() + scales * kTileRows; }
  constexpr int64_t d_at() const { return mins_at() + (mins ? scales * kTileRows : 0); }
  constexpr int64_t d_bytes() const { return halves == 0 ? 8 * kTileRows : 2 * halves * kTileRows; }
  constexpr int64_t m_at() const { return d_at() + d_bytes(); }
  constexpr int64_t chunk_bytes() const { return (m_at() + (mins ? d_bytes() : 0) + 63) / 64 * 64; }
};

constexpr Tiling tiling_of(Type type) {
  switch (type) {
    case Type::Q4_0:
      return {4, 0, 0, false, false, 8, nullptr};
    case Type::Q4_1:
      return {4, 0, 0, false, true, 8, nullptr};
    case Type::Q5_0:
      return {4, 1, 0, false, false, 8, nullptr};
    case Type::Q5_1:
      return {4, 1, 0, false, true, 8, nullptr};
    case Type::Q8_0:
      return {8, 0, 0, false, false, 8, nullptr};
    case Type::Q2_K:
      return {2, 0, 16, false, true, 1, nullptr};
    case Type::Q3_K:
      return {2, 1, 16, true, false, 1, nullptr};
    case Type::Q4_K:
      return {4, 0, 8, false, true, 1, nullptr};
    case Type::Q5_K:
      return {4, 1, 8, false, true, 1, nullptr};
    case Type::Q6_K:
      return {4, 2, 16, true, false, 1, nullptr};
    case Type::IQ4_NL:
      return {4, 0, 0, false, false, 8, kNonlinear};
    case Type::IQ4_XS:
      return {4, 0, 8, true, false, 1, kNonlinear};
    case Type::MXFP4:
      return {4, 0, 0, false, false, 0, kE2M1};
    default:
      return {0, 0, 0, false, false, 0, nullptr};  // F32, F16 and BF16 have no tiles
  }
}

}  // namespace ferrum::gguf
