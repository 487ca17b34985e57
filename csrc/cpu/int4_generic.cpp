// int4 kernels in portable C++, on the vectors of simd_generic.h.
#define FERRUM_LEVEL_GENERIC
#include "cpu/simd.h"

#include "common/int4.h"

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
  generic::for_vectors(count, [&](int64_t i, int64_t some) {
    generic::store_some(halves + i, generic::load_some(in + i, some), some);
  });
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
// Rows whose sums stay in 16 registers. Weights are unpacked again for each so many rows, in registers, if there are no
// more than kDirectRows; else once, into a tile of `Codes` in the first-level cache.
constexpr int64_t kRows = 2, kDirectRows = 4;
// Lines whose products with int4 codes fit an int16 lane: 4 lines * four products of at most 15 * 127 = 30480.
constexpr int64_t kLinesPerSum = 4;

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
// (f = 0, 1), f + 2 and f + 4 of rows 4 to 7 (f = 2, 3). The codes of int8 weights are less 128.
template <int kBits>
struct WordCodes {
  using Codes = Words;
  static constexpr int64_t kFields = 4;

  static Words unpack(const Group<kBits>& group, int64_t line, int64_t f, int64_t quad) {
    const uint8_t* from = group.codes + line * group.kLineBytes + 16 * quad + (kBits == 8 ? 64 * (f / 2) : 0);
    const int shift = static_cast<int>(8 * (f % 2) + (kBits == 4 ? 4 * (f / 2) : 0));
    using UnsignedWords = uint16_t __attribute__((vector_size(16)));
    const UnsignedWords codes = load_vector<UnsignedWords>(from) >> shift & static_cast<uint16_t>((1 << kBits) - 1);
    return kBits == 4 ? reinterpret_cast<Words>(codes) : reinterpret_cast<Words>(codes) - 128;
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

// Where a product takes a group's codes from: the packed weights, or a tile of them that it unpacked before.
template <typename Form, typename Group>
struct Packed {
  const Group& group;
  typename Form::Codes operator()(int64_t line, int64_t f, int64_t quad) const {
    return Form::unpack(group, line, f, quad);
  }
};

template <typename Form>
struct Unpacked {
  alignas(64) typename Form::Codes codes[kMaxLines][Form::kFields][kQuads];

  template <typename Group>
  void fill(const Group& group) {
    for (int64_t line = 0; line < group.lines; ++line) {
      for (int64_t f = 0; f < Form::kFields; ++f) {
        for (int64_t q = 0; q < kQuads; ++q) {
          codes[line][f][q] = Form::unpack(group, line, f, q);
        }
      }
    }
  }
  typename Form::Codes operator()(int64_t line, int64_t f, int64_t quad) const { return codes[line][f][quad]; }
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
  // Field f of a line for all columns.
  template <int F>
  Words field(int64_t line) const {
    const Ints fields = reinterpret_cast<Ints>(lines[line]);
    return reinterpret_cast<Words>(shuffle<F, F, F, F>(fields, fields));
  }
};

// Adds both words of each lane to the 32-bit sums, and begins anew.
template <int R>
inline void widen_sums(Words (*sums)[kQuads], Ints (*dots)[kQuads]) {
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t q = 0; q < kQuads; ++q) {
      const Ints pairs = reinterpret_cast<Ints>(sums[r][q]);
      dots[r][q] += (pairs << 16 >> 16) + (pairs >> 16);
      sums[r][q] = Words{};
    }
  }
}

template <int R, int F, typename Codes>
inline void multiply_field(const Codes& codes, const WordRow* x, int64_t line, Words (*sums)[kQuads]) {
  Words field[R];
  for (int64_t r = 0; r < R; ++r) {
    field[r] = x[r].template field<F>(line);
  }
  for (int64_t q = 0; q < kQuads; ++q) {
    const Words code = codes(line, F, q);
    for (int64_t r = 0; r < R; ++r) {
      sums[r][q] += code * field[r];
    }
  }
}

// out += one group of R rows times one tile.
template <int kBits, int R, typename Codes>
void int8_group(const Group<kBits>& group, const Codes& codes, const WordRow* x, int64_t g, float* out) {
  Ints dots[R][kQuads] = {};
  for (int64_t first = 0; first < group.lines; first += kLinesPerSum) {
    const int64_t end = smaller(first + kLinesPerSum, group.lines);
    Words sums[R][kQuads] = {};
    for (int64_t line = first; line < end; ++line) {
      multiply_field<R, 0>(codes, x, line, sums);
      multiply_field<R, 1>(codes, x, line, sums);
      if constexpr (kBits == 8) {  // two products of at most 128 * 127 fill a lane
        widen_sums<R>(sums, dots);
      }
      multiply_field<R, 2>(codes, x, line, sums);
      multiply_field<R, 3>(codes, x, line, sums);
      if constexpr (kBits == 8) {
        widen_sums<R>(sums, dots);
      }
    }
    if constexpr (kBits == 4) {
      widen_sums<R>(sums, dots);
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t q = 0; q < kQuads; ++q) {
      // Both integers are below 2^24: their difference is exact in fp32.
      Floats dot = __builtin_convertvector(dots[r][q], Floats);
      dot = kBits == 4 ? dot - group.zeros[q] * x[r].sum : dot;
      add_quad(out + r * kPanelColumns + 4 * q, g, dot, group.scales[q] * x[r].scale);
    }
  }
}

