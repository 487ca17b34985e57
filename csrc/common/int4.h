// The "int4_cpu" layout, without torch.
//
// A matrix of N output columns is cut into tiles of 16 columns; a tile holds its K_packed rows in lines of 64 bytes,
// eight rows to a line. Byte 4c+b of line i holds row 8i+b of column c in the low nibble and row 8i+4+b in the high
// nibble, so that one load feeds two 16-lane dot products of four int8 values each.
//   codes  uint8   [N_pad/16, K_packed/8, 64]    N_pad = N rounded up to 16
//   scales float16 [N_pad/16, G, 16]             G = ceil(K_packed / group_size); the last group may be shorter
//   zeros  uint8   [N_pad/16, G, 16], 0..16      absent: every zero point is 8
// int8 weights have the same tiles and scales, a byte per code and zero points of 128: byte 4c+b of a line holds row
// 8i+b of column c, byte 64+4c+b row 8i+4+b.
//   codes  uint8   [N_pad/16, K_packed/8, 128]
#pragma once

#include <cstdint>

namespace ferrum::int4 {

constexpr int64_t kTileColumns = 16;
constexpr int64_t kLineRows = 8;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kInt8LineBytes = 128;
constexpr int64_t kMaxGroupSize = 128;
constexpr int64_t kSymmetricZero = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace ferrum::int4
