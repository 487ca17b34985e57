// GPTQ words, without torch: where the code of a row lies, and how v1 words become zero points. The layout is described
// in ferrum_ops/formats/gptq.py.
#pragma once

#include <cstdint>

namespace ferrum::gptq {

constexpr bool bits_supported(int64_t bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

// After this many codes, in this many words, a field starts at bit 0 again.
constexpr int64_t period_codes(int64_t bits) { return bits == 3 ? 32 : 32 / bits; }
constexpr int64_t period_words(int64_t bits) { return bits == 3 ? 3 : 1; }
constexpr uint32_t code_mask(int64_t bits) { return (1u << bits) - 1; }

// A field of a period: `shift` bits up in `word`; where it crosses, its upper bits open the next word.
struct Field {
  int64_t word;
  int shift;
  bool crosses;
};

constexpr Field field_at(int64_t index, int64_t bits) {
  const int64_t start = index * bits;
  return {start / 32, static_cast<int>(start % 32), start % 32 + bits > 32};
}

// The code with index `index` of a period of words that lie `stride` words apart.
inline uint32_t code_at(const int32_t* period, int64_t stride, int64_t index, int64_t bits) {
  const Field field = field_at(index, bits);
  uint32_t value = static_cast<uint32_t>(period[field.word * stride]) >> field.shift;
  if (field.crosses) {
    value |= static_cast<uint32_t>(period[(field.word + 1) * stride]) << (32 - field.shift);
  }
  return value & code_mask(bits);
}

// What a v1 writer subtracted from every word; 0 for 3 bits, where it subtracted inside each field.
constexpr uint32_t v1_word_offset(int64_t bits) {
  return bits == 2 ? 0x55555555u : bits == 4 ? 0x11111111u : bits == 8 ? 0x01010101u : 0u;
}

}  // namespace ferrum::gptq
