// Checks and small helpers on stable-ABI tensors, for every device. That all tensors lie on one device is the
// dispatcher's business where it picked the CPU, and `check_device`'s elsewhere.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

#include "common/check.h"

namespace ferrum {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const Tensor& t) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < t.dim(); ++i) {
    out << (i ? ", " : "") << t.size(i);
  }
  out << ')';
  return out.str();
}

inline bool is_activation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

inline void check_activation(const char* op, const char* name, const Tensor& t) {
  FERRUM_CHECK(is_activation_dtype(t.scalar_type()), op, name, "expected float32, float16 or bfloat16, got ",
               torch::headeronly::toString(t.scalar_type()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  FERRUM_CHECK(t.scalar_type() == dtype, op, name, "expected ", torch::headeronly::toString(dtype), ", got ",
               torch::headeronly::toString(t.scalar_type()));
}

// A size of -1 matches anything.
inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) {
    same = same && (size == -1 || t.size(i) == size);
    ++i;
  }
  if (same) {
    return;
  }
  std::ostringstream expected;
  expected << '(';
  i = 0;
  for (int64_t size : shape) {
    expected << (i++ ? ", " : "");
    if (size == -1) {
      expected << '*';
    } else {
      expected << size;
    }
  }
  expected << ')';
  fail(op, name, "expected shape ", expected.str(), ", got ", shape_string(t));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  FERRUM_CHECK(t.is_contiguous(), op, name, "expected a contiguous tensor, got shape ", shape_string(t),
               " with other strides");
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace ferrum
