// int4_linear and int8_linear on the CPU: checks, preparation of the activations, and the split of the work over the
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "cpu/allocate.h"
#include "cpu/int4_args.h"

namespace ferrum::cpu {
namespace {

struct Linear {
  const Int4Kernels& kernels;
  TileKernel multiply_tiles;
  PackedWeights weights;
  ActivationLayout layout;
  FloatType type;
  int64_t rows, in_features, out_features;
  const char* x;
  const int32_t* perm;
  const float* bias;  // fp32 or nullptr
  char* out;
};

// Converts and, for int8, quantises every row. Returns false for a bad entry of perm.
bool prepare_rows(const Linear& p, const ActivationBuffer& activations) {
  std::atomic<bool> valid{true};
  const int64_t rows_per_task = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.layout.packed_rows));
  torch::stable::parallel_for(0, p.rows, rows_per_task, [&](int64_t begin, int64_t end) {
    Scratch<float> staging(p.in_features + p.layout.packed_rows);
    float* row = staging.get();
    for (int64_t r = begin; r < end; ++r) {
      p.kernels.to_float(p.x + r * p.in_features * float_bytes(p.type), p.type, p.in_features, row);
      if (!activations.fill(p.kernels, r, row, p.in_features, p.perm, row + p.in_features)) {
        valid = false;
      }
    }
  });
  return valid;
}

void add_bias(const float* bias, int64_t rows, int64_t columns, float* panel) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      panel[r * kPanelColumns + c] += bias[c];
    }
  }
}

// One task is one panel of 64 columns for one block of rows. The blocks of a panel follow each other: its weights wait
// in the second-level cache, and a thread's run of tasks is even work even if the last block is short.
void multiply(const Linear& p, const ActivationRows& activations) {
  const int64_t tiles = int4::ceil_div(p.out_features, int4::kTileColumns);
  const int64_t blocks = int4::ceil_div(p.rows, kRowBlock);
  const int64_t tasks = int4::ceil_div(tiles, kPanelTiles) * blocks;
  const int64_t element = float_bytes(p.type);
  // A task smaller than about 10 us is not worth waking a thread for.
  const int64_t work = std::min(p.rows, kRowBlock) * p.weights.lines;
  const int64_t grain = std::max<int64_t>(1, 2048 / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float panel[kRowBlock * kPanelColumns];
    int32_t row_ids[kRowBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task / blocks * kPanelTiles;
      const int64_t block = task % blocks;
      const int64_t first_row = p.rows * block / blocks;
      const int64_t rows = p.rows * (block + 1) / blocks - first_row;
      const int64_t column = tile * int4::kTileColumns;
      const int64_t columns = std::min(kPanelColumns, p.out_features - column);
      for (int64_t r = 0; r < rows; ++r) {
        row_ids[r] = static_cast<int32_t>(first_row + r);
      }
      const TileStart next = p.weights.tile(block + 1 < blocks ? tile : tile + kPanelTiles);
      p.multiply_tiles(p.weights, tile, 1, std::min(kPanelTiles, tiles - tile), activations, row_ids, rows, next,
                       panel);
      if (p.bias) {
        add_bias(p.bias + column, rows, columns, panel);
      }
      for (int64_t r = 0; r < rows; ++r) {
        char* out = p.out + ((first_row + r) * p.out_features + column) * element;
        p.kernels.from_float(panel + r * kPanelColumns, columns, p.type, out);
      }
    }
  });
}

// The arguments of either op.
struct Arguments {
  const char* op;
  const Tensor& x;
  const Tensor& packed;
  const Tensor& scales;
  const std::optional<Tensor>& zeros;
  const std::optional<Tensor>& perm;
  const std::optional<Tensor>& bias;
  int64_t out_features, group_size;
  int64_t line_bytes;
};