// out += one group of R rows kept in fp32 times one tile; `values` are the rows' of the group.
template <int kBits, int R, typename Codes>
void full_group(const Group<kBits>& group, const Codes& codes, const float* const* values, int64_t g, float* out) {
  Floats dots[R][kQuads] = {};
  for (int64_t line = 0; line < group.lines; ++line) {
#pragma GCC unroll 8
    for (int64_t f = 0; f < kLineRows; ++f) {
      Floats value[R];
      for (int64_t r = 0; r < R; ++r) {
        value[r] = all(values[r][line * kLineRows + f]);
      }
      for (int64_t q = 0; q < kQuads; ++q) {
        const Floats code = codes(line, f, q);
        for (int64_t r = 0; r < R; ++r) {
          dots[r][q] = multiply_add(code, value[r], dots[r][q]);
        }
      }
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t q = 0; q < kQuads; ++q) {
      add_quad(out + r * kPanelColumns + 4 * q, g, dots[r][q], group.scales[q]);
    }
  }
}

template <int R>
struct Count {
  static constexpr int value = R;
};

// Calls start_group(g), then multiply(group, codes, g, t, r, Count<R>) for every tile and block of R rows.
template <typename Form, int kBits, typename Start, typename Multiply>
inline void for_each_block(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles, int64_t num_rows,
                    const Start& start_group, const Multiply& multiply) {
  Unpacked<Form> unpacked;
  const auto for_rows = [&](const Group<kBits>& group, const auto& codes, int64_t g, int64_t t) {
    int64_t r = 0;
    for (; r + kRows <= num_rows; r += kRows) {
      multiply(group, codes, g, t, r, Count<kRows>{});
    }
    if (r < num_rows) {
      multiply(group, codes, g, t, r, Count<1>{});
    }
  };
  for (int64_t g = 0; g < w.groups; ++g) {
    start_group(g);
    for (int64_t t = 0; t < num_tiles; ++t) {
      const Group<kBits> group(w, first_tile + t * tile_step, g);
      if (num_rows <= kDirectRows) {
        for_rows(group, Packed<Form, Group<kBits>>{group}, g, t);
      } else {
        unpacked.fill(group);
        for_rows(group, unpacked, g, t);
      }
    }
  }
}

template <int kBits>
void by_int8(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const uint8_t*, float* out) {
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
  for_each_block<WordCodes<kBits>, kBits>(
      w, first_tile, tile_step, num_tiles, num_rows, start_group,
      [&](const auto& group, const auto& codes, int64_t g, int64_t t, int64_t r, auto count) {
        float* to = out + r * kPanelColumns + t * tile_step * kTileColumns;
        int8_group<kBits, count.value>(group, codes, x + r, g, to);
      });
}

template <int kBits>
void by_full(const PackedWeights& w, int64_t first_tile, int64_t tile_step, int64_t num_tiles,
             const ActivationRows& rows, const int32_t* row_ids, int64_t num_rows, const uint8_t*, float* out) {
  const float* x[kRowBlock];
  const auto start_group = [&](int64_t g) {
    for (int64_t r = 0; r < num_rows; ++r) {
      x[r] = rows.values + row_ids[r] * rows.packed_rows + g * w.group_lines * kLineRows;
    }
  };
  for_each_block<FloatCodes<kBits>, kBits>(
      w, first_tile, tile_step, num_tiles, num_rows, start_group,
      [&](const auto& group, const auto& codes, int64_t g, int64_t t, int64_t r, auto count) {
        float* to = out + r * kPanelColumns + t * tile_step * kTileColumns;
        full_group<kBits, count.value>(group, codes, x + r, g, to);
      });
}

}  // namespace

const Int4Kernels& int4_kernels_generic() {
  static const Int4Kernels kernels{by_int8<4>, by_full<4>,   by_int8<8>,     by_full<8>, to_float,
                                   from_float, quantize_row, silu_mul_tiles, add_scaled};
  return kernels;
}

}  // namespace ferrum::cpu
