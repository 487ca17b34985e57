// Argument checks of the kv_cache family. The values of lengths and slots are not looked at here: they may lie where
// the host cannot read them.
#pragma once

#include "checks/integers.h"
#include "checks/rows.h"

namespace ferrum {

// k and v: this shape (-1 matches any size), one dtype, contiguous last dimension.
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

inline void check_pools(const char* op, const Tensor& k_cache, const Tensor& v_cache) {
  check_caches(op, k_cache, v_cache, "(num_blocks, block_size, kv_heads, head_dim)");
}

inline int64_t pool_slots(const Tensor& pool) { return pool.size(0) * pool.size(1); }

inline void check_kv_append(const char* op, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                            const Tensor& v, const Tensor& cache_lens) {
  check_activation(op, "k_cache", k_cache);
  check_caches(op, k_cache, v_cache, "(batch, kv_heads, capacity, head_dim)");
  check_tokens(op, k, v, {k_cache.size(0), -1, k_cache.size(1), k_cache.size(3)});
  check_same_dtype(op, "k", k, k_cache);
  check_dtype(op, "cache_lens", cache_lens, ScalarType::Int);
  check_shape(op, "cache_lens", cache_lens, {k_cache.size(0)});
  check_contiguous(op, "cache_lens", cache_lens);
}

// Returns the slots.
inline Integers check_paged_kv_write(const char* op, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                                     const Tensor& v, const Tensor& slot_mapping) {
  check_activation(op, "k_cache", k_cache);
  check_pools(op, k_cache, v_cache);
  check_tokens(op, k, v, {-1, k_cache.size(2), k_cache.size(3)});
  check_same_dtype(op, "k", k, k_cache);
  return check_integers(op, "slot_mapping", slot_mapping, k.size(0));
}

inline void check_pool_scale(const char* op, const char* name, const Tensor& scale, const Tensor& pool) {
  check_dtype(op, name, scale, ScalarType::Float);
  check_shape(op, name, scale, {pool.size(0), pool.size(1), pool.size(2)});
  check_contiguous(op, name, scale);
}

// Returns the slots.
inline Integers check_paged_kv_write_int8(const char* op, const Tensor& k_cache, const Tensor& v_cache,
                                          const Tensor& k_scale, const Tensor& v_scale, const Tensor& k,
                                          const Tensor& v, const Tensor& slot_mapping) {
  check_dtype(op, "k_cache", k_cache, ScalarType::Char);
  check_pools(op, k_cache, v_cache);
  check_pool_scale(op, "k_scale", k_scale, k_cache);
  check_pool_scale(op, "v_scale", v_scale, k_cache);
  check_tokens(op, k, v, {-1, k_cache.size(2), k_cache.size(3)});
  return check_integers(op, "slot_mapping", slot_mapping, k.size(0));
}

}  // namespace ferrum
