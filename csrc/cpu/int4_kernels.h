// The kernels for int4 and int8 weights of one instruction level, on raw pointers. No torch header here: the level
// files include this.
#pragma once

#include <cstdint>

#include "common/int4.h"

namespace ferrum::cpu {

enum class FloatType { f32, f16, bf16 };

// Where a tile's data lie.
struct TileStart {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;
};

// One matrix in the layout of common/int4.h.
struct PackedWeights {
  const uint8_t* codes;
  const uint16_t* scales;  // float16 bits
  const uint8_t* zeros;    // nullptr: every zero point is 8 (int4) or 128 (int8)
  int64_t lines;           // K_packed / 8
  int64_t groups;
  int64_t group_lines;  // group_size / 8; the last group may have fewer
  int64_t line_bytes;   // 64 (int4) or 128 (int8)

  TileStart tile(int64_t t) const {
    const int64_t at = t * groups * int4::kTileColumns;
    return {codes + t * lines * line_bytes, scales + at, zeros ? zeros + at : nullptr};
  }
};

// Activations in the order of the packed rows: int8 with one scale per group, or kept in fp32.
// The int8 value stands for code * scale. A group with a NaN or an infinity has codes 0 and a scale that is NaN or
// infinite, so that every product with it is NaN. Codes lie in [-127, 127].
struct ActivationRows {
  const int8_t* codes;  // [rows, packed_rows]
  const float* scales;  // [rows, groups]
  const int32_t* sums;  // [rows, groups]: sum of the codes of a group
  const float* values;  // [rows, packed_rows] when the activations are kept
  int64_t packed_rows;  // K_packed
  int64_t groups;
};

// Columns of a panel: the row stride of what a tile kernel writes.
constexpr int64_t kPanelTiles = 4;
constexpr int64_t kPanelColumns = 64;
// Rows of a panel buffer: with 64 columns it fits the first-level cache.
constexpr int64_t kRowBlock = 48;

// out[r, 16 * t * tile_step + c] = activations of row row_ids[r] times column c of tile
// first_tile + t * tile_step, for t in [0, num_tiles); num_tiles * tile_step <= 4 or so that the columns fit the panel.
// Groups are added in ascending order as acc + float(dot) * (weight_scale * activation_scale), each operation rounded
// to fp32: every level and every number of rows gives the same bits for int8 activations.
// `next` is where the caller will go on reading, for the prefetch: the addresses are never read.
using TileKernel = void (*)(const PackedWeights& weights, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
                            const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const TileStart& next,
                            float* out);

struct Int4Kernels {
  // By the bits of the weights and the activations' form.
  TileKernel int4_by_int8, int4_by_full, int8_by_int8, int8_by_full;
  // fp32, fp16 or bf16 to fp32.
  void (*to_float)(const void* in, FloatType type, int64_t count, float* out);
  // fp32 to fp32, fp16 or bf16, to nearest even.
  void (*from_float)(const float* in, int64_t count, FloatType type, void* out);
  // One row to int8 codes, scales and sums, per group.
  void (*quantize_row)(const float* in, int64_t packed_rows, int64_t group_size, int8_t* codes, float* scales,
                       int32_t* sums);
  // A panel row of tile pairs (gate, up) to silu(gate) * up, 16 values per pair.
  void (*silu_mul_tiles)(const float* panel_row, int64_t pairs, float* out);
  // out += weight * in, multiplication and addition rounded apart.
  void (*add_scaled)(const float* in, float weight, int64_t count, float* out);
};

const Int4Kernels& int4_kernels_generic();
#if defined(__x86_64__)
const Int4Kernels& int4_kernels_avx2();
const Int4Kernels& int4_kernels_avx512();
#endif

// The kernels of active_isa().
const Int4Kernels& int4_kernels();

}  // namespace ferrum::cpu
