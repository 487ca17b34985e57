// int4_pack and int4_unpack: GPTQ's qweight to the layout of common/int4.h, and back.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "checks/tensor.h"
#include "common/int4.h"
#include "cpu/allocate.h"

namespace ferrum::cpu {
namespace {

using int4::kLineBytes;
using int4::kLineRows;
using int4::kTileColumns;

// Lines handled together: 512 bytes of each tile are written at a time, and eight rows of qweight read side by side.
constexpr int64_t kLinesPerTask = 8;
// Bytes below which another thread does not pay.
constexpr int64_t kTaskBytes = 1 << 20;

// The four nibbles of a 16-bit value in the low halves of four bytes, and back.
inline uint32_t spread_nibbles(uint32_t x) {
  x = (x | x << 8) & 0x00ff00ffu;
  return (x | x << 4) & 0x0f0f0f0fu;
}
inline uint32_t gather_nibbles(uint32_t x) {
  x = (x | x >> 4) & 0x00ff00ffu;
  return (x | x >> 8) & 0x0000ffffu;
}

struct PackShape {
  int64_t in_features, packed_rows, out_features;
  int64_t lines() const { return packed_rows / kLineRows; }
  int64_t tiles() const { return int4::ceil_div(out_features, kTileColumns); }
};

// One line of one tile from the on-disk words of the same eight rows. `keep` masks rows behind in_features.
inline void pack_line(const uint32_t* words, int64_t columns, uint32_t keep, uint8_t* line) {
  uint32_t out[kTileColumns] = {};
  for (int64_t c = 0; c < columns; ++c) {
    const uint32_t word = words[c] & keep;
    out[c] = spread_nibbles(word & 0xffffu) | spread_nibbles(word >> 16) << 4;
  }
  std::memcpy(line, out, kLineBytes);
}

// One line of one tile whose row j is on-disk row perm[j].
inline void pack_permuted_line(const uint32_t* qweight, int64_t out_features, const int32_t* perm, int64_t columns,
                               uint8_t* line) {
  uint32_t out[kTileColumns] = {};
  for (int64_t j = 0; j < kLineRows; ++j) {
    if (perm[j] < 0) {
      continue;
    }
    const uint32_t* words = qweight + perm[j] / kLineRows * out_features;
    const int shift = 4 * (perm[j] % kLineRows);
    const int to = static_cast<int>(j < 4 ? 8 * j : 8 * (j - 4) + 4);
    for (int64_t c = 0; c < columns; ++c) {
      out[c] |= (words[c] >> shift & 15u) << to;
    }
  }
  std::memcpy(line, out, kLineBytes);
}

void pack_lines(const PackShape& shape, const uint32_t* qweight, const int32_t* perm, int64_t begin, int64_t end,
                uint8_t* packed) {
  for (int64_t tile = 0; tile < shape.tiles(); ++tile) {
    const int64_t column = tile * kTileColumns;
    const int64_t columns = std::min(kTileColumns, shape.out_features - column);
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* line = packed + (tile * shape.lines() + i) * kLineBytes;
      if (perm) {
        pack_permuted_line(qweight + column, shape.out_features, perm + i * kLineRows, columns, line);
        continue;
      }
      const int64_t rows = std::min(kLineRows, shape.in_features - i * kLineRows);
      const uint32_t keep = rows == kLineRows ? ~0u : (1u << 4 * rows) - 1u;
      pack_line(qweight + i * shape.out_features + column, columns, keep, line);
    }
  }
}

void unpack_lines(const PackShape& shape, const uint8_t* packed, int64_t begin, int64_t end, uint32_t* qweight) {
  for (int64_t tile = 0; tile < shape.tiles(); ++tile) {
    const int64_t column = tile * kTileColumns;
    const int64_t columns = std::min(kTileColumns, shape.out_features - column);
    for (int64_t i = begin; i < end; ++i) {
      uint32_t line[kTileColumns];
      std::memcpy(line, packed + (tile * shape.lines() + i) * kLineBytes, kLineBytes);
      for (int64_t c = 0; c < columns; ++c) {
        qweight[i * shape.out_features + column + c] =
            gather_nibbles(line[c] & 0x0f0f0f0fu) | gather_nibbles(line[c] >> 4 & 0x0f0f0f0fu) << 16;
      }
    }
  }
}

// Columns of one tile, every row to where perm says. `qweight` is zero on entry.
void unpack_permuted_tile(const PackShape& shape, const uint8_t* packed, const int32_t* perm, int64_t tile,
                          uint32_t* qweight) {
  const int64_t column = tile * kTileColumns;
  const int64_t columns = std::min(kTileColumns, shape.out_features - column);
  for (int64_t k = 0; k < shape.packed_rows; ++k) {
    if (perm[k] < 0) {
      continue;
    }
    const uint8_t* line = packed + (tile * shape.lines() + k / kLineRows) * kLineBytes;
    const int64_t j = k % kLineRows;
    uint32_t* words = qweight + perm[k] / kLineRows * shape.out_features + column;
    for (int64_t c = 0; c < columns; ++c) {
      const uint32_t byte = line[4 * c + j % 4];
      words[c] |= (j < 4 ? byte & 15u : byte >> 4) << 4 * (perm[k] % kLineRows);
    }
  }
}

// K_packed: the length of perm, or in_features rounded up to a whole line.
int64_t check_perm(const char* op, const std::optional<Tensor>& perm, int64_t in_features) {
  FERRUM_CHECK(in_features >= 1, op, "in_features", "expected at least 1, got ", in_features);
  if (!perm) {
    return int4::round_up(in_features, kLineRows);
  }
  check_dtype(op, "perm", *perm, ScalarType::Int);
  FERRUM_CHECK(perm->dim() == 1 && perm->size(0) >= 1 && perm->size(0) % kLineRows == 0, op, "perm",
               "expected shape (K_packed), a multiple of 8, got ", shape_string(*perm));
  check_contiguous(op, "perm", *perm);
  const int32_t* entries = data<int32_t>(*perm);
  for (int64_t k = 0; k < perm->size(0); ++k) {
    FERRUM_CHECK(entries[k] >= -1 && entries[k] < in_features, op, "perm", "expected entries from -1 to ",
                 in_features - 1, ", got ", entries[k], " at ", k);
  }
  return perm->size(0);
}

Tensor int4_pack(const Tensor& qweight, std::optional<Tensor> perm, int64_t in_features) {
  constexpr const char* op = "int4_pack";
  check_dtype(op, "qweight", qweight, ScalarType::Int);
  const int64_t packed_rows = check_perm(op, perm, in_features);
  check_shape(op, "qweight", qweight, {int4::ceil_div(in_features, kLineRows), -1});
  check_contiguous(op, "qweight", qweight);
  const PackShape shape{in_features, packed_rows, qweight.size(1)};
  FERRUM_CHECK(shape.out_features >= 1, op, "qweight", "expected at least 1 column, got shape ", shape_string(qweight));
  Tensor packed = allocate(qweight, {shape.tiles(), shape.lines(), kLineBytes}, ScalarType::Byte);
  const uint32_t* words = data<uint32_t>(qweight);
  const int32_t* entries = perm ? data<int32_t>(*perm) : nullptr;
  uint8_t* out = mutable_data<uint8_t>(packed);
  const int64_t task_bytes = kLinesPerTask * kLineBytes * shape.tiles();
  torch::stable::parallel_for(0, int4::ceil_div(shape.lines(), kLinesPerTask),
                              std::max<int64_t>(1, kTaskBytes / task_bytes), [&](int64_t begin, int64_t end) {
                                for (int64_t task = begin; task < end; ++task) {
                                  const int64_t first = task * kLinesPerTask;
                                  const int64_t last = std::min(shape.lines(), first + kLinesPerTask);
                                  pack_lines(shape, words, entries, first, last, out);
                                }
                              });
  return packed;
}

Tensor int4_unpack(const Tensor& packed, std::optional<Tensor> perm, int64_t in_features, int64_t out_features) {
  constexpr const char* op = "int4_unpack";
  check_dtype(op, "packed", packed, ScalarType::Byte);
  FERRUM_CHECK(out_features >= 1, op, "out_features", "expected at least 1, got ", out_features);
  const PackShape shape{in_features, check_perm(op, perm, in_features), out_features};
  check_shape(op, "packed", packed, {shape.tiles(), shape.lines(), kLineBytes});
  check_contiguous(op, "packed", packed);
  const int64_t words = int4::ceil_div(in_features, kLineRows);
  const uint8_t* in = data<uint8_t>(packed);
  if (perm) {
    Tensor qweight = torch::stable::new_zeros(packed, {words, out_features}, ScalarType::Int);
    uint32_t* out = mutable_data<uint32_t>(qweight);
    const int32_t* entries = data<int32_t>(*perm);
    torch::stable::parallel_for(0, shape.tiles(), std::max<int64_t>(1, kTaskBytes / (shape.lines() * kLineBytes)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t tile = begin; tile < end; ++tile) {
                                    unpack_permuted_tile(shape, in, entries, tile, out);
                                  }
                                });
    return qweight;
  }
  Tensor qweight = allocate(packed, {words, out_features}, ScalarType::Int);
  uint32_t* out = mutable_data<uint32_t>(qweight);
  const int64_t task_bytes = kLinesPerTask * kLineBytes * shape.tiles();
  torch::stable::parallel_for(0, int4::ceil_div(shape.lines(), kLinesPerTask),
                              std::max<int64_t>(1, kTaskBytes / task_bytes), [&](int64_t begin, int64_t end) {
                                for (int64_t task = begin; task < end; ++task) {
                                  const int64_t first = task * kLinesPerTask;
                                  unpack_lines(shape, in, first, std::min(shape.lines(), first + kLinesPerTask), out);
                                }
                              });
  return qweight;
}

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("int4_pack", TORCH_BOX(&int4_pack));
  m.impl("int4_unpack", TORCH_BOX(&int4_unpack));
}

}  // namespace
}  // namespace ferrum::cpu
