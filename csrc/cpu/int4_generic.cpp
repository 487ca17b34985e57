// int4 kernels in portable C++, on the vectors of simd_generic.h.
#define FERRUM_LEVEL_GENERIC
#include "common/int4.h"
#include "cpu/simd.h"

namespace ferrum::cpu {
namespace {

void halves_to_floats(const uint16_t* in, int64_t count, float* out) {
  const auto* halves = reinterpret_cast<const Half*>(in);
  generic::for_vectors(count, [&](int64_t i, int64_t some) {
    generic::store_some(out + i, generic::load_some(halves + i, some), some);
  });
}

void floats_to_halves(const float* in, int64_t count, uint16_t* out) {
  auto* halves = reinterpret_cast<Half*>(out);
  generic::for_vectors(
      count, [&](int64_t i, int64_t some) { generic::store_some(halves + i, generic::load_some(in + i, some), some); });
}

}  // namespace
}  // namespace ferrum::cpu

#include "cpu/int4_rows.h"

namespace ferrum::cpu {
namespace {

using generic::all;
using generic::Bits;
using generic::Floats;
using generic::Ints;
using generic::load_vector;
using generic::multiply_add;
using generic::shuffle;
using generic::smaller;
using generic::store_vector;
using int4::kLineRows;
using int4::kMaxGroupSize;
using int4::kTileColumns;
using Words = int16_t __attribute__((vector_size(16)));

constexpr int64_t kQuads = kTileColumns / 4;  // of columns, one vector of 32-bit lanes each
constexpr int64_t kMaxLines = kMaxGroupSize / kLineRows;
// Lines whose products with int4 codes fit an int16 lane: 8 lines * four products of at most 8 * 127 = 32512.
constexpr int64_t kLinesPerSum = 8;

// One group of one tile.
template <int kBits>
struct Group {
  static constexpr int64_t kLineBytes = kLineRows * kTileColumns * kBits / 8;
  const uint8_t* codes;
  int64_t lines;
  Floats scales[kQuads], zeros[kQuads];

  Group(const PackedWeights& w, int64_t tile, int64_t group) {
    const int64_t first_line = group * w.group_lines;
    const int64_t at = (tile * w.groups + group) * kTileColumns;
    codes = w.codes + (tile * w.lines + first_line) * kLineBytes;
    lines = smaller(w.lines - first_line, w.group_lines);
    float zero[kTileColumns];
    for (int64_t c = 0; c < kTileColumns; ++c) {
      zero[c] = w.zeros ? static_cast<float>(w.zeros[at + c]) : static_cast<float>(1 << (kBits - 1));
    }
    const generic::Vec scale = generic::load(reinterpret_cast<const Half*>(w.scales + at));
    for (int64_t q = 0; q < kQuads; ++q) {
      scales[q] = scale.v[q];
      zeros[q] = load_vector<Floats>(zero + 4 * q);
    }
  }
};

// What int8 activations are multiplied by: field f of a line holds two rows of each column, f and f + 2 of rows 0 to 3
// (f = 0, 1), f + 2 and f + 4 of rows 4 to 7 (f = 2, 3). Codes are made signed, less 8 or 128.
template <int kBits>
struct WordCodes {
  using Codes = Words;
  static constexpr int64_t kFields = 4;

  static Words unpack(const Group<kBits>& group, int64_t line, int64_t f, int64_t quad) {
    const uint8_t* from = group.codes + line * group.kLineBytes + 16 * quad + (kBits == 8 ? 64 * (f / 2) : 0);
    const int first_bit = static_cast<int>(8 * (f % 2) + (kBits == 4 ? 4 * (f / 2) : 0));
    const Words with_signs = load_vector<Words>(from) ^ static_cast<int16_t>(kBits == 4 ? 0x8888 : 0x8080);
    return with_signs << (16 - kBits - first_bit) >> (16 - kBits);
  }
};

// What activations in fp32 are multiplied by: row f of a line, less the zero points.
template <int kBits>
struct FloatCodes {
  using Codes = Floats;
  static constexpr int64_t kFields = kLineRows;

