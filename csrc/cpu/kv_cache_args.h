// Argument checks shared by the ops that write to a KV cache.
#pragma once

#include <cstring>

#include "checks/rows.h"

namespace ferrum::cpu {

// Keys or values as they arrive: heads with a contiguous last dimension, other
// strides free.
struct TokenHeads {
  const char* data;
  int64_t token_bytes, head_bytes;  // strides
  int64_t heads, row_bytes;         // of one head
};

inline int64_t element_bytes(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 2; }

// The token stride, the head stride and the heads of x [..., tokens, heads,
// head_dim].
inline TokenHeads token_heads(const Tensor& x) {
  const int64_t element = element_bytes(x), last = x.dim() - 1;
  return {static_cast<const char*>(x.const_data_ptr()), x.stride(last - 2) * element, x.stride(last - 1) * element,
          x.size(last - 1), x.size(last) * element};
}

// k and v: this shape (-1 matches any size), one dtype, contiguous last
// dimension.
inline void check_tokens(const char* op, const Tensor& k, const Tensor& v, std::initializer_list<int64_t> shape) {
  check_activation(op, "k", k);
  check_shape(op, "k", k, shape);
  check_last_contiguous(op, "k", k);
  check_same_dtype(op, "v", v, k);
  check_same_shape(op, "v", v, k);
  check_last_contiguous(op, "v", v);
}

// k_cache and v_cache: contiguous, 4 dimensions, of one dtype and shape.
inline void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache, const char* shape) {
  FERRUM_CHECK(k_cache.dim() == 4, op, "k_cache", "expected shape ", shape, ", got ", shape_string(k_cache));
  check_contiguous(op, "k_cache", k_cache);
  check_same_dtype(op, "v_cache", v_cache, k_cache);
  check_same_shape(op, "v_cache", v_cache, k_cache);
  check_contiguous(op, "v_cache", v_cache);
}

// Slots of a pool of `num_slots` token rows. Every slot is checked before
// anything is written.
struct Slots {
  const void* data;
  bool is_long;
  int64_t operator[](int64_t i) const {
    return is_long ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

inline Slots check_slots(const char* op, const Tensor& slot_mapping, int64_t tokens, int64_t num_slots) {
  const bool is_long = slot_mapping.scalar_type() == ScalarType::Long;
  FERRUM_CHECK(is_long || slot_mapping.scalar_type() == ScalarType::Int, op, "slot_mapping",
               "expected int32 or int64, got ", torch::headeronly::toString(slot_mapping.scalar_type()));
  check_shape(op, "slot_mapping", slot_mapping, {tokens});
  check_contiguous(op, "slot_mapping", slot_mapping);
  const Slots slots{slot_mapping.const_data_ptr(), is_long};
  for (int64_t t = 0; t < tokens; ++t) {
    FERRUM_CHECK(slots[t] >= -1 && slots[t] < num_slots, op, "slot_mapping", "expected -1 <= slot < ", num_slots,
                 ", got ", slots[t]);
  }
  return slots;
}

// Moves the heads of the token at `offset` bytes to rows that lie `stride`
// bytes apart.
inline void copy_token(const TokenHeads& from, int64_t offset, char* to, int64_t stride) {
  const char* x = from.data + offset;
  if (from.head_bytes == from.row_bytes && stride == from.row_bytes) {
    std::memcpy(to, x, static_cast<size_t>(from.heads * from.row_bytes));
    return;
  }
  for (int64_t h = 0; h < from.heads; ++h) {
    std::memcpy(to + h * stride, x + h * from.head_bytes, static_cast<size_t>(from.row_bytes));
  }
}

}  // namespace ferrum::cpu
