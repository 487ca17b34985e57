// Checks on stable-ABI tensors for the families whose kernels walk rows: norm, activation, rope, routing, combine.
#pragma once

#include <optional>

#include "checks/tensor.h"
#include "common/dtype.h"

namespace ferrum {

inline std::string stride_string(const Tensor& t) {
  std::ostringstream out;
  out << "strides (";
  for (int64_t i = 0; i < t.dim(); ++i) {
    out << (i ? ", " : "") << t.stride(i);
  }
  out << ')';
  return out.str();
}

inline Dtype activation_dtype(const char* op, const char* name, const Tensor& t) {
  check_activation(op, name, t);
  return t.scalar_type() == ScalarType::Float  ? Dtype::float32
         : t.scalar_type() == ScalarType::Half ? Dtype::float16
                                               : Dtype::bfloat16;
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_dtype(op, name, t, like.scalar_type());
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) {
    same = t.size(i) == like.size(i);
  }
  FERRUM_CHECK(same, op, name, "expected shape ", shape_string(like), ", got ", shape_string(t));
}

inline void check_last_contiguous(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  FERRUM_CHECK(t.numel() == 0 || t.size(last) == 1 || t.stride(last) == 1, op, name,
               "expected a contiguous last dimension, got ", stride_string(t));
}

struct RowLayout {
  int64_t rows, size, stride;
};

// The leading dimensions collapsed into rows with a single stride; nothing where that cannot be.
inline std::optional<RowLayout> find_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  const int64_t size = t.size(last);
  if (t.numel() == 0) {
    return RowLayout{0, size, size};
  }
  bool regular = size == 1 || t.stride(last) == 1;
  int64_t rows = 1, stride = size, outer = -1;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (t.size(i) != 1) {
      regular = regular && (outer == -1 || t.stride(i) == outer);
      stride = rows == 1 ? t.stride(i) : stride;
      outer = t.size(i) * t.stride(i);
      rows *= t.size(i);
    }
  }
  return regular ? std::optional(RowLayout{rows, size, stride}) : std::nullopt;
}

inline RowLayout row_layout(const char* op, const char* name, const Tensor& t) {
  FERRUM_CHECK(t.dim() >= 1, op, name, "expected at least 1 dimension, got 0");
  const std::optional<RowLayout> layout = find_rows(t);
  FERRUM_CHECK(layout.has_value(), op, name, "expected contiguous rows with one row stride, got ", stride_string(t));
  return *layout;
}

inline void check_rows_apart(const char* op, const char* name, const Tensor& t, const RowLayout& layout) {
  FERRUM_CHECK(layout.rows <= 1 || layout.stride >= layout.size, op, name, "expected rows that do not overlap, got ",
               stride_string(t));
}

// A contiguous vector [size] of x's dtype or float32. Returns whether it is float32 beside other activations.
inline bool check_weight(const char* op, const char* name, const Tensor& weight, const Tensor& x, int64_t size) {
  FERRUM_CHECK(weight.scalar_type() == x.scalar_type() || weight.scalar_type() == ScalarType::Float, op, name,
               "expected ", torch::headeronly::toString(x.scalar_type()), " or Float, got ",
               torch::headeronly::toString(weight.scalar_type()));
  check_shape(op, name, weight, {size});
  check_contiguous(op, name, weight);
  return weight.scalar_type() == ScalarType::Float;
}

}  // namespace ferrum
