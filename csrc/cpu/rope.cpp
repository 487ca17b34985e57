#include "cpu/rope.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "cpu/norm_rows.h"

namespace ferrum::cpu {
namespace {

template <typename Integer>
void check_inside(const char* op, const Tensor& positions, int64_t rows) {
  const Integer* values = data<Integer>(positions);
  for (int64_t t = 0; t < positions.numel(); ++t) {
    FERRUM_CHECK(values[t] >= 0 && values[t] < rows, op, "positions", "expected 0 <= position < ", rows, ", got ",
                 values[t]);
  }
}

void check_table(const char* op, const char* name, const Tensor& table) {
  check_dtype(op, name, table, ScalarType::Float);
  check_last_contiguous(op, name, table);
}

// Checks the tables and the positions of `tokens` tokens and fills in everything about them.
void check_tables(const char* op, HeadsRope& heads, int64_t tokens, const Tensor& cos, const Tensor& sin,
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
  FERRUM_CHECK(positions->is_cpu(), op, "positions", "expected a CPU tensor");
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

void set_weight(const char* op, const char* name, HeadsRope& heads, const std::optional<Tensor>& weight,
                const Tensor& x) {
  heads.weight = nullptr;
  if (weight.has_value()) {
    heads.float_weight = check_weight(op, name, *weight, x, heads.head_dim);
    heads.weight = weight->const_data_ptr();
  }
}

Tensor qk_norm_rope(const Tensor& x, const std::optional<Tensor>& norm_weight, const Tensor& cos, const Tensor& sin,
                    const std::optional<Tensor>& positions, double eps, bool interleaved) {
  const char* op = "qk_norm_rope";
  HeadsRope heads{};
  heads.dtype = activation_dtype(op, "x", x);
  FERRUM_CHECK(x.dim() == 3, op, "x", "expected shape (tokens, heads, head_dim), got ", shape_string(x));
  check_last_contiguous(op, "x", x);
  const int64_t tokens = x.size(0);
  heads.heads = x.size(1);
  heads.head_dim = x.size(2);
  heads.token_stride = x.stride(0);
  heads.head_stride = x.stride(1);
  heads.eps = static_cast<float>(eps);
  heads.interleaved = interleaved;
  set_weight(op, "norm_weight", heads, norm_weight, x);
  check_tables(op, heads, tokens, cos, sin, positions);
  Tensor out = torch::stable::new_empty(x, {tokens, heads.heads, heads.head_dim});
  if (out.numel() == 0) {
    return out;
  }
  heads.x = x.const_data_ptr();
  heads.out = out.mutable_data_ptr();
  const auto kernel = FERRUM_FOR_LEVEL(rope_tokens);
  torch::stable::parallel_for(0, tokens, rows_per_task(heads.heads * heads.head_dim),
                              [&](int64_t begin, int64_t end) { kernel(heads, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> split_qkv_norm_rope(const Tensor& qkv, const std::optional<Tensor>& q_weight,
                                                       const std::optional<Tensor>& k_weight, const Tensor& cos,
                                                       const Tensor& sin, const std::optional<Tensor>& positions,
                                                       int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                                       double eps) {
  const char* op = "split_qkv_norm_rope";
  HeadsRope q{};
  q.dtype = activation_dtype(op, "qkv", qkv);
  FERRUM_CHECK(num_heads >= 1, op, "num_heads", "expected at least 1, got ", num_heads);
  FERRUM_CHECK(num_kv_heads >= 1, op, "num_kv_heads", "expected at least 1, got ", num_kv_heads);
  FERRUM_CHECK(head_dim >= 1, op, "head_dim", "expected at least 1, got ", head_dim);
  check_shape(op, "qkv", qkv, {-1, (num_heads + 2 * num_kv_heads) * head_dim});
  check_last_contiguous(op, "qkv", qkv);
  const int64_t tokens = qkv.size(0);
  q.heads = num_heads;
  q.head_dim = q.head_stride = head_dim;
  q.token_stride = qkv.stride(0);
  q.eps = static_cast<float>(eps);
  HeadsRope k = q;
  k.heads = num_kv_heads;
  set_weight(op, "q_weight", q, q_weight, qkv);
  set_weight(op, "k_weight", k, k_weight, qkv);
  check_tables(op, q, tokens, cos, sin, positions);
  k.cos = q.cos, k.sin = q.sin, k.cos_stride = q.cos_stride, k.sin_stride = q.sin_stride, k.half = q.half;
  k.positions = q.positions, k.long_positions = q.long_positions;

  Tensor q_out = torch::stable::new_empty(qkv, {tokens, num_heads, head_dim});
  Tensor k_out = torch::stable::new_empty(qkv, {tokens, num_kv_heads, head_dim});
  Tensor v_out = torch::stable::new_empty(qkv, {tokens, num_kv_heads, head_dim});
  if (tokens == 0) {
    return {q_out, k_out, v_out};
  }
  const int64_t element = q.dtype == Dtype::float32 ? 4 : 2;
  const char* in = static_cast<const char*>(qkv.const_data_ptr());
  q.x = in;
  k.x = in + num_heads * head_dim * element;
  const char* v = in + (num_heads + num_kv_heads) * head_dim * element;
  q.out = q_out.mutable_data_ptr();
  k.out = k_out.mutable_data_ptr();
  char* moved = static_cast<char*>(v_out.mutable_data_ptr());
  const int64_t v_bytes = num_kv_heads * head_dim * element;
  const int64_t stride_bytes = qkv.stride(0) * element;
  const auto kernel = FERRUM_FOR_LEVEL(rope_tokens);
  torch::stable::parallel_for(0, tokens, rows_per_task(qkv.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernel(q, t, t + 1);
      kernel(k, t, t + 1);
      std::memcpy(moved + t * v_bytes, v + t * stride_bytes, static_cast<size_t>(v_bytes));
    }
  });
  return {q_out, k_out, v_out};
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&ferrum::cpu::qk_norm_rope));
  m.impl("split_qkv_norm_rope", TORCH_BOX(&ferrum::cpu::split_qkv_norm_rope));
}
