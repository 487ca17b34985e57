#include "cpu/rope.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "cpu/allocate.h"
#include "cpu/rope_args.h"

namespace ferrum::cpu {
namespace {

Tensor qk_norm_rope(const Tensor& x, const std::optional<Tensor>& norm_weight, const Tensor& cos, const Tensor& sin,
                    const std::optional<Tensor>& positions, double eps, bool interleaved) {
  const char* op = "qk_norm_rope";
  const QkNormRopeArguments a = check_qk_norm_rope(op, x, norm_weight, cos, sin, positions);
  const int64_t tokens = x.size(0);
  check_position_values(op, a.tables, tokens);
  HeadsRope heads = rotation(a.tables, a.weight, eps, a.dtype);
  heads.heads = x.size(1);
  heads.head_dim = x.size(2);
  heads.token_stride = x.stride(0);
  heads.head_stride = x.stride(1);
  heads.interleaved = interleaved;
  Tensor out = allocate(x, {tokens, heads.heads, heads.head_dim});
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

}  // namespace

std::tuple<Tensor, Tensor, Tensor> split_qkv_norm_rope(const Tensor& qkv, const std::optional<Tensor>& q_weight,
                                                       const std::optional<Tensor>& k_weight, const Tensor& cos,
                                                       const Tensor& sin, const std::optional<Tensor>& positions,
                                                       int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                                       double eps) {
  const char* op = "split_qkv_norm_rope";
  const SplitQkvArguments a =
      check_split_qkv(op, qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, head_dim);
  check_position_values(op, a.tables, qkv.size(0));
  const SplitQkv split = split_qkv(a, qkv, num_heads, num_kv_heads, head_dim, eps);
  HeadsRope q = split.q, k = split.k;
  const int64_t tokens = qkv.size(0);
  Tensor q_out = allocate(qkv, {tokens, num_heads, head_dim});
  Tensor k_out = allocate(qkv, {tokens, num_kv_heads, head_dim});
  Tensor v_out = allocate(qkv, {tokens, num_kv_heads, head_dim});
  if (tokens == 0) {
    return {q_out, k_out, v_out};
  }
  q.out = q_out.mutable_data_ptr();
  k.out = k_out.mutable_data_ptr();
  char* moved = static_cast<char*>(v_out.mutable_data_ptr());
  const auto kernel = FERRUM_FOR_LEVEL(rope_tokens);
  torch::stable::parallel_for(0, tokens, rows_per_task(qkv.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernel(q, t, t + 1);
      kernel(k, t, t + 1);
      std::memcpy(moved + t * split.row_bytes, split.v + t * split.stride_bytes, static_cast<size_t>(split.row_bytes));
    }
  });
  return {q_out, k_out, v_out};
}

}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&ferrum::cpu::qk_norm_rope));
  m.impl("split_qkv_norm_rope", TORCH_BOX(&ferrum::cpu::split_qkv_norm_rope));
}
