#include "cpu/norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks/norm.h"
#include "cpu/allocate.h"

namespace ferrum::cpu {
namespace {

void run(const NormRows& rows, int64_t count) {
  const auto kernel = FERRUM_FOR_LEVEL(norm_rows);
  torch::stable::parallel_for(0, count, rows_per_task(rows.size),
                              [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

NormRows rows_of(const NormArguments& a) {
  NormRows rows{};
  rows.dtype = a.dtype;
  rows.float_weight = a.float_weight;
  rows.x = a.x.const_data_ptr();
  rows.x_stride = a.x_rows.stride;
  rows.weight = a.weight.const_data_ptr();
  rows.size = a.x_rows.size;
  rows.eps = a.eps;
  if (a.residual != nullptr) {
    rows.residual = a.residual->const_data_ptr();
    rows.residual_stride = a.residual_rows.stride;
  }
  return rows;
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const NormArguments a = check_norm("rms_norm", x, nullptr, weight, eps);
  Tensor out = allocate(x, x.sizes());
  NormRows rows = rows_of(a);
  rows.out = out.mutable_data_ptr();
  rows.out_stride = rows.size;
  run(rows, a.x_rows.rows);
  return out;
}

std::tuple<Tensor, Tensor> fused_add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                              double eps) {
  const NormArguments a = check_norm("fused_add_rms_norm", x, &residual, weight, eps);
  Tensor out = allocate(x, x.sizes());
  Tensor sum = allocate(x, x.sizes());
  NormRows rows = rows_of(a);
  rows.out = out.mutable_data_ptr();
  rows.residual_out = sum.mutable_data_ptr();
  rows.out_stride = rows.residual_out_stride = rows.size;
  run(rows, a.x_rows.rows);
  return {out, sum};
}

namespace {

void fused_add_rms_norm_(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const char* op = "fused_add_rms_norm_";
  const NormArguments a = check_norm(op, x, &residual, weight, eps);
  check_norm_in_place(op, a);
  NormRows rows = rows_of(a);
  rows.out = x.mutable_data_ptr();
  rows.residual_out = residual.mutable_data_ptr();
  rows.out_stride = rows.x_stride;
  rows.residual_out_stride = rows.residual_stride;
  run(rows, a.x_rows.rows);
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("fused_add_rms_norm", TORCH_BOX(&ferrum::cpu::fused_add_rms_norm));
  m.impl("fused_add_rms_norm_", TORCH_BOX(&ferrum::cpu::fused_add_rms_norm_));
  m.impl("rms_norm", TORCH_BOX(&ferrum::cpu::rms_norm));
}
