#include "cpu/activation.h"

#include <torch/csrc/stable/library.h>

#include "checks/activation.h"
#include "cpu/allocate.h"

namespace ferrum::cpu {
namespace {

void run(GatedKernel kernel, const GatedArguments& a, void* out, int64_t out_stride) {
  const GatedRows rows{a.gate, a.up, out, a.gate_stride, a.up_stride, out_stride, a.size, a.dtype};
  torch::stable::parallel_for(0, a.rows, rows_per_task(a.size),
                              [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

Tensor gated_halves(const char* op, GatedKernel kernel, const Tensor& gate_up) {
  const GatedArguments a = check_halves(op, gate_up);
  Tensor out = allocate(gate_up, shape_of_half(gate_up));
  run(kernel, a, out.mutable_data_ptr(), a.size);
  return out;
}

Tensor silu_mul(const Tensor& gate_up) { return gated_halves("silu_mul", FERRUM_FOR_LEVEL(silu_mul_rows), gate_up); }

Tensor gelu_tanh_mul(const Tensor& gate_up) {
  return gated_halves("gelu_tanh_mul", FERRUM_FOR_LEVEL(gelu_tanh_mul_rows), gate_up);
}

Tensor silu_mul_gate_up(const Tensor& gate, const Tensor& up) {
  const GatedArguments a = check_gate_up("silu_mul", gate, up);
  Tensor out = allocate(gate, gate.sizes());
  run(FERRUM_FOR_LEVEL(silu_mul_rows), a, out.mutable_data_ptr(), a.size);
  return out;
}

void silu_mul_out(const Tensor& gate_up, int64_t in_row, const Tensor& out, int64_t out_row, int64_t rows) {
  const GatedOutArguments a = check_halves_out("silu_mul_out", gate_up, in_row, out, out_row, rows);
  void* const first = static_cast<char*>(out.mutable_data_ptr()) + a.out_first * element_size(a.in.dtype);
  run(FERRUM_FOR_LEVEL(silu_mul_rows), a.in, first, a.out_stride);
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("gelu_tanh_mul", TORCH_BOX(&ferrum::cpu::gelu_tanh_mul));
  m.impl("silu_mul", TORCH_BOX(&ferrum::cpu::silu_mul));
  m.impl("silu_mul.gate_up", TORCH_BOX(&ferrum::cpu::silu_mul_gate_up));
  m.impl("silu_mul_out", TORCH_BOX(&ferrum::cpu::silu_mul_out));
}
