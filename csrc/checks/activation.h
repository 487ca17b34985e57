// Argument checks of the activation family.
#pragma once

#include <vector>

#include "checks/rows.h"

namespace ferrum {

// `rows` rows of `size` gates and as many of the other factor; strides are in elements. Without rows no pointer is
// used.
struct GatedArguments {
  const void* gate;
  const void* up;
  int64_t gate_stride, up_stride;
  int64_t rows, size;
  Dtype dtype;
};

inline const void* element_at(const void* base, int64_t index, Dtype dtype) {
  return static_cast<const char*>(base) + index * element_size(dtype);
}

// A tensor whose rows hold the gate and then the other half.
inline GatedArguments check_halves(const char* op, const Tensor& gate_up) {
  GatedArguments a{};
  a.dtype = activation_dtype(op, "gate_up", gate_up);
  const RowLayout layout = row_layout(op, "gate_up", gate_up);
  FERRUM_CHECK(layout.size % 2 == 0, op, "gate_up", "expected an even last dimension, got ", layout.size);
  a.rows = layout.rows;
  a.size = layout.size / 2;
  a.gate = gate_up.const_data_ptr();
  a.up = element_at(a.gate, a.size, a.dtype);
  a.gate_stride = a.up_stride = layout.stride;
  return a;
}

inline std::vector<int64_t> shape_of_half(const Tensor& gate_up) {
  std::vector<int64_t> shape(gate_up.sizes().begin(), gate_up.sizes().end());
  shape.back() /= 2;
  return shape;
}

inline GatedArguments check_gate_up(const char* op, const Tensor& gate, const Tensor& up) {
  GatedArguments a{};
  a.dtype = activation_dtype(op, "gate", gate);
  const RowLayout layout = row_layout(op, "gate", gate);
  check_same_dtype(op, "up", up, gate);
  check_same_shape(op, "up", up, gate);
  a.up_stride = row_layout(op, "up", up).stride;
  a.gate = gate.const_data_ptr();
  a.up = up.const_data_ptr();
  a.gate_stride = layout.stride;
  a.rows = layout.rows;
  a.size = layout.size;
  return a;
}

struct GatedOutArguments {
  GatedArguments in;
  int64_t out_first;   // element
  int64_t out_stride;  // elements
};

// For the op that takes rows [in_row, in_row + rows) to rows [out_row, out_row + rows) of `out`.
inline GatedOutArguments check_halves_out(const char* op, const Tensor& gate_up, int64_t in_row, const Tensor& out,
                                          int64_t out_row, int64_t rows) {
  FERRUM_CHECK(gate_up.dim() == 2, op, "gate_up", "expected 2 dimensions, got ", gate_up.dim());
  GatedArguments a = check_halves(op, gate_up);
  check_same_dtype(op, "out", out, gate_up);
  check_shape(op, "out", out, {-1, a.size});
  const RowLayout layout = row_layout(op, "out", out);
  check_rows_apart(op, "out", out, layout);
  FERRUM_CHECK(rows >= 0, op, "rows", "expected at least 0, got ", rows);
  const auto check_range = [&](const char* name, int64_t first, int64_t available) {
    FERRUM_CHECK(first >= 0 && first <= available - rows, op, name, "expected 0 <= ", name, " and ", name, " + ", rows,
                 " <= ", available, ", got ", first);
  };
  check_range("in_row", in_row, gate_up.size(0));
  check_range("out_row", out_row, out.size(0));
  a.rows = a.size == 0 ? 0 : rows;
  a.gate = element_at(a.gate, in_row * a.gate_stride, a.dtype);
  a.up = element_at(a.up, in_row * a.up_stride, a.dtype);
  return {a, out_row * layout.stride, layout.stride};
}

}  // namespace ferrum
