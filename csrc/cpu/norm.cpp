#include "cpu/norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/norm_rows.h"

namespace ferrum::cpu {
namespace {

void run(const NormRows& rows, int64_t count) {
  const auto kernel = FERRUM_FOR_LEVEL(norm_rows);
  torch::stable::parallel_for(0, count, rows_per_task(rows.size),
                              [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const char* op = "rms_norm";
  NormRows rows{};
  rows.dtype = activation_dtype(op, "x", x);
  const RowLayout layout = row_layout(op, "x", x);
  rows.float_weight = check_weight(op, "weight", weight, x, layout.size);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  rows.x = x.const_data_ptr();
  rows.weight = weight.const_data_ptr();
  rows.out = out.mutable_data_ptr();
  rows.x_stride = layout.stride;
  rows.out_stride = rows.size = layout.size;
  rows.eps = static_cast<float>(eps);
  run(rows, layout.rows);
  return out;
}

struct SumArguments {
  NormRows rows;
  RowLayout x, residual;
};

SumArguments check_sum(const char* op, const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  SumArguments a{};
  a.rows.dtype = activation_dtype(op, "x", x);
  a.x = row_layout(op, "x", x);
  check_same_dtype(op, "residual", residual, x);
  check_same_shape(op, "residual", residual, x);
  a.residual = row_layout(op, "residual", residual);
  a.rows.float_weight = check_weight(op, "weight", weight, x, a.x.size);
  a.rows.x = x.const_data_ptr();
  a.rows.residual = residual.const_data_ptr();
  a.rows.weight = weight.const_data_ptr();
  a.rows.x_stride = a.x.stride;
  a.rows.residual_stride = a.residual.stride;
  a.rows.size = a.x.size;
  a.rows.eps = static_cast<float>(eps);
  return a;
}

std::tuple<Tensor, Tensor> fused_add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                              double eps) {
  SumArguments a = check_sum("fused_add_rms_norm", x, residual, weight, eps);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  Tensor sum = torch::stable::new_empty(x, x.sizes());
  a.rows.out = out.mutable_data_ptr();
  a.rows.residual_out = sum.mutable_data_ptr();
  a.rows.out_stride = a.rows.residual_out_stride = a.x.size;
  run(a.rows, a.x.rows);
  return {out, sum};
}

void fused_add_rms_norm_(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const char* op = "fused_add_rms_norm_";
  SumArguments a = check_sum(op, x, residual, weight, eps);
  check_rows_apart(op, "x", x, a.x);
  check_rows_apart(op, "residual", residual, a.residual);
  FERRUM_CHECK(a.x.rows == 0 || a.rows.x != a.rows.residual, op, "residual",
               "expected other memory than that of x, got the same");
  a.rows.out = x.mutable_data_ptr();
  a.rows.residual_out = residual.mutable_data_ptr();
  a.rows.out_stride = a.x.stride;
  a.rows.residual_out_stride = a.residual.stride;
  run(a.rows, a.x.rows);
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("fused_add_rms_norm", TORCH_BOX(&ferrum::cpu::fused_add_rms_norm));
  m.impl("fused_add_rms_norm_", TORCH_BOX(&ferrum::cpu::fused_add_rms_norm_));
  m.impl("rms_norm", TORCH_BOX(&ferrum::cpu::rms_norm));
}
