// GGUF blocks into AVX512 registers: 256 unsigned codes in the order of the row, and their integer scales.
#pragma once

#include "cpu/gguf.h"
#include "cpu/gguf_decode.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

using gguf::Type;

template <Type T>
constexpr gguf::Traits kTraitsOf = gguf::traits_of(T);
template <Type T>
constexpr bool kSmall = kTraitsOf<T>.elements == gguf::kSmallBlock;
template <Type T>
constexpr int64_t kChunkBytes = gguf::kChunk / kTraitsOf<T>.elements * kTraitsOf<T>.bytes;
// Whether 16 bits hold the sum of two products with int8.
template <Type T>
constexpr bool kNarrow = kTraitsOf<T>.zero <= 63;

// Codes of a chunk. scales and factors (blocks of 256) are int16 for each 16 elements; the sums of 16 activations are
// multiplied by the factors: the mins, or the scales times -zero.
struct Registers {
  __m512i codes[4];
  __m256i scales, factors;
  uint32_t d_and_m;  // float16, m above
};
struct SmallRegisters {
  __m512i codes[4];
  __m256 d, m;
};

template <Type T>
struct TypeConstant {
  static constexpr Type value = T;
};
// Calls body with the TypeConstant of `type`.
template <typename Body>
inline void for_type(Type type, const Body& body) {
  switch (type) {
    case Type::Q4_0:
      return body(TypeConstant<Type::Q4_0>{});
    case Type::Q4_1:
      return body(TypeConstant<Type::Q4_1>{});
    case Type::Q5_0:
      return body(TypeConstant<Type::Q5_0>{});
    case Type::Q5_1:
      return body(TypeConstant<Type::Q5_1>{});
    case Type::Q8_0:
      return body(TypeConstant<Type::Q8_0>{});
    case Type::IQ4_NL:
      return body(TypeConstant<Type::IQ4_NL>{});
    case Type::MXFP4:
      return body(TypeConstant<Type::MXFP4>{});
    case Type::Q2_K:
      return body(TypeConstant<Type::Q2_K>{});
    case Type::Q3_K:
      return body(TypeConstant<Type::Q3_K>{});
    case Type::Q4_K:
      return body(TypeConstant<Type::Q4_K>{});
    case Type::Q5_K:
      return body(TypeConstant<Type::Q5_K>{});
    case Type::Q6_K:
      return body(TypeConstant<Type::Q6_K>{});
    case Type::IQ4_XS:
      return body(TypeConstant<Type::IQ4_XS>{});
    default:
      return;  // F32, F16 and BF16 have no codes
  }
}

template <int R, int N>
inline __attribute__((always_inline)) void clear(__m512i (*values)[N]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) {
      values[r][t] = _mm512_setzero_si512();
    }
  }
}

inline __m256i load32(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline __m128i load16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline __m512i broadcast_word(const void* from) {
  int32_t word;
  __builtin_memcpy(&word, from, 4);
  return _mm512_set1_epi32(word);
}

inline uint32_t half_bits(const uint8_t* bytes) {
  uint16_t bits;
  __builtin_memcpy(&bits, bytes, 2);
  return bits;
}
// 64-bit lanes: a in the lower four, b in the upper.
inline __m512i halves(int64_t a, int64_t b) { return _mm512_set_epi64(b, b, b, b, a, a, a, a); }

// 64 codes from 32 bytes: the low nibbles, then the high.
inline __m512i nibbles_of_32(const uint8_t* bytes) {
  const __m512i twice = _mm512_broadcast_i64x4(load32(bytes));
  return _mm512_and_si512(_mm512_srlv_epi64(twice, halves(0, 4)), _mm512_set1_epi8(15));
}

// Eight bytes as int16, each twice.
inline __m256i twice_each(uint64_t bytes) {
  const __m128i eight = _mm_cvtsi64_si128(static_cast<int64_t>(bytes));
  return _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(eight, eight));
}

inline void load_scales_and_mins(const uint8_t* bytes, Registers& out) {
  uint64_t scales, mins;
  six_bit_scales(bytes, scales, mins);
  out.scales = twice_each(scales);
  out.factors = twice_each(mins);
}

template <Type T>
inline void load_large(const uint8_t* block, Registers& out) {
  if constexpr (T == Type::Q4_K) {
    load_scales_and_mins(block + 4, out);
    for (int i = 0; i < 4; ++i) {
      out.codes[i] = nibbles_of_32(block + 16 + 32 * i);
    }
    out.d_and_m = half_bits(block) | half_bits(block + 2) << 16;
  } else if constexpr (T == Type::Q5_K) {
    load_scales_and_mins(block + 4, out);
    const __m512i high = _mm512_broadcast_i64x4(load32(block + 16));
    const __m512i sixteen = _mm512_set1_epi8(16);
    for (int i = 0; i < 4; ++i) {
      const __m512i bit = _mm512_mask_mov_epi8(_mm512_set1_epi8(static_cast<char>(1 << (2 * i))), 0xffffffff00000000u,
                                               _mm512_set1_epi8(static_cast<char>(2 << (2 * i))));
      const __m512i low = nibbles_of_32(block + 48 + 32 * i);
      out.codes[i] = _mm512_mask_add_epi8(low, _mm512_test_epi8_mask(high, bit), low, sixteen);
    }
    out.d_and_m = half_bits(block) | half_bits(block + 2) << 16;
  } else if constexpr (T == Type::Q6_K) {
    const __m512i low_nibbles = _mm512_set1_epi8(15), upper_bits = _mm512_set1_epi8(0x30);
    for (int i = 0; i < 2; ++i) {
      const __m512i low = _mm512_loadu_si512(block + 64 * i);
      const __m512i high = _mm512_broadcast_i64x4(load32(block + 128 + 32 * i));
      const __m512i first = _mm512_sllv_epi64(high, halves(4, 2)), second = _mm512_srlv_epi64(high, halves(0, 2));
      // low & 15 | high & 0x30
      out.codes[2 * i] = _mm512_or_si512(_mm512_and_si512(low, low_nibbles), _mm512_and_si512(first, upper_bits));
      out.codes[2 * i + 1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(low, 4), low_nibbles),
                                             _mm512_and_si512(second, upper_bits));
    }
    out.scales = _mm256_cvtepi8_epi16(load16(block + 192));
    out.factors = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), out.scales), 5);
    out.d_and_m = half_bits(block + 208);
  } else {
    Chunk chunk;
    decode_chunk(T, block, gguf::kChunk, chunk);
    for (int i = 0; i < 4; ++i) {
      out.codes[i] = _mm512_load_si512(chunk.codes + 64 * i);
    }
    out.scales = load32(chunk.scales);
    out.factors =
        kTraitsOf<T>.mins ? load32(chunk.mins) : _mm256_mullo_epi16(out.scales, _mm256_set1_epi16(-kTraitsOf<T>.zero));
    constexpr int64_t d = T == Type::Q2_K ? 80 : T == Type::Q3_K ? 108 : 0;  // in IQ4_XS it comes first
    out.d_and_m = half_bits(block + d) | (kTraitsOf<T>.mins ? half_bits(block + d + 2) << 16 : 0);
  }
}

