// Argument checks shared by the ops on int4-packed weights.
#pragma once

#include <optional>
#include <string>

#include "checks/tensor.h"
#include "common/int4.h"
#include "cpu/int4_activations.h"

namespace ferrum::cpu {

inline FloatType float_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return FloatType::f16;
    case ScalarType::BFloat16:
      return FloatType::bf16;
    default:
      return FloatType::f32;
  }
}

inline int64_t float_bytes(FloatType type) { return type == FloatType::f32 ? 4 : 2; }

// True for "int8", false for "full".
inline bool check_int8_activation(const char* op, const std::string& activation) {
  FERRUM_CHECK(activation == "int8" || activation == "full", op, "activation", "expected \"int8\" or \"full\", got \"",
               activation, "\"");
  return activation == "int8";
}

inline void check_group_size(const char* op, const char* name, int64_t group_size) {
  FERRUM_CHECK(group_size >= int4::kLineRows && group_size <= int4::kMaxGroupSize && group_size % int4::kLineRows == 0,
               op, name, "expected a multiple of 8 from 8 to 128, got ", group_size,
               " (ferrum_ops.formats.int4.split_groups normalises others)");
}

// Checks codes [lead..., tiles, lines, line_bytes], scales and zeros [lead..., tiles, G, 16]; `experts` < 0 means no
// leading dimension. `tiles` and `lines` are what the other arguments imply.
struct PackedArgument {
  const char* op;
  std::string name;  // "packed", "w13", "w2"
  std::string scales_name, zeros_name;
  int64_t line_bytes = int4::kLineBytes;
};

inline void check_packed(const PackedArgument& a, const Tensor& codes, const Tensor& scales,
                         const std::optional<Tensor>& zeros, int64_t experts, int64_t tiles, int64_t lines,
                         int64_t group_size) {
  const int64_t groups = int4::ceil_div(lines * int4::kLineRows, group_size);
  const auto check = [&](const std::string& name, const Tensor& t, ScalarType dtype, int64_t depth, int64_t width) {
    check_dtype(a.op, name.c_str(), t, dtype);
    if (experts < 0) {
      check_shape(a.op, name.c_str(), t, {tiles, depth, width});
    } else {
      check_shape(a.op, name.c_str(), t, {experts, tiles, depth, width});
    }
    check_contiguous(a.op, name.c_str(), t);
  };
  check(a.name, codes, ScalarType::Byte, lines, a.line_bytes);
  check(a.scales_name, scales, ScalarType::Half, groups, int4::kTileColumns);
  if (zeros) {
    check(a.zeros_name, *zeros, ScalarType::Byte, groups, int4::kTileColumns);
  }
}

// The matrix of one expert, or the only one.
inline PackedWeights packed_weights(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                                    int64_t expert, int64_t tiles, int64_t lines, int64_t group_size,
                                    int64_t line_bytes = int4::kLineBytes) {
  const int64_t groups = int4::ceil_div(lines * int4::kLineRows, group_size);
  const int64_t per_expert = tiles * groups * int4::kTileColumns;
  return {data<uint8_t>(codes) + expert * tiles * lines * line_bytes,
          data<uint16_t>(scales) + expert * per_expert,
          zeros ? data<uint8_t>(*zeros) + expert * per_expert : nullptr,
          lines,
          groups,
          group_size / int4::kLineRows,
          line_bytes};
}

}  // namespace ferrum::cpu
