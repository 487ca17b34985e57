// What the instructions of csrc/cuda/ptx.cuh and mma.cuh do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <string>

#include "simt.h"

namespace ferrum::emulation {

inline void require_aligned(const char* instruction, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail(std::string(instruction) + ": address needs an alignment of " + std::to_string(bytes) + " bytes, it is " +
         std::to_string(reinterpret_cast<uintptr_t>(address) % bytes) + " past that");
  }
}

inline void require_shared(const char* instruction, const void* address, size_t bytes) {
  const auto* begin = static_cast<const unsigned char*>(address);
  if (!is_shared(begin) || !is_shared(begin + bytes - 1)) {
    fail(std::string(instruction) + ": address is not in shared memory");
  }
}

// Where dynamic shared memory begins in its address space: behind the static one, so that a kernel may count on the
// alignment of its array (launch.h) and on no more.
constexpr uint32_t kDynamicSharedStart = 1024 + 32;
inline uint32_t shared_address(const void* shared) {
  return kDynamicSharedStart +
         static_cast<uint32_t>(static_cast<const char*>(shared) - static_cast<const char*>(dynamic_shared()));
}

inline void cp_async(void* shared, const void* global, int bytes, int valid) {
  require_shared("cp.async", shared, bytes);
  require_aligned("cp.async", shared, bytes);
  require_aligned("cp.async", global, bytes);
  if (valid < 0 || valid > bytes) {
    fail("cp.async: " + std::to_string(valid) + " valid bytes of " + std::to_string(bytes));
  }
  issue_copy({shared, global, static_cast<size_t>(bytes), static_cast<size_t>(valid)});
}

// An instruction of the whole warp: PTX's `.sync.aligned`.
template <class Operand, class Function>
void aligned_collective(const char* name, Operand& operand, const Function& function) {
  warp_collective(name, Site::here(__FILE__, 0), 0xffffffffu, operand, [&](Operand* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] == nullptr) {
        fail(std::string(name) + ": lane " + std::to_string(i) + " of the warp takes no part");
      }
    }
    function(lanes);
  });
}

inline void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row) {
  struct Operand {
    uint32_t* registers;
    const unsigned char* row;
  } operand{registers, static_cast<const unsigned char*>(row)};
  if (static_cast<int>(this_lane()) < 8 * count) {
    require_shared("ldmatrix", row, 16);
    require_aligned("ldmatrix", row, 16);
  }
  aligned_collective("ldmatrix", operand, [=](Operand* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < count; ++m) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int r = transposed ? 2 * (lane % 4) + i : lane / 4, c = transposed ? lane / 4 : 2 * (lane % 4) + i;
          std::memcpy(&pair[i], lanes[8 * m + r]->row + 2 * c, 2);
        }
        std::memcpy(&lanes[lane]->registers[m], pair, 4);
      }
    }
  });
}

inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if ((table >> i & 1) != 0) {
      result |= ((i & 4) != 0 ? a : ~a) & ((i & 2) != 0 ? b : ~b) & ((i & 1) != 0 ? c : ~c);
    }
  }
  return result;
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> 4 * i;
    uint32_t byte = bytes >> (digit & 7) * 8 & 0xff;
    if ((digit & 8) != 0) {
      byte = (byte & 0x80) != 0 ? 0xff : 0;
    }
    result |= byte << 8 * i;
  }
  return result;
}

// Several times faster than NVIDIA's for the host: the exponent moves to float32's place and is scaled to its bias,
// which also makes numbers of subnormals.
inline float number(__half x) {
  const uint32_t half = __half_as_ushort(x);
  const float value = __builtin_bit_cast(float, (half & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = value >= 65536.0f ? 0x7f800000 : 0;  // infinity and NaN
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, value) | special | (half & 0x8000) << 16);
}
inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }
inline int number(int8_t x) { return x; }

// mma.m16n8kK on the fragments that mma.cuh describes: registers of P numbers of T, K = 8 * P.
template <class T, class Number>
void mma(const char* name, Number (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int P = 4 / sizeof(T), K = 8 * P;
  struct Operand {
    const uint32_t *a, *b;
    Number* d;
  } operand{a, b, d};
  aligned_collective(name, operand, [](Operand* const* lanes) {
    alignas(32) Number left[16][K], right[K][8], sum[16][8] = {};
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < P; ++i) {
        for (int r = 0; r < 4; ++r) {
          left[g + 8 * (r % 2)][P * t + 4 * P * (r / 2) + i] =
              number(reinterpret_cast<const T*>(&lanes[lane]->a[r])[i]);
        }
        for (int r = 0; r < 2; ++r) {
          right[P * t + 4 * P * r + i][g] = number(reinterpret_cast<const T*>(&lanes[lane]->b[r])[i]);
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < K; ++k) {
        for (int column = 0; column < 8; ++column) {
          sum[row][column] += left[row][k] * right[k][column];
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        lanes[lane]->d[i] += sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
      }
    }
  });
}

}  // namespace ferrum::emulation
