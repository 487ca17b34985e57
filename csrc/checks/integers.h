// Vectors of integers of either width: positions and slots.
#pragma once

#include "checks/tensor.h"

namespace ferrum {

// Lies where its tensor lies; the host reads it only on the CPU.
struct Integers {
  const void* data;
  bool is_long;
  int64_t operator[](int64_t i) const {
    return is_long ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// A contiguous vector [size] of int32 or int64.
inline Integers check_integers(const char* op, const char* name, const Tensor& t, int64_t size) {
  const bool is_long = t.scalar_type() == ScalarType::Long;
  FERRUM_CHECK(is_long || t.scalar_type() == ScalarType::Int, op, name, "expected int32 or int64, got ",
               torch::headeronly::toString(t.scalar_type()));
  check_shape(op, name, t, {size});
  check_contiguous(op, name, t);
  return {t.const_data_ptr(), is_long};
}

}  // namespace ferrum
