// Argument checks shared by the ops that rotate heads.
#pragma once

#include <optional>

#include "checks/rows.h"
#include "cpu/rope.h"

namespace ferrum::cpu {

template <typename Integer>
void check_inside(const char* op, const Tensor& positions, int64_t rows) {
  const Integer* values = data<Integer>(positions);
  for (int64_t t = 0; t < positions.numel(); ++t) {
    FERRUM_CHECK(values[t] >= 0 && values[t] < rows, op, "positions", "expected 0 <= position < ", rows, ", got ",
                 values[t]);
  }
}

inline void check_table(const char* op, const char* name, const Tensor& table) {
  check_dtype(op, name, table, ScalarType::Float);
  check_last_contiguous(op, name, table);
}

// Checks the tables and the positions of `tokens` tokens and fills in everything about them.
inline void check_tables(const char* op, HeadsRope& heads, int64_t tokens, const Tensor& cos, const Tensor& sin,
                         const std::optional<Tensor>& positions) {
  FERRUM_CHECK(cos.dim() == 2 && 2 * cos.size(1) <= heads.head_dim, op, "cos",
               "expected shape (max_pos, rotary_dim / 2) with rotary_dim <= ", heads.head_dim, ", got ",
               shape_string(cos));
  check_table(op, "cos", cos);
  check_same_shape(op, "sin", sin, cos);
  check_table(op, "sin", sin);
  heads.cos = data<float>(cos);
  heads.sin = data<float>(sin);
  heads.cos_stride = cos.stride(0);
  heads.sin_stride = sin.stride(0);
  heads.half = cos.size(1);
  const int64_t rows = cos.size(0);
  if (!positions.has_value()) {
    FERRUM_CHECK(rows >= tokens, op, "cos", "expected at least ", tokens, " rows, one per token, got ", rows);
    return;
  }
  heads.long_positions = positions->scalar_type() == ScalarType::Long;
  FERRUM_CHECK(heads.long_positions || positions->scalar_type() == ScalarType::Int, op, "positions",
               "expected int32 or int64, got ", torch::headeronly::toString(positions->scalar_type()));
  check_shape(op, "positions", *positions, {tokens});
  check_contiguous(op, "positions", *positions);
  FERRUM_CHECK(tokens == 0 || rows > 0, op, "cos", "expected at least 1 row, got 0");
  if (heads.long_positions) {
    check_inside<int64_t>(op, *positions, rows);
  } else {
    check_inside<int32_t>(op, *positions, rows);
  }
  heads.positions = positions->const_data_ptr();
}

inline void set_weight(const char* op, const char* name, HeadsRope& heads, const std::optional<Tensor>& weight,
                       const Tensor& x) {
  heads.weight = nullptr;
  if (weight.has_value()) {
    heads.float_weight = check_weight(op, name, *weight, x, heads.head_dim);
    heads.weight = weight->const_data_ptr();
  }
}

// Rows [q heads | k heads | v heads]: Q and K but for their outputs, and where V lies.
struct SplitQkv {
  HeadsRope q, k;
  const char* v;
  int64_t stride_bytes;  // from token to token
  int64_t row_bytes;     // of the K heads or the V heads of one token
};

inline SplitQkv check_split_qkv(const char* op, const Tensor& qkv, const std::optional<Tensor>& q_weight,
                                const std::optional<Tensor>& k_weight, const Tensor& cos, const Tensor& sin,
                                const std::optional<Tensor>& positions, int64_t num_heads, int64_t num_kv_heads,
                                int64_t head_dim, double eps) {
  HeadsRope q{};
  q.dtype = activation_dtype(op, "qkv", qkv);
  FERRUM_CHECK(num_heads >= 1, op, "num_heads", "expected at least 1, got ", num_heads);
  FERRUM_CHECK(num_kv_heads >= 1, op, "num_kv_heads", "expected at least 1, got ", num_kv_heads);
  FERRUM_CHECK(head_dim >= 1, op, "head_dim", "expected at least 1, got ", head_dim);
  check_shape(op, "qkv", qkv, {-1, (num_heads + 2 * num_kv_heads) * head_dim});
  check_last_contiguous(op, "qkv", qkv);
  q.heads = num_heads;
  q.head_dim = q.head_stride = head_dim;
  q.token_stride = qkv.stride(0);
  q.eps = static_cast<float>(eps);
  check_tables(op, q, qkv.size(0), cos, sin, positions);
  HeadsRope k = q;
  k.heads = num_kv_heads;
  set_weight(op, "q_weight", q, q_weight, qkv);
  set_weight(op, "k_weight", k, k_weight, qkv);
  const int64_t element = element_size(q.dtype);
  const char* in = static_cast<const char*>(qkv.const_data_ptr());
  q.x = in;
  k.x = in + num_heads * head_dim * element;
  const char* v = in + (num_heads + num_kv_heads) * head_dim * element;
  return {q, k, v, qkv.stride(0) * element, num_kv_heads * head_dim * element};
}

}  // namespace ferrum::cpu