  static Floats unpack(const Group<kBits>& group, int64_t line, int64_t f, int64_t quad) {
    const uint8_t* from = group.codes + line * group.kLineBytes + 16 * quad + (kBits == 8 ? 64 * (f / 4) : 0);
    const int shift = static_cast<int>(8 * (f % 4) + (kBits == 4 ? 4 * (f / 4) : 0));
    const Bits codes = load_vector<Bits>(from) >> shift & ((1u << kBits) - 1u);
    return __builtin_convertvector(reinterpret_cast<Ints>(codes), Floats) - group.zeros[quad];
  }
};

// The codes of a group, unpacked once for all rows: the tile stays in the first-level cache.
template <typename Form>
struct Tile {
  alignas(64) typename Form::Codes codes[kMaxLines * Form::kFields][kQuads];

  template <typename Group>
  void fill(const Group& group) {
    for (int64_t line = 0; line < group.lines; ++line) {
#pragma GCC unroll 8
      for (int64_t f = 0; f < Form::kFields; ++f) {
        for (int64_t q = 0; q < kQuads; ++q) {
          codes[line * Form::kFields + f][q] = Form::unpack(group, line, f, q);
        }
      }
    }
  }
};

// A row of a panel: adds one quad of a group's products, times their scales.
inline void add_quad(float* out, int64_t group, Floats dot, Floats scale) {
  const Floats sum = group == 0 ? all(0.0f) : load_vector<Floats>(out);
  store_vector(out, sum + dot * scale);
}

// A group of int8 activations as words, in the order of WordCodes: field f of a line is 32-bit lane f.
struct WordRow {
  Words lines[kMaxLines];
  float scale, sum;