void check_linear(const Arguments& a) {
  check_activation(a.op, "x", a.x);
  FERRUM_CHECK(a.x.dim() >= 1, a.op, "x", "expected at least 1 dimension, got 0");
  check_contiguous(a.op, "x", a.x);
  check_group_size(a.op, "group_size", a.group_size);
  FERRUM_CHECK(a.out_features >= 1, a.op, "out_features", "expected at least 1, got ", a.out_features);
  const int64_t in_features = a.x.size(a.x.dim() - 1);
  FERRUM_CHECK(in_features >= 1, a.op, "x", "expected at least 1 input channel, got shape ", shape_string(a.x));
  int64_t packed_rows = int4::round_up(in_features, int4::kLineRows);
  if (a.perm) {
    check_dtype(a.op, "perm", *a.perm, ScalarType::Int);
    FERRUM_CHECK(a.perm->dim() == 1 && a.perm->size(0) >= 1 && a.perm->size(0) % int4::kLineRows == 0, a.op, "perm",
                 "expected shape (K_packed), a multiple of 8, got ", shape_string(*a.perm));
    check_contiguous(a.op, "perm", *a.perm);
    packed_rows = a.perm->size(0);
  }
  check_packed({a.op, "packed", "scales", "zeros", a.line_bytes}, a.packed, a.scales, a.zeros, -1,
               int4::ceil_div(a.out_features, int4::kTileColumns), packed_rows / int4::kLineRows, a.group_size);
  if (a.bias) {
    check_activation(a.op, "bias", *a.bias);
    check_shape(a.op, "bias", *a.bias, {a.out_features});
    check_contiguous(a.op, "bias", *a.bias);
  }
}

Tensor linear(const Arguments& a, bool int8_activations, TileKernel multiply_tiles) {
  check_linear(a);
  const int64_t in_features = a.x.size(a.x.dim() - 1);
  std::vector<int64_t> shape(a.x.sizes().begin(), a.x.sizes().end());
  shape.back() = a.out_features;
  Tensor out = allocate(a.x, shape);
  const int64_t rows = a.x.numel() / in_features;
  if (rows == 0) {
    return out;
  }
  const Int4Kernels& kernels = int4_kernels();
  Scratch<float> bias_values(a.bias ? a.out_features : 0);
  if (a.bias) {
    kernels.to_float(a.bias->const_data_ptr(), float_type(*a.bias), a.out_features, bias_values.get());
  }
  const int64_t lines = a.packed.size(1);
  const Linear problem{
      kernels,
      multiply_tiles,
      packed_weights(a.packed, a.scales, a.zeros, 0, a.packed.size(0), lines, a.group_size, a.line_bytes),
      {int8_activations, lines * int4::kLineRows, a.group_size},
      float_type(a.x),
      rows,
      in_features,
      a.out_features,
      data<char>(a.x),
      a.perm ? data<int32_t>(*a.perm) : nullptr,
      bias_values.get(),
      mutable_data<char>(out)};
  const ActivationBuffer activations(problem.layout, rows);
  const bool valid = prepare_rows(problem, activations);
  FERRUM_CHECK(valid, a.op, "perm", "expected entries from -1 to ", in_features - 1, ", got one outside");
  multiply(problem, activations.view());
  return out;
}

}  // namespace

Tensor int4_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, std::optional<Tensor> zeros,
                   std::optional<Tensor> perm, std::optional<Tensor> bias, int64_t out_features, int64_t group_size,
                   std::string activation) {
  constexpr const char* op = "int4_linear";
  const bool int8 = check_int8_activation(op, activation);
  const Int4Kernels& kernels = int4_kernels();
  return linear({op, x, packed, scales, zeros, perm, bias, out_features, group_size, int4::kLineBytes}, int8,
                int8 ? kernels.int4_by_int8 : kernels.int4_by_full);
}

namespace {

Tensor int8_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, std::optional<Tensor> bias,
                   int64_t out_features, int64_t group_size, std::string activation) {
  constexpr const char* op = "int8_linear";
  const bool int8 = check_int8_activation(op, activation);
  const Int4Kernels& kernels = int4_kernels();
  const std::optional<Tensor> none;
  return linear({op, x, packed, scales, none, none, bias, out_features, group_size, int4::kInt8LineBytes}, int8,
                int8 ? kernels.int8_by_int8 : kernels.int8_by_full);
}

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
}

}  // namespace
}  // namespace ferrum::cpu
