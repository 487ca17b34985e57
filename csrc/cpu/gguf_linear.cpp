// gguf_linear on the CPU: checks, preparation of the activations, and the split of the work over the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/allocate.h"
#include "cpu/decoder.h"
#include "cpu/gguf_activations.h"

namespace ferrum::cpu {
namespace {

constexpr const char* kOp = "gguf_linear";

// One of the matrices that stand side by side, and where its columns begin.
struct Part {
  GgufWeights weights;
  const GgufRows* activations;
  int64_t column, panels;
};

struct Linear {
  FloatType type;
  int64_t rows, in_features, out_features;
  const char* x;
  const float* bias;  // fp32 or nullptr
  char* out;
  bool int8;
};

void prepare(const Linear& p, const GgufRows& activations) {
  const Int4Kernels& kernels = int4_kernels();
  const int64_t row_bytes = p.in_features * float_bytes(p.type);
  torch::stable::parallel_for(0, p.rows, std::max<int64_t>(1, 16384 / p.in_features), [&](int64_t begin, int64_t end) {
    const Scratch<float> staging(activations.staging());
    for (int64_t r = begin; r < end; ++r) {
      activations.fill(kernels, r, p.x + r * row_bytes, p.type, staging.get());
    }
  });
}

// One task is a panel of 64 columns for a block of rows. `next` is where the weights of the task after it begin.
void multiply_panel(const Linear& p, const Part& part, int64_t panel_index, int64_t first_row, int64_t rows,
                    const uint8_t* next) {
  alignas(64) float panel[kGgufRowBlock * kGgufPanel];
  int32_t row_ids[kGgufRowBlock];
  for (int64_t r = 0; r < rows; ++r) {
    row_ids[r] = static_cast<int32_t>(first_row + r);
  }
  const int64_t first = panel_index * kGgufPanel;
  const int64_t columns = std::min(kGgufPanel, part.weights.rows - first);
  gguf_kernel(p.int8)({part.weights, first, columns, part.activations->view(), row_ids, rows, kGgufTile, next, panel});
  const int64_t column = part.column + first;
  const auto from_float = int4_kernels().from_float;
  for (int64_t r = 0; r < rows; ++r) {
    float* values = panel + r * kGgufPanel;
    for (int64_t c = 0; p.bias != nullptr && c < columns; ++c) {
      values[c] += p.bias[column + c];
    }
    from_float(values, columns, p.type, p.out + ((first_row + r) * p.out_features + column) * float_bytes(p.type));
  }
}

// A panel of one of the parts.
struct Panel {
  const Part* part;
  int64_t index;

  const uint8_t* weights() const { return part->weights.at(index * kGgufPanel); }
};

Panel find_panel(const std::vector<Part>& parts, int64_t panel) {
  size_t i = 0;
  for (; panel >= parts[i].panels; ++i) {
    panel -= parts[i].panels;
  }
  return {&parts[i], panel};
}

void multiply(const Linear& p, const std::vector<Part>& parts) {
  int64_t panels = 0, bytes = 0;
  for (const Part& part : parts) {
    panels += part.panels;
    bytes += part.weights.bytes();
  }
  const int64_t blocks = (p.rows + kGgufRowBlock - 1) / kGgufRowBlock;
  // A task smaller than about 10 us is not worth waking a thread for.
  const int64_t work = std::max<int64_t>(1, bytes / panels * std::min(p.rows, kGgufRowBlock));
  const int64_t grain = std::max<int64_t>(1, 131072 / work);
  torch::stable::parallel_for(0, panels * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Panel panel = find_panel(parts, task / blocks);
      const uint8_t* next = task + 1 < end ? find_panel(parts, (task + 1) / blocks).weights() : nullptr;
      const int64_t block = task % blocks, first_row = p.rows * block / blocks;  // blocks as equal as can be
      multiply_panel(p, *panel.part, panel.index, first_row, p.rows * (block + 1) / blocks - first_row, next);
    }
  });
}

// The out-features of all parts together.
int64_t check_linear(const Tensor& x, const std::vector<Tensor>& blocks, const std::vector<int64_t>& types,
                     const std::optional<Tensor>& bias) {
  check_activation(kOp, "x", x);
  FERRUM_CHECK(x.dim() >= 1, kOp, "x", "expected at least 1 dimension, got 0");
  check_contiguous(kOp, "x", x);
  FERRUM_CHECK(!blocks.empty(), kOp, "blocks", "expected at least 1 tensor, got 0");
  FERRUM_CHECK(types.size() == blocks.size(), kOp, "types", "expected one for each of ", blocks.size(),
               " tensors, got ", types.size());
  int64_t out_features = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const GgufFormat format = check_gguf_quantized(kOp, "types", types[i]);
    const int64_t line_bytes = gguf_line_bytes(kOp, "x", format, x.size(x.dim() - 1));
    check_gguf_bytes(kOp, "blocks", blocks[i]);
    check_shape(kOp, "blocks", blocks[i], {-1, line_bytes});
    FERRUM_CHECK(blocks[i].size(0) >= 1, kOp, "blocks", "expected at least 1 row, got shape ", shape_string(blocks[i]));
    out_features += blocks[i].size(0) * format.line_rows();
  }
  if (bias) {
    check_activation(kOp, "bias", *bias);
    check_shape(kOp, "bias", *bias, {out_features});
    check_contiguous(kOp, "bias", *bias);
  }
  return out_features;
}

}  // namespace

Tensor gguf_linear(const Tensor& x, std::vector<Tensor> blocks, std::vector<int64_t> types, std::optional<Tensor> bias,
                   std::string activation) {
  const bool int8 = check_int8_activation(kOp, activation);
  const int64_t out_features = check_linear(x, blocks, types, bias);
  const int64_t in_features = x.size(x.dim() - 1);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor out = allocate(x, shape);
  const int64_t rows = x.numel() / in_features;
  if (rows == 0) {
    return out;
  }
  const Scratch<float> bias_values(bias ? out_features : 0);
  if (bias) {
    int4_kernels().to_float(bias->const_data_ptr(), float_type(*bias), out_features, bias_values.get());
  }
  const Linear problem{float_type(x),           rows, in_features, out_features, data<char>(x), bias_values.get(),
                       mutable_data<char>(out), int8};
  std::unique_ptr<GgufRows> prepared[2];  // for blocks of 32 and of 256
  std::vector<Part> parts;
  int64_t column = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const GgufFormat format = check_gguf_quantized(kOp, "types", types[i]);
    const gguf::Traits& traits = *format.traits;
    std::unique_ptr<GgufRows>& mine = prepared[int8 && traits.elements == gguf::kChunk];
    if (!mine) {
      mine = std::make_unique<GgufRows>(GgufLayout(int8, traits, in_features), rows);
      prepare(problem, *mine);
    }
    const int64_t columns = blocks[i].size(0) * format.line_rows();
    const GgufWeights weights{&traits, data<uint8_t>(blocks[i]), columns, in_features, format.tiled};
    parts.push_back({weights, mine.get(), column, (columns + kGgufPanel - 1) / kGgufPanel});
    column += columns;
  }
  multiply(problem, parts);
  return out;
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) { m.impl("gguf_linear", TORCH_BOX(&gguf_linear)); }

}  // namespace
}  // namespace ferrum::cpu