// The float16 at the head of each of eight blocks of `Bytes`, picked out of 128 bytes at a time: all of them from two
// vectors where blocks have 18 bytes, four and four where they have 34.
template <int64_t Bytes>
inline __m256 eight_halves(const uint8_t* blocks) {
  static_assert(Bytes == 18 || Bytes == 34);
  constexpr int step = Bytes / 2;
  const __m512i low = _mm512_loadu_si512(blocks), high = _mm512_loadu_si512(blocks + 64);
  if constexpr (Bytes == 18) {
    const __m512i words =
        _mm512_castsi128_si512(_mm_setr_epi16(0, step, 2 * step, 3 * step, 4 * step, 5 * step, 6 * step, 7 * step));
    return _mm256_cvtph_ps(_mm512_castsi512_si128(_mm512_permutex2var_epi16(low, words, high)));
  } else {
    const __m512i words =
        _mm512_castsi128_si512(_mm_setr_epi16(0, step, 2 * step, 3 * step, 0, step, 2 * step, 3 * step));
    const __m512i next = _mm512_loadu_si512(blocks + 4 * Bytes), last = _mm512_loadu_si512(blocks + 4 * Bytes + 64);
    return _mm256_cvtph_ps(_mm_blend_epi32(_mm512_castsi512_si128(_mm512_permutex2var_epi16(low, words, high)),
                                           _mm512_castsi512_si128(_mm512_permutex2var_epi16(next, words, last)), 12));
  }
}

template <Type T>
inline void decode_to_registers(const uint8_t* blocks, int64_t elements, SmallRegisters& out) {
  Chunk chunk;
  decode_chunk(T, blocks, elements, chunk);
  for (int i = 0; i < 4; ++i) {
    out.codes[i] = _mm512_load_si512(chunk.codes + 64 * i);
  }
  out.d = _mm256_load_ps(chunk.d);
  out.m = _mm256_load_ps(chunk.m);
}

// 64 codes of two blocks that follow each other.
template <Type T>
inline __m512i codes_of_two(const uint8_t* first, const uint8_t* second) {
  const __m512i flip = _mm512_set1_epi8(-128);
  if constexpr (T == Type::Q8_0) {
    return _mm512_xor_si512(_mm512_inserti64x4(_mm512_castsi256_si512(load32(first)), load32(second), 1), flip);
  } else {
    const __m512i both = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(load16(first)), 0xff00, load16(second));
    const __m512i shifts = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    const __m512i codes = _mm512_and_si512(_mm512_srlv_epi64(both, shifts), _mm512_set1_epi8(15));
    if constexpr (T == Type::Q4_0) {
      return codes;
    } else {
      const __m512i table = _mm512_broadcast_i32x4(load16(gguf::kNonlinear));
      return _mm512_xor_si512(_mm512_shuffle_epi8(table, codes), flip);
    }
  }
}

template <Type T>
inline void load_small(const uint8_t* blocks, int64_t elements, SmallRegisters& out) {
  if constexpr (T == Type::Q8_0 || T == Type::Q4_0 || T == Type::IQ4_NL) {
    constexpr int64_t bytes = kTraitsOf<T>.bytes;
    if (elements >= gguf::kChunk) {
      out.d = eight_halves<bytes>(blocks);
      out.m = _mm256_setzero_ps();
      for (int i = 0; i < 4; ++i, blocks += 2 * bytes) {
        out.codes[i] = codes_of_two<T>(blocks + 2, blocks + bytes + 2);
      }
      return;
    }
  }
  decode_to_registers<T>(blocks, elements, out);
}

inline const uint8_t* row_of(const GgufProduct& p, int64_t column) {
  return p.weights.blocks + (p.first + smaller(column, p.columns - 1)) * p.weights.row_bytes();
}

inline float* tile_of(const GgufProduct& p, int64_t tile) { return p.out + tile * p.tile_stride; }

// 16 rows of 16 words become 16 columns: out[i] word j = in[j] word i.
inline void transpose(const __m512i* in, __m512i* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  // b[4q + j]: 128-bit lane l holds word 4l + j of rows 4q ... 4q + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x44),
                  low23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xee),
                  high23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xee);
    out[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    out[4 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    out[8 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    out[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL
