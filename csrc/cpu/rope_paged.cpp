// Head norm and rotation that write K and V straight into a paged pool.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/allocate.h"
#include "cpu/kv_cache_args.h"
#include "cpu/rope_args.h"

namespace ferrum::cpu {
namespace {

Tensor split_qkv_norm_rope_paged_(const Tensor& qkv, const std::optional<Tensor>& q_weight,
                                  const std::optional<Tensor>& k_weight, const Tensor& cos, const Tensor& sin,
                                  const std::optional<Tensor>& positions, int64_t num_heads, int64_t num_kv_heads,
                                  int64_t head_dim, double eps, Tensor k_cache, Tensor v_cache,
                                  const Tensor& slot_mapping) {
  const char* op = "split_qkv_norm_rope_paged_";
  const SplitQkvArguments a =
      check_split_qkv(op, qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, head_dim);
  const Integers slots = check_qkv_pools(op, qkv, num_kv_heads, head_dim, k_cache, v_cache, slot_mapping);
  const int64_t tokens = qkv.size(0);
  check_position_values(op, a.tables, tokens);
  check_slot_values(op, slots, tokens, pool_slots(k_cache));
  const SplitQkv split = split_qkv(a, qkv, num_heads, num_kv_heads, head_dim, eps);
  Tensor q_out = allocate(qkv, {tokens, num_heads, head_dim});
  if (tokens == 0) {
    return q_out;
  }
  HeadsRope q = split.q;
  q.out = q_out.mutable_data_ptr();
  char* const k_to = static_cast<char*>(k_cache.mutable_data_ptr());
  char* const v_to = static_cast<char*>(v_cache.mutable_data_ptr());
  const auto kernel = FERRUM_FOR_LEVEL(rope_tokens);
  torch::stable::parallel_for(0, tokens, rows_per_task(qkv.size(1)), [&](int64_t begin, int64_t end) {
    HeadsRope k = split.k;
    for (int64_t t = begin; t < end; ++t) {
      kernel(q, t, t + 1);
      if (slots[t] >= 0) {
        // The kernel writes token t to row t of its output: the output begins t rows before the slot.
        k.out = k_to + (slots[t] - t) * split.row_bytes;
        kernel(k, t, t + 1);
        std::memcpy(v_to + slots[t] * split.row_bytes, split.v + t * split.stride_bytes,
                    static_cast<size_t>(split.row_bytes));
      }
    }
  });
  return q_out;
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("split_qkv_norm_rope_paged_", TORCH_BOX(&ferrum::cpu::split_qkv_norm_rope_paged_));
}
