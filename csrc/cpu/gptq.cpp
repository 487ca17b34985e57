// gptq_dequantize on CPU: argument checks, zero points and scales as tables,
// rows in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "cpu/allocate.h"
#include "cpu/gptq_args.h"
#include "cpu/gptq_kernels.h"
#include "cpu/isa.h"

namespace ferrum::cpu {
namespace {

constexpr const char* kOp = "gptq_dequantize";
// Elements one thread should at least work on.
constexpr int64_t kGrain = 32768;

GptqRowKernel row_kernel() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512:
      return gptq_row_avx512;
    case Isa::avx2:
      return gptq_row_avx2;
    case Isa::generic:
      break;
  }
#endif
  return gptq_row_generic;
}

void decode_zeros(const int32_t* qzeros, const GptqShape& shape, int64_t zero_offset, int32_t* zeros) {
  const int64_t codes = gptq::period_codes(shape.bits), words = gptq::period_words(shape.bits);
  const uint32_t word_offset = zero_offset ? gptq::v1_word_offset(shape.bits) : 0;
  const uint32_t field_offset = zero_offset && word_offset == 0 ? 1 : 0;
  const uint32_t mask = gptq::code_mask(shape.bits);
  int32_t period[3];
  for (int64_t n = 0; n < shape.columns; n += codes, qzeros += words) {
    for (int64_t w = 0; w < words; ++w) {
      period[w] = static_cast<int32_t>(static_cast<uint32_t>(qzeros[w]) + word_offset);
    }
    for (int64_t i = 0; i < std::min(codes, shape.columns - n); ++i) {
      zeros[n + i] = static_cast<int32_t>((gptq::code_at(period, 1, i, shape.bits) + field_offset) & mask);
    }
  }
}

void scales_to_float(const Tensor& scales, int64_t first, int64_t count, float* out) {
  switch (scales.scalar_type()) {
    case ScalarType::Float:
      std::copy_n(data<float>(scales) + first, count, out);
      break;
    case ScalarType::Half:
      std::copy_n(data<torch::headeronly::Half>(scales) + first, count, out);
      break;
    default:
      std::copy_n(data<torch::headeronly::BFloat16>(scales) + first, count, out);
  }
}

Tensor gptq_dequantize(const Tensor& qweight, const Tensor& qzeros, const Tensor& scales,
                       const std::optional<Tensor>& g_idx, int64_t bits, int64_t zero_offset, ScalarType dtype) {
  FERRUM_CHECK(is_activation_dtype(dtype), kOp, "dtype", "expected float32, float16 or bfloat16, got ",
               torch::headeronly::toString(dtype));
  const GptqShape shape = check_gptq(kOp, qweight, qzeros, scales, g_idx, bits, zero_offset);
  const int64_t columns = shape.columns;
  Tensor out = allocate(scales, {shape.rows, columns}, dtype);
  if (shape.rows == 0 || columns == 0) {
    return out;
  }
  // Decoded once per group, read by every row of it: small beside the weights.
  const std::unique_ptr<int32_t[]> zeros(new int32_t[shape.groups * columns]);
  const std::unique_ptr<float[]> factors(new float[shape.groups * columns]);
  const int32_t* zero_words = data<int32_t>(qzeros);
  torch::stable::parallel_for(0, shape.groups, std::max<int64_t>(1, kGrain / columns), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      decode_zeros(zero_words + g * qzeros.size(1), shape, zero_offset, zeros.get() + g * columns);
      scales_to_float(scales, g * columns, columns, factors.get() + g * columns);
    }
  });

  const int64_t codes = gptq::period_codes(bits), words = gptq::period_words(bits);
  const int64_t group_rows = shape.rows / shape.groups;  // used without g_idx only
  const int32_t* groups = g_idx.has_value() ? data<int32_t>(*g_idx) : nullptr;
  const int32_t* weights = data<int32_t>(qweight);
  const GptqRowKernel kernel = row_kernel();
  const GptqOutput type = dtype == ScalarType::Float  ? GptqOutput::f32
                          : dtype == ScalarType::Half ? GptqOutput::f16
                                                      : GptqOutput::bf16;
  const int64_t row_bytes = columns * (type == GptqOutput::f32 ? 4 : 2);
  char* result = mutable_data<char>(out);
  const int64_t grain = std::max<int64_t>(1, kGrain / (columns * codes));
  torch::stable::parallel_for(0, shape.rows / codes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * codes; k < end * codes; ++k) {
      const gptq::Field field = gptq::field_at(k % codes, bits);
      const int32_t* low = weights + (k / codes * words + field.word) * columns;
      const int64_t g = groups != nullptr ? groups[k] : k / group_rows;
      const GptqRow row = {low,
                           field.crosses ? low + columns : nullptr,
                           field.shift,
                           gptq::code_mask(bits),
                           zeros.get() + g * columns,
                           factors.get() + g * columns,
                           columns};
      kernel(row, type, result + k * row_bytes);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) { m.impl("gptq_dequantize", TORCH_BOX(&gptq_dequantize)); }

}  // namespace ferrum::cpu
