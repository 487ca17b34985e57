// Argument checks of the rope family. The values of positions and slots are not looked at here: they may lie where the
// host cannot read them.
#pragma once

#include <optional>

#include "checks/integers.h"
#include "checks/kv_cache.h"
#include "checks/rows.h"

namespace ferrum {

// cos and sin [rows, half], and the row of each token. Strides are in elements.
struct RopeTables {
  const float* cos;
  const float* sin;
  int64_t cos_stride, sin_stride;
  int64_t rows, half;
  Integers positions;  // no data: token t takes row t
};

// A null pointer leaves the norm out.
struct HeadWeight {
  const void* data;
  bool is_float;
};

inline void check_table(const char* op, const char* name, const Tensor& table) {
  check_dtype(op, name, table, ScalarType::Float);
  check_last_contiguous(op, name, table);
}

inline RopeTables check_tables(const char* op, int64_t head_dim, int64_t tokens, const Tensor& cos, const Tensor& sin,
                               const std::optional<Tensor>& positions) {
  FERRUM_CHECK(cos.dim() == 2 && 2 * cos.size(1) <= head_dim, op, "cos",
               "expected shape (max_pos, rotary_dim / 2) with rotary_dim <= ", head_dim, ", got ", shape_string(cos));
  check_table(op, "cos", cos);
  check_same_shape(op, "sin", sin, cos);
  check_table(op, "sin", sin);
  RopeTables tables{data<float>(cos), data<float>(sin), cos.stride(0), sin.stride(0), cos.size(0), cos.size(1), {}};
  if (positions.has_value()) {
    tables.positions = check_integers(op, "positions", *positions, tokens);
    FERRUM_CHECK(tokens == 0 || tables.rows > 0, op, "cos", "expected at least 1 row, got 0");
  } else {
    FERRUM_CHECK(tables.rows >= tokens, op, "cos", "expected at least ", tokens, " rows, one per token, got ",
                 tables.rows);
  }
  return tables;
}

inline HeadWeight check_head_weight(const char* op, const char* name, const std::optional<Tensor>& weight,
                                    const Tensor& x, int64_t head_dim) {
  if (!weight.has_value()) {
    return {nullptr, false};
  }
  const bool is_float = check_weight(op, name, *weight, x, head_dim);
  return {weight->const_data_ptr(), is_float};
}

struct QkNormRopeArguments {
  RopeTables tables;
  HeadWeight weight;
  Dtype dtype;
};

inline QkNormRopeArguments check_qk_norm_rope(const char* op, const Tensor& x, const std::optional<Tensor>& norm_weight,
                                              const Tensor& cos, const Tensor& sin,
                                              const std::optional<Tensor>& positions) {
  QkNormRopeArguments a{};
  a.dtype = activation_dtype(op, "x", x);
  FERRUM_CHECK(x.dim() == 3, op, "x", "expected shape (tokens, heads, head_dim), got ", shape_string(x));
  check_last_contiguous(op, "x", x);
  a.weight = check_head_weight(op, "norm_weight", norm_weight, x, x.size(2));
  a.tables = check_tables(op, x.size(2), x.size(0), cos, sin, positions);
  return a;
}

struct SplitQkvArguments {
  RopeTables tables;
  HeadWeight q_weight, k_weight;
  Dtype dtype;
};

// Rows [q heads | k heads | v heads].
inline SplitQkvArguments check_split_qkv(const char* op, const Tensor& qkv, const std::optional<Tensor>& q_weight,
                                         const std::optional<Tensor>& k_weight, const Tensor& cos, const Tensor& sin,
                                         const std::optional<Tensor>& positions, int64_t num_heads,
                                         int64_t num_kv_heads, int64_t head_dim) {
  SplitQkvArguments a{};
  a.dtype = activation_dtype(op, "qkv", qkv);
  FERRUM_CHECK(num_heads >= 1, op, "num_heads", "expected at least 1, got ", num_heads);
  FERRUM_CHECK(num_kv_heads >= 1, op, "num_kv_heads", "expected at least 1, got ", num_kv_heads);
  FERRUM_CHECK(head_dim >= 1, op, "head_dim", "expected at least 1, got ", head_dim);
  check_shape(op, "qkv", qkv, {-1, (num_heads + 2 * num_kv_heads) * head_dim});
  check_last_contiguous(op, "qkv", qkv);
  a.tables = check_tables(op, head_dim, qkv.size(0), cos, sin, positions);
  a.q_weight = check_head_weight(op, "q_weight", q_weight, qkv, head_dim);
  a.k_weight = check_head_weight(op, "k_weight", k_weight, qkv, head_dim);
  return a;
}

// The pools that K and V of the tokens of qkv go to. Returns the slots.
inline Integers check_qkv_pools(const char* op, const Tensor& qkv, int64_t num_kv_heads, int64_t head_dim,
                                const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot_mapping) {
  check_pools(op, k_cache, v_cache);
  check_same_dtype(op, "k_cache", k_cache, qkv);
  check_shape(op, "k_cache", k_cache, {-1, -1, num_kv_heads, head_dim});
  return check_integers(op, "slot_mapping", slot_mapping, qkv.size(0));
}

}  // namespace ferrum
