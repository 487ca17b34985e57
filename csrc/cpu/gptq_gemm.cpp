// gptq_gemm on CPU: argument checks and the split into blocks of rows and
// columns.
#include "cpu/gptq_gemm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "checks/rows.h"
#include "cpu/allocate.h"
#include "cpu/gptq_args.h"

namespace ferrum::cpu {
namespace {

constexpr const char* kOp = "gptq_gemm";
// Weights one thread should at least work on: a few microseconds.
constexpr int64_t kGrain = 65536;

std::unique_ptr<float[]> pack_x(const Tensor& x, const RowLayout& layout) {
  const int64_t tiles = (layout.size + kGptqTileRows - 1) / kGptqTileRows;
  std::unique_ptr<float[]> packed(new float[tiles * layout.rows * kGptqTileRows]);
  const auto pack_row = FERRUM_FOR_LEVEL(gptq_pack_x);
  const Dtype dtype = activation_dtype(kOp, "x", x);
  const int64_t row_bytes = layout.stride * element_size(dtype);
  const char* from = data<char>(x);
  torch::stable::parallel_for(0, layout.rows, rows_per_task(layout.size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      pack_row(from + row * row_bytes, dtype, layout.size, row, layout.rows, packed.get());
    }
  });
  return packed;
}

void multiply(const GptqGemm& gemm) {
  const auto kernel = FERRUM_FOR_LEVEL(gptq_gemm_block);
  const int64_t row_blocks = (gemm.rows + kGptqBlockRows - 1) / kGptqBlockRows;
  const int64_t column_blocks = (gemm.out_features + kGptqBlockColumns - 1) / kGptqBlockColumns;
  const int64_t task = std::max<int64_t>(1, gemm.in_features * kGptqBlockColumns * std::min(gemm.rows, kGptqBlockRows));
  const int64_t grain = std::max<int64_t>(1, kGrain / task);
  torch::stable::parallel_for(0, column_blocks * row_blocks, grain, [&](int64_t begin, int64_t end) {
    // Zeros, because the lanes beyond the last column are computed on,
    // though never written out.
    const std::unique_ptr<float[]> scratch(new float[gptq_scratch_floats(gemm.groups)]());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % row_blocks * kGptqBlockRows;
      const int64_t row_end = std::min(gemm.rows, row + kGptqBlockRows);
      kernel(gemm, task / row_blocks * kGptqBlockColumns, row, row_end, scratch.get());
    }
  });
}

Tensor gptq_gemm(const Tensor& x, const Tensor& qweight, const Tensor& qzeros, const Tensor& scales,
                 const std::optional<Tensor>& g_idx, const std::optional<Tensor>& bias, int64_t bits,
                 int64_t zero_offset) {
  const GptqShape shape = check_gptq(kOp, qweight, qzeros, scales, g_idx, bits, zero_offset);
  const Dtype dtype = activation_dtype(kOp, "x", x);
  const RowLayout layout = row_layout(kOp, "x", x);
  FERRUM_CHECK(layout.size == shape.rows, kOp, "x", "expected last dimension ", shape.rows, ", got shape ",
               shape_string(x));
  GptqGemm gemm{};
  if (bias.has_value()) {
    gemm.bias_dtype = activation_dtype(kOp, "bias", *bias);
    check_shape(kOp, "bias", *bias, {shape.columns});
    check_contiguous(kOp, "bias", *bias);
    gemm.bias = bias->const_data_ptr();
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = shape.columns;
  Tensor out = allocate(x, sizes);
  if (out.numel() == 0) {
    return out;
  }
  std::vector<int32_t> regular;
  if (!g_idx.has_value()) {
    regular.resize(shape.rows);
    for (int64_t k = 0; k < shape.rows; ++k) {
      regular[k] = static_cast<int32_t>(k / (shape.rows / shape.groups));
    }
  }
  gemm.qweight = data<int32_t>(qweight);
  gemm.qzeros = data<int32_t>(qzeros);
  gemm.scales = scales.const_data_ptr();
  gemm.g_idx = g_idx.has_value() ? data<int32_t>(*g_idx) : regular.data();
  gemm.out = out.mutable_data_ptr();
  gemm.in_features = shape.rows;
  gemm.out_features = shape.columns;
  gemm.groups = shape.groups;
  gemm.zero_words = qzeros.size(1);
  gemm.bits = bits;
  gemm.zeros_less_one = zero_offset == 1;
  gemm.scale_dtype = activation_dtype(kOp, "scales", scales);
  gemm.out_dtype = dtype;
  const std::unique_ptr<float[]> packed_x = pack_x(x, layout);
  gemm.x = packed_x.get();
  gemm.rows = out.numel() / shape.columns;
  multiply(gemm);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) { m.impl("gptq_gemm", TORCH_BOX(&gptq_gemm)); }

}  // namespace ferrum::cpu
