#include "cpu/kv_cache.h"

#include <torch/csrc/stable/library.h>

#include "cpu/kv_cache_args.h"

namespace ferrum::cpu {

void kv_append_(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& cache_lens) {
  const char* op = "kv_append_";
  check_kv_append(op, k_cache, v_cache, k, v, cache_lens);
  const int64_t batch = k_cache.size(0), heads = k_cache.size(1), capacity = k_cache.size(2);
  const int64_t tokens = k.size(1);
  const int32_t* lens = data<int32_t>(cache_lens);
  for (int64_t b = 0; b < batch; ++b) {
    FERRUM_CHECK(lens[b] >= 0 && lens[b] + tokens <= capacity, op, "cache_lens",
                 "expected 0 <= length <= ", capacity - tokens, " (capacity ", capacity, " less ", tokens,
                 " new), got ", lens[b]);
  }
  if (k.numel() == 0) {
    return;
  }
  const int64_t k_batch = k.stride(0) * element_bytes(k), v_batch = v.stride(0) * element_bytes(v);
  char* const k_to = static_cast<char*>(k_cache.mutable_data_ptr());
  char* const v_to = static_cast<char*>(v_cache.mutable_data_ptr());
  const TokenHeads k_from = token_heads(k), v_from = token_heads(v);
  const int64_t row = k_from.row_bytes;
  torch::stable::parallel_for(0, batch * tokens, rows_per_task(heads * k.size(3)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tokens, t = i % tokens;
      const int64_t first = (b * heads * capacity + lens[b] + t) * row;
      copy_token(k_from, b * k_batch + t * k_from.token_bytes, k_to + first, capacity * row);
      copy_token(v_from, b * v_batch + t * v_from.token_bytes, v_to + first, capacity * row);
    }
  });
}

namespace {

void paged_kv_write_(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& slot_mapping) {
  const char* op = "paged_kv_write_";
  const Integers slots = check_paged_kv_write(op, k_cache, v_cache, k, v, slot_mapping);
  const int64_t heads = k.size(1), tokens = k.size(0);
  check_slot_values(op, slots, tokens, pool_slots(k_cache));
  if (k.numel() == 0) {
    return;
  }
  char* const k_to = static_cast<char*>(k_cache.mutable_data_ptr());
  char* const v_to = static_cast<char*>(v_cache.mutable_data_ptr());
  const TokenHeads k_from = token_heads(k), v_from = token_heads(v);
  const int64_t row = k_from.row_bytes;
  torch::stable::parallel_for(0, tokens, rows_per_task(heads * k.size(2)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slots[t] >= 0) {
        copy_token(k_from, t * k_from.token_bytes, k_to + slots[t] * heads * row, row);
        copy_token(v_from, t * v_from.token_bytes, v_to + slots[t] * heads * row, row);
      }
    }
  });
}

QuantizedRows quantized_rows(const Tensor& x, Tensor& codes, Tensor& scales, Dtype dtype) {
  return {x.const_data_ptr(),
          mutable_data<int8_t>(codes),
          mutable_data<float>(scales),
          x.stride(0),
          x.stride(1),
          x.size(1),
          x.size(2),
          dtype};
}

void paged_kv_write_int8_(Tensor k_cache, Tensor v_cache, Tensor k_scale, Tensor v_scale, const Tensor& k,
                          const Tensor& v, const Tensor& slot_mapping) {
  const char* op = "paged_kv_write_int8_";
  const Integers slots = check_paged_kv_write_int8(op, k_cache, v_cache, k_scale, v_scale, k, v, slot_mapping);
  const int64_t heads = k.size(1), tokens = k.size(0);
  check_slot_values(op, slots, tokens, pool_slots(k_cache));
  if (k.numel() == 0) {
    return;
  }
  const Dtype dtype = activation_dtype(op, "k", k);
  const QuantizedRows k_rows = quantized_rows(k, k_cache, k_scale, dtype);
  const QuantizedRows v_rows = quantized_rows(v, v_cache, v_scale, dtype);
  const auto kernel = FERRUM_FOR_LEVEL(quantize_token);
  torch::stable::parallel_for(0, tokens, rows_per_task(heads * k.size(2)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slots[t] >= 0) {
        kernel(k_rows, t, slots[t]);
        kernel(v_rows, t, slots[t]);
      }
    }
  });
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("kv_append_", TORCH_BOX(&ferrum::cpu::kv_append_));
  m.impl("paged_kv_write_", TORCH_BOX(&ferrum::cpu::paged_kv_write_));
  m.impl("paged_kv_write_int8_", TORCH_BOX(&ferrum::cpu::paged_kv_write_int8_));
}
