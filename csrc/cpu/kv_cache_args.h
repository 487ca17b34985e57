// What the ops that write to a KV cache share on the CPU: the values of slots, and copies of heads.
#pragma once

#include <cstring>

#include "checks/kv_cache.h"

namespace ferrum::cpu {

// Keys or values as they arrive: heads with a contiguous last dimension, other strides free.
struct TokenHeads {
  const char* data;
  int64_t token_bytes, head_bytes;  // strides
  int64_t heads, row_bytes;         // of one head
};

inline int64_t element_bytes(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 2; }

// The token stride, the head stride and the heads of x [..., tokens, heads, head_dim].
inline TokenHeads token_heads(const Tensor& x) {
  const int64_t element = element_bytes(x), last = x.dim() - 1;
  return {static_cast<const char*>(x.const_data_ptr()), x.stride(last - 2) * element, x.stride(last - 1) * element,
          x.size(last - 1), x.size(last) * element};
}

// Every slot of a pool of `num_slots` token rows, before anything is written.
inline void check_slot_values(const char* op, const Integers& slots, int64_t tokens, int64_t num_slots) {
  for (int64_t t = 0; t < tokens; ++t) {
    FERRUM_CHECK(slots[t] >= -1 && slots[t] < num_slots, op, "slot_mapping", "expected -1 <= slot < ", num_slots,
                 ", got ", slots[t]);
  }
}

// Moves the heads of the token at `offset` bytes to rows that lie `stride` bytes apart.
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