  void fill(const int8_t* codes, int64_t count) {
    for (int64_t i = 0; i < count; i += 2) {
      Words bytes = {};
      __builtin_memcpy(&bytes, codes + i * kLineRows, static_cast<size_t>(smaller(2, count - i) * kLineRows));
      const Ints even = reinterpret_cast<Ints>(bytes << 8 >> 8), odd = reinterpret_cast<Ints>(bytes >> 8);
      lines[i] = reinterpret_cast<Words>(shuffle<0, 4, 1, 5>(even, odd));
      lines[i + 1] = reinterpret_cast<Words>(shuffle<2, 6, 3, 7>(even, odd));
    }
  }
};

// Adds both words of each lane to the 32-bit sums, and begins anew.
inline void widen_sums(Words* sums, Ints* dots) {
  for (int64_t q = 0; q < kQuads; ++q) {
    const Ints pairs = reinterpret_cast<Ints>(sums[q]);
    dots[q] += (pairs << 16 >> 16) + (pairs >> 16);
    sums[q] = Words{};
  }
}

template <int F>
inline void multiply_field(const Words (*line_codes)[kQuads], Words fields, Words* sums) {
  const Ints lanes = reinterpret_cast<Ints>(fields);
  const Words field = reinterpret_cast<Words>(shuffle<F, F, F, F>(lanes, lanes));
  for (int64_t q = 0; q < kQuads; ++q) {
    sums[q] += line_codes[F][q] * field;
  }
}

// out += one group of a row times one tile. A product reads its codes from the tile: with more rows at a time they
// would be copied between registers instead.
template <int kBits>
void int8_group(const Group<kBits>& group, const Tile<WordCodes<kBits>>& tile, const WordRow& x, int64_t g,
                float* out) {
  Ints dots[kQuads] = {};
  for (int64_t first = 0; first < group.lines; first += kLinesPerSum) {
    const int64_t end = smaller(first + kLinesPerSum, group.lines);
    Words sums[kQuads] = {};
    for (int64_t line = first; line < end; ++line) {
      const Words(*codes)[kQuads] = tile.codes + line * WordCodes<kBits>::kFields;
      multiply_field<0>(codes, x.lines[line], sums);
      multiply_field<1>(codes, x.lines[line], sums);
      if constexpr (kBits == 8) {  // two products of at most 128 * 127 fill a lane
        widen_sums(sums, dots);
      }
      multiply_field<2>(codes, x.lines[line], sums);
      multiply_field<3>(codes, x.lines[line], sums);
      if constexpr (kBits == 8) {
        widen_sums(sums, dots);
      }
    }
    if constexpr (kBits == 4) {
      widen_sums(sums, dots);
    }
  }
  for (int64_t q = 0; q < kQuads; ++q) {
    // Both integers are below 2^24: their difference is exact in fp32.
    Floats dot = __builtin_convertvector(dots[q], Floats);
    dot = kBits == 4 ? dot - (group.zeros[q] - 8.0f) * x.sum : dot;
    add_quad(out + 4 * q, g, dot, group.scales[q] * x.scale);
  }
}

// out += one group of R rows kept in fp32 times one tile; `values` are the rows' of the group.
template <int kBits, int R>
void full_group(const Group<kBits>& group, const Tile<FloatCodes<kBits>>& tile, const float* const* values, int64_t g,
                float* out) {
  Floats dots[R][kQuads] = {};
  const float* row[R];
  for (int64_t r = 0; r < R; ++r) {
    row[r] = values[r];
  }
  for (int64_t k = 0; k < group.lines * kLineRows; ++k) {
    for (int64_t q = 0; q < kQuads; ++q) {
      for (int64_t r = 0; r < R; ++r) {
        dots[r][q] = multiply_add(tile.codes[k][q], all(row[r][k]), dots[r][q]);
      }
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t q = 0; q < kQuads; ++q) {
      add_quad(out + r * kPanelColumns + 4 * q, g, dots[r][q], group.scales[q]);
    }
  }
}

// Calls start_group(g), then multiply(group, its tile, g, out of its tile) for every tile.
template <typename Form, int kBits, typename Start, typename Multiply>
inline void for_each_group(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
                           const Start& start_group, float* out, const Multiply& multiply) {
  Tile<Form> tile;
  for (int64_t g = 0; g < w.groups; ++g) {
    start_group(g);
    for (int64_t t = 0; t < num_tiles; ++t) {
      const Group<kBits> group(w, first_tile + t * tile_step, g);
      tile.fill(group);
      multiply(group, tile, g, out + t * tile_step * kTileColumns);
    }
  }
}

template <int kBits>
void by_int8(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const TileStart&, float* out) {
  WordRow x[kRowBlock];
  const auto start_group = [&](int64_t g) {
    const int64_t first = g * w.group_lines, lines = smaller(w.lines - first, w.group_lines);
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t row = row_ids[r], at = row * rows.groups + g;
      x[r].fill(rows.codes + row * rows.packed_rows + first * kLineRows, lines);
      x[r].scale = rows.scales[at];
      x[r].sum = static_cast<float>(rows.sums[at]);
    }
  };
  const auto multiply = [&](const auto& group, const auto& tile, int64_t g, float* to) {
    for (int64_t r = 0; r < num_rows; ++r) {
      int8_group<kBits>(group, tile, x[r], g, to + r * kPanelColumns);
    }
  };
  for_each_group<WordCodes<kBits>, kBits>(w, first_tile, tile_step, num_tiles, start_group, out, multiply);
}

template <int kBits>
void by_full(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const TileStart&, float* out) {
  const float* x[kRowBlock];
  const auto start_group = [&](int64_t g) {
    for (int64_t r = 0; r < num_rows; ++r) {
      x[r] = rows.values + row_ids[r] * rows.packed_rows + g * w.group_lines * kLineRows;
    }
  };
  const auto multiply = [&](const auto& group, const auto& tile, int64_t g, float* to) {
    int64_t r = 0;
    for (; r + 2 <= num_rows; r += 2) {  // their sums and factors fit 16 registers
      full_group<kBits, 2>(group, tile, x + r, g, to + r * kPanelColumns);
    }
    if (r < num_rows) {
      full_group<kBits, 1>(group, tile, x + r, g, to + r * kPanelColumns);
    }
  };
  for_each_group<FloatCodes<kBits>, kBits>(w, first_tile, tile_step, num_tiles, start_group, out, multiply);
}

}  // namespace

const Int4Kernels& int4_kernels_generic() {
  static const Int4Kernels kernels{by_int8<4>, by_full<4>,   by_int8<8>,     by_full<8>, to_float,
                                   from_float, quantize_row, silu_mul_tiles, add_scaled};
  return kernels;
}

}  // namespace ferrum::cpu
