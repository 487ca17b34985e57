// What the ops that rotate heads share on the CPU: the values of positions, and the kernel's view of the arguments.
#pragma once

#include "checks/rope.h"
#include "cpu/rope.h"

namespace ferrum::cpu {

inline void check_position_values(const char* op, const RopeTables& tables, int64_t tokens) {
  for (int64_t t = 0; tables.positions.data != nullptr && t < tokens; ++t) {
    const int64_t position = tables.positions[t];
    FERRUM_CHECK(position >= 0 && position < tables.rows, op, "positions", "expected 0 <= position < ", tables.rows,
                 ", got ", position);
  }
}

// Everything but where the heads come from and go to.
inline HeadsRope rotation(const RopeTables& tables, const HeadWeight& weight, double eps, Dtype dtype) {
  HeadsRope heads{};
  heads.cos = tables.cos;
  heads.sin = tables.sin;
  heads.cos_stride = tables.cos_stride;
  heads.sin_stride = tables.sin_stride;
  heads.half = tables.half;
  heads.positions = tables.positions.data;
  heads.long_positions = tables.positions.is_long;
  heads.weight = weight.data;
  heads.float_weight = weight.is_float;
  heads.eps = static_cast<float>(eps);
  heads.dtype = dtype;
  return heads;
}

// Rows [q heads | k heads | v heads]: Q and K but for their outputs, and where V lies.
struct SplitQkv {
  HeadsRope q, k;
  const char* v;
  int64_t stride_bytes;  // from token to token
  int64_t row_bytes;     // of the K heads or the V heads of one token
};

inline SplitQkv split_qkv(const SplitQkvArguments& a, const Tensor& qkv, int64_t num_heads, int64_t num_kv_heads,
                          int64_t head_dim, double eps) {
  const int64_t element = element_size(a.dtype);
  const char* in = static_cast<const char*>(qkv.const_data_ptr());
  HeadsRope q = rotation(a.tables, a.q_weight, eps, a.dtype);
  HeadsRope k = rotation(a.tables, a.k_weight, eps, a.dtype);
  q.heads = num_heads;
  k.heads = num_kv_heads;
  q.head_dim = q.head_stride = k.head_dim = k.head_stride = head_dim;
  q.token_stride = k.token_stride = qkv.stride(0);
  q.x = in;
  k.x = in + num_heads * head_dim * element;
  const char* v = in + (num_heads + num_kv_heads) * head_dim * element;
  return {q, k, v, qkv.stride(0) * element, num_kv_heads * head_dim * element};
}

}  // namespace ferrum::cpu
