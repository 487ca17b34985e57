// The int8 activations that GGUF tiles are multiplied with, words of four read from memory by the products themselves.
#pragma once

#include "cpu/gguf_blocks_avx512.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// sum + the products of each lane's four codes with the four int8 at `word`, or of its two int16 with the two there.
// With intrinsics GCC broadcasts the word with an instruction of its own, which takes from the rate of the products.
using Word = int32_t __attribute__((may_alias, aligned(2)));
inline __attribute__((always_inline)) __m512i add_dot(__m512i sum, __m512i codes, const int8_t* word) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const Word*>(word)));
  return sum;
}
inline __attribute__((always_inline)) __m512i add_dot(__m512i sum, __m512i factors, const int16_t* word) {
  __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(factors), "m"(*reinterpret_cast<const Word*>(word)));
  return sum;
}

// Where the codes of R rows are read: an address register for each, so that compilers make up no others.
template <int R>
struct RowCodes {
  const int8_t* at[R];

  RowCodes(const GgufActivations& a, const int32_t* row_ids) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      at[r] = a.codes + row_ids[r] * a.chunks * gguf::kChunk;
    }
  }
  inline __attribute__((always_inline)) void next_run() {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      at[r] += gguf::kSmallBlock;
      __asm__("" : "+r"(at[r]));
    }
  }
};

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL
