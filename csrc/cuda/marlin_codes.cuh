// The words of the Marlin layout as A fragments of an mma: 16 output columns x 16 rows of K, each number code - zero,
// or code + kBias, which fewer instructions make.
//
// Codes and zero points differ by at most 255, which float16 and bfloat16 hold exactly: no rounding of weights, no
// overflow, and scales multiply sums in float32. Of an exponent whose last bits count 1 (128 in bfloat16; 1024 in
// float16, or 64 for bits 4 to 7), the low bits are the code itself.
#pragma once

#include <type_traits>

#include "common/marlin.h"
#include "cuda/ptx.cuh"

namespace ferrum::cuda {

template <typename T>
struct Packed;
template <>
struct Packed<__half> {
  using Pair = __half2;
  static constexpr uint32_t kMagic = 0x64006400;  // 1024
  static constexpr uint32_t kOnes = 0x3c003c00;
};
template <>
struct Packed<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr uint32_t kMagic = 0x43004300;  // 128
  static constexpr uint32_t kOnes = 0x3f803f80;
};

template <typename T>
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
  using Pair = typename Packed<T>::Pair;
  return bits_as<uint32_t>(__hsub2(bits_as<Pair>(a), bits_as<Pair>(b)));
}

constexpr int kMaskThenOr = (0xf0 & 0xcc) | 0xaa;

// For a lane and a unit of 16 x 64: `zero` [2 * tile + half], the zero point of columns lane / 4 + 8 * half of each
// tile in the form that is subtracted; a fragment of a tile from the lane's words.
template <typename T, int Bits>
struct Codes;

template <typename T>
struct Codes<T, 4> {
  static constexpr int kWords = 4;      // of a lane in a unit
  static constexpr int kZeroWords = 1;  // of a lane in a group

  __device__ static __forceinline__ void fragment(const uint32_t (&words)[kWords], int tile, const uint32_t (&zero)[8],
                                                  uint32_t (&a)[4]) {
    const uint32_t word = words[tile];
#pragma unroll
    for (int nibble = 0; nibble < 4; ++nibble) {  // column half nibble / 2, rows 2 (lane % 4) + 8 (nibble % 2)
      const uint32_t codes = lop3<kMaskThenOr>(word >> 4 * nibble, 0x000f000f, Packed<T>::kMagic);
      a[nibble / 2 + 2 * (nibble % 2)] = subtract<T>(codes, zero[2 * tile + nibble / 2]);
    }
  }

  __device__ static __forceinline__ uint32_t zero_pair(uint32_t code) { return code * 0x10001u | Packed<T>::kMagic; }

  __device__ static __forceinline__ uint32_t zero_code(const uint32_t (&words)[kZeroWords], int i) {
    return words[0] >> (16 * (i % 2) + 4 * (i / 2)) & 0xf;
  }

  // A bias this small costs the float32 sums of the products no more than 5 of their 24 bits.
  static constexpr float kBias = std::is_same_v<T, __half> ? 64.0f : 128.0f;

  __device__ static __forceinline__ void biased_fragment(const uint32_t (&words)[kWords], int tile, uint32_t (&a)[4]) {
    const uint32_t word = words[tile];
#pragma unroll
    for (int nibble = 0; nibble < 4; ++nibble) {
      if constexpr (std::is_same_v<T, __half>) {
        const uint32_t shifted = nibble == 0 ? word << 4 : word >> 4 * (nibble == 0 ? 0 : nibble - 1);
        a[nibble / 2 + 2 * (nibble % 2)] = lop3<kMaskThenOr>(shifted, 0x00f000f0, 0x54005400);
      } else {
        a[nibble / 2 + 2 * (nibble % 2)] = lop3<kMaskThenOr>(word >> 4 * nibble, 0x000f000f, Packed<T>::kMagic);
      }
    }
  }
};

template <typename T>
struct Codes<T, 8> {
  static constexpr int kWords = 8;
  static constexpr int kZeroWords = 2;

  __device__ static __forceinline__ void fragment(const uint32_t (&words)[kWords], int tile, const uint32_t (&zero)[8],
                                                  uint32_t (&a)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = words[2 * tile + half];
#pragma unroll
      for (int rows = 0; rows < 2; ++rows) {
        a[half + 2 * rows] = difference(word, rows, zero[2 * tile + half]);
      }
    }
  }

  __device__ static __forceinline__ uint32_t zero_pair(uint32_t code) {
    if constexpr (std::is_same_v<T, __half>) {
      return code * 0x10001u | Packed<T>::kMagic;
    } else {
      return bits_as<uint32_t>(__float2bfloat162_rn(static_cast<float>(code)));
    }
  }

  // The bytes of a word are those of tiles 0, 1, 0, 1 for halves 0, 0, 1, 1.
  __device__ static __forceinline__ uint32_t zero_code(const uint32_t (&words)[kZeroWords], int i) {
    return words[i / 4] >> 8 * (i / 2 % 2 + 2 * (i % 2)) & 0xff;
  }

 private:
  // Bytes `rows` and `rows` + 2.
  __device__ static __forceinline__ uint32_t difference(uint32_t word, int rows, uint32_t zero) {
    if constexpr (std::is_same_v<T, __half>) {
      return subtract<T>(prmt(word, Packed<T>::kMagic, rows == 0 ? 0x5250 : 0x5351), zero);
    } else {
      // bfloat16 takes seven bits of a code at once: 128 + the low ones, and 128 or 256 for the top one.
      const uint32_t bytes = word >> 8 * rows;
      const uint32_t low = lop3<kMaskThenOr>(bytes, 0x007f007f, Packed<T>::kMagic);
      const uint32_t top = lop3<kMaskThenOr>(bytes, 0x00800080, Packed<T>::kMagic);
      constexpr uint32_t kMinus256 = 0xc380c380;
      const __nv_bfloat162 high = __hadd2(bits_as<__nv_bfloat162>(top), bits_as<__nv_bfloat162>(kMinus256));
      return bits_as<uint32_t>(__hadd2(bits_as<__nv_bfloat162>(subtract<T>(low, zero)), high));
    }
  }
};

}  // namespace ferrum::cuda
