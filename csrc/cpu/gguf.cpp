// gguf_dequantize on the CPU.
#include "cpu/gguf.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks/gguf.h"
#include "cpu/int4_args.h"

namespace ferrum::cpu {
namespace {

constexpr const char* kOp = "gguf_dequantize";

FloatType float_type(ScalarType dtype) {
  return dtype == ScalarType::Float ? FloatType::f32 : dtype == ScalarType::Half ? FloatType::f16 : FloatType::bf16;
}

// One row to fp32, whatever its type.
void row_to_float(const gguf::Traits& traits, const uint8_t* blocks, int64_t elements, float* out) {
  if (traits.elements > 1) {
    FERRUM_FOR_LEVEL(gguf_dequantize_row)(traits, blocks, elements, out);
    return;
  }
  const FloatType type = traits.type == gguf::Type::F32   ? FloatType::f32
                         : traits.type == gguf::Type::F16 ? FloatType::f16
                                                          : FloatType::bf16;
  int4_kernels().to_float(blocks, type, elements, out);
}

Tensor gguf_dequantize(const Tensor& blocks, int64_t type, ScalarType dtype) {
  const gguf::Traits& traits = check_gguf_type(kOp, "type", type);
  check_gguf_bytes(kOp, "blocks", blocks);
  FERRUM_CHECK(is_activation_dtype(dtype), kOp, "dtype", "expected float32, float16 or bfloat16, got ",
               torch::headeronly::toString(dtype));
  std::vector<int64_t> shape(blocks.sizes().begin(), blocks.sizes().end());
  const int64_t row_bytes = shape.back();
  FERRUM_CHECK(row_bytes % traits.bytes == 0, kOp, "blocks", "expected rows of a multiple of ", traits.bytes,
               " bytes for ", traits.name, ", got shape ", shape_string(blocks));
  const int64_t elements = row_bytes / traits.bytes * traits.elements;
  shape.back() = elements;
  Tensor out = torch::stable::new_empty(blocks, shape, dtype);
  if (out.numel() == 0) {
    return out;
  }
  const uint8_t* bytes = data<uint8_t>(blocks);
  char* result = mutable_data<char>(out);
  const FloatType out_type = float_type(dtype);
  const int64_t out_bytes = elements * float_bytes(out_type);
  const auto from_float = int4_kernels().from_float;
  torch::stable::parallel_for(0, out.numel() / elements, rows_per_task(elements), [&](int64_t begin, int64_t end) {
    const Scratch<float> row(out_type == FloatType::f32 ? 0 : elements);
    for (int64_t r = begin; r < end; ++r) {
      if (out_type == FloatType::f32) {
        row_to_float(traits, bytes + r * row_bytes, elements, reinterpret_cast<float*>(result + r * out_bytes));
      } else {
        row_to_float(traits, bytes + r * row_bytes, elements, row.get());
        from_float(row.get(), elements, out_type, result + r * out_bytes);
      }
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) { m.impl("gguf_dequantize", TORCH_BOX(&gguf_dequantize)); }

}  // namespace
}  // namespace ferrum::cpu
