// The kernels of the gguf family. No torch here.
#pragma once

#include "common/gguf.h"
#include "cpu/simd.h"

namespace ferrum::cpu {

// One matrix [rows, in_features] of packed rows, or of tiles of 16 rows: a product has its rows for output columns.
struct GgufWeights {
  const gguf::Traits* traits;
  const uint8_t* blocks;
  int64_t rows, in_features;
  bool tiled;

  int64_t row_bytes() const { return in_features / traits->elements * traits->bytes; }
  int64_t tile_bytes() const { return gguf::chunks(in_features) * gguf::tiling_of(traits->type).chunk_bytes(); }
  // Where row `row` begins, or the tile that begins with it.
  const uint8_t* at(int64_t row) const {
    return blocks + (tiled ? row / gguf::kTileRows * tile_bytes() : row * row_bytes());
  }
  int64_t bytes() const { return tiled ? rows / gguf::kTileRows * tile_bytes() : rows * row_bytes(); }
};

// How large a row's dot products can get, the most over its blocks.
struct GgufPeaks {
  int16_t of_16;  // the sum of the magnitudes of 16 codes
  int16_t of_32;  // of 32 codes, the sum of the positive or of the negative ones, whichever is larger
};

// Prepared activations, in chunks of 256 with zeros behind the last one: int8 codes with a scale for each block of the
// weights (256 or 32), or values kept in fp32. A code stands for code * scale; a block with a NaN or an infinity has
// codes 0 and a scale that is NaN or infinite. Codes lie in [-127, 127].
struct GgufActivations {
  const int8_t* codes;      // [rows, 256 * chunks]
  const float* scales;      // [rows, chunks] or [rows, 8 * chunks]
  const int16_t* sums;      // [rows, 16 * chunks]: of 16 codes each
  const int16_t* run_sums;  // [rows, 8 * chunks]: of 32 codes each
  const GgufPeaks* peaks;   // [rows]
  const float* values;      // [rows, 256 * chunks] when the activations are kept
  int64_t chunks;
};

// A product of `columns` rows of weights from `first` on with the activations row_ids[0 ... rows). Column c goes to
// out[row * 64 + c / 16 * tile_stride + c % 16]: with a stride of 32 gate and up alternate. Columns are padded to 16.
// `next` is where the weights read after these begin, for prefetching, or nullptr.
struct GgufProduct {
  GgufWeights weights;
  int64_t first, columns;
  GgufActivations activations;
  const int32_t* row_ids;
  int64_t rows;
  int64_t tile_stride;
  const uint8_t* next;
  float* out;
};

constexpr int64_t kGgufTile = 16;
constexpr int64_t kGgufPanel = 64;
// More rows at a time would push a decoded panel out of the first-level cache.
constexpr int64_t kGgufRowBlock = 96;

// int8: with dot and sum exact integers, blocks are added in ascending order, each operation rounded to fp32:
//   blocks of 256: acc + (dot * (d * scale) - mins * (dmin * scale)),
//   blocks of 32:  acc + the eight terms dot * (d * scale) - m * (scale * sum) added pairwise,
//   ((0+1)+(2+3))+((4+5)+(6+7)).
// Every level and every number of rows gives the same bits.
FERRUM_DECLARE_LEVELS(
    void gguf_int8_columns(const GgufProduct& product); void gguf_full_columns(const GgufProduct& product);
    // What a row of `width` codes (a multiple of 256) has besides them: sums of 16 and of 32, peaks.
    GgufPeaks gguf_sums(const int8_t* codes, int64_t width, int16_t* sums, int16_t* run_sums);
    void gguf_dequantize_row(const gguf::Traits& traits, const uint8_t* blocks, int64_t elements, float* out);
    void gguf_dequantize_tile(const gguf::Traits& traits, const uint8_t* tile, int64_t elements,
                              float* out);  // [16, elements]
    void gguf_pack_tile(const gguf::Traits& traits, const uint8_t* rows, int64_t elements, uint8_t* tile);)
#if defined(__x86_64__)
namespace avx512 {
void gguf_int8_tiles(const GgufProduct& product);  // gguf_int8_columns of tiled weights
}
#endif

}  // namespace ferrum::cpu
