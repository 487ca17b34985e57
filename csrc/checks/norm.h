// Argument checks of the norm family.
#pragma once

#include "checks/rows.h"

namespace ferrum {

struct NormArguments {
  const Tensor& x;
  const Tensor* residual;  // null without one
  const Tensor& weight;
  RowLayout x_rows, residual_rows;
  float eps;
  Dtype dtype;
  bool float_weight;
};

inline NormArguments check_norm(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight,
                                double eps) {
  NormArguments a{x, residual, weight, {}, {}, static_cast<float>(eps), activation_dtype(op, "x", x), false};
  a.x_rows = row_layout(op, "x", x);
  if (residual != nullptr) {
    check_same_dtype(op, "residual", *residual, x);
    check_same_shape(op, "residual", *residual, x);
    a.residual_rows = row_layout(op, "residual", *residual);
  }
  a.float_weight = check_weight(op, "weight", weight, x, a.x_rows.size);
  return a;
}

// For the op that writes over x and residual.
inline void check_norm_in_place(const char* op, const NormArguments& a) {
  check_rows_apart(op, "x", a.x, a.x_rows);
  check_rows_apart(op, "residual", *a.residual, a.residual_rows);
  FERRUM_CHECK(a.x_rows.rows == 0 || a.x.const_data_ptr() != a.residual->const_data_ptr(), op, "residual",
               "expected other memory than that of x, got the same");
}

}  // namespace ferrum
