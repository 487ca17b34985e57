#include "cpu/activation.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "checks/rows.h"

namespace ferrum::cpu {
namespace {

void run(GatedKernel kernel, const GatedRows& rows, int64_t count) {
  torch::stable::parallel_for(0, count, rows_per_task(rows.size),
                              [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

const char* element(const void* base, int64_t index, Dtype dtype) {
  return static_cast<const char*>(base) + index * element_size(dtype);
}

// Fills everything but the output from a tensor whose rows hold the gate and then the up half.
RowLayout check_halves(const char* op, const Tensor& gate_up, GatedRows& rows) {
  rows.dtype = activation_dtype(op, "gate_up", gate_up);
  const RowLayout layout = row_layout(op, "gate_up", gate_up);
  FERRUM_CHECK(layout.size % 2 == 0, op, "gate_up", "expected an even last dimension, got ", layout.size);
  rows.size = layout.size / 2;
  rows.gate = gate_up.const_data_ptr();
  rows.up = element(rows.gate, rows.size, rows.dtype);
  rows.gate_stride = rows.up_stride = layout.stride;
  return layout;
}

Tensor gated_halves(const char* op, GatedKernel kernel, const Tensor& gate_up) {
  GatedRows rows{};
  const RowLayout layout = check_halves(op, gate_up, rows);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < gate_up.dim(); ++i) {
    shape.push_back(gate_up.size(i));
  }
  shape.push_back(rows.size);
  Tensor out = torch::stable::new_empty(gate_up, shape);
  rows.out = out.mutable_data_ptr();
  rows.out_stride = rows.size;
  run(kernel, rows, layout.rows);
  return out;
}

Tensor silu_mul(const Tensor& gate_up) { return gated_halves("silu_mul", FERRUM_FOR_LEVEL(silu_mul_rows), gate_up); }

Tensor gelu_tanh_mul(const Tensor& gate_up) {
  return gated_halves("gelu_tanh_mul", FERRUM_FOR_LEVEL(gelu_tanh_mul_rows), gate_up);
}

Tensor silu_mul_gate_up(const Tensor& gate, const Tensor& up) {
  const char* op = "silu_mul";
  GatedRows rows{};
  rows.dtype = activation_dtype(op, "gate", gate);
  const RowLayout layout = row_layout(op, "gate", gate);
  check_same_dtype(op, "up", up, gate);
  check_same_shape(op, "up", up, gate);
  rows.up_stride = row_layout(op, "up", up).stride;
  Tensor out = torch::stable::new_empty(gate, gate.sizes());
  rows.gate = gate.const_data_ptr();
  rows.up = up.const_data_ptr();
  rows.out = out.mutable_data_ptr();
  rows.gate_stride = layout.stride;
  rows.out_stride = rows.size = layout.size;
  run(FERRUM_FOR_LEVEL(silu_mul_rows), rows, layout.rows);
  return out;
}

void check_row_range(const char* op, const char* name, int64_t first, int64_t rows, int64_t available) {
  FERRUM_CHECK(first >= 0 && first <= available - rows, op, name, "expected 0 <= ", name, " and ", name, " + ", rows,
               " <= ", available, ", got ", first);
}

void silu_mul_out(const Tensor& gate_up, int64_t in_row, const Tensor& out, int64_t out_row, int64_t count) {
  const char* op = "silu_mul_out";
  FERRUM_CHECK(gate_up.dim() == 2, op, "gate_up", "expected 2 dimensions, got ", gate_up.dim());
  GatedRows rows{};
  const RowLayout in_layout = check_halves(op, gate_up, rows);
  check_same_dtype(op, "out", out, gate_up);
  check_shape(op, "out", out, {-1, rows.size});
  const RowLayout out_layout = row_layout(op, "out", out);
  check_rows_apart(op, "out", out, out_layout);
  FERRUM_CHECK(count >= 0, op, "rows", "expected at least 0, got ", count);
  check_row_range(op, "in_row", in_row, count, gate_up.size(0));
  check_row_range(op, "out_row", out_row, count, out.size(0));
  if (count == 0 || rows.size == 0) {
    return;
  }
  rows.gate = element(rows.gate, in_row * in_layout.stride, rows.dtype);
  rows.up = element(rows.up, in_row * in_layout.stride, rows.dtype);
  rows.out = const_cast<char*>(element(out.mutable_data_ptr(), out_row * out_layout.stride, rows.dtype));
  rows.out_stride = out_layout.stride;
  run(FERRUM_FOR_LEVEL(silu_mul_rows), rows, count);
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("gelu_tanh_mul", TORCH_BOX(&ferrum::cpu::gelu_tanh_mul));
  m.impl("silu_mul", TORCH_BOX(&ferrum::cpu::silu_mul));
  m.impl("silu_mul.gate_up", TORCH_BOX(&ferrum::cpu::silu_mul_gate_up));
  m.impl("silu_mul_out", TORCH_BOX(&ferrum::cpu::silu_mul_out));
}
