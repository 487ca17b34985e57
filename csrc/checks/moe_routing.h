// Argument checks of the routing family.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "checks/rows.h"
#include "common/moe.h"

namespace ferrum {

struct RouteArguments {
  int64_t tokens, num_experts, top_k, logits_stride;
  Dtype dtype;
};

inline RouteArguments check_route(const char* op, const Tensor& logits, int64_t top_k) {
  const Dtype dtype = activation_dtype(op, "logits", logits);
  FERRUM_CHECK(logits.dim() == 2 && logits.size(1) <= kMaxExperts, op, "logits",
               "expected shape (tokens, experts) with at most ", kMaxExperts, " experts, got ", shape_string(logits));
  check_last_contiguous(op, "logits", logits);
  const int64_t num_experts = logits.size(1);
  FERRUM_CHECK(top_k >= 1 && top_k <= num_experts, op, "top_k", "expected 1 <= top_k <= ", num_experts, ", got ",
               top_k);
  return {logits.size(0), num_experts, top_k, logits.stride(0), dtype};
}

struct RouterArguments {
  int64_t tokens, num_experts, hidden_size, x_stride;
  Dtype dtype;
};

inline RouterArguments check_router(const Tensor& x, const Tensor& weight, int64_t top_k) {
  const char* op = "router_topk_softmax";
  const Dtype dtype = activation_dtype(op, "x", x);
  FERRUM_CHECK(x.dim() == 2, op, "x", "expected shape (tokens, hidden), got ", shape_string(x));
  check_last_contiguous(op, "x", x);
  FERRUM_CHECK(weight.dim() == 2 && weight.size(0) <= kMaxExperts, op, "weight",
               "expected shape (experts, hidden) with at most ", kMaxExperts, " experts, got ", shape_string(weight));
  FERRUM_CHECK(weight.scalar_type() == x.scalar_type(), op, "weight", "expected ",
               torch::headeronly::toString(x.scalar_type()), ", got ",
               torch::headeronly::toString(weight.scalar_type()));
  check_shape(op, "weight", weight, {-1, x.size(1)});
  check_contiguous(op, "weight", weight);
  const int64_t num_experts = weight.size(0);
  FERRUM_CHECK(top_k >= 1 && top_k <= num_experts, op, "top_k", "expected 1 <= top_k <= ", num_experts, ", got ",
               top_k);
  return {x.size(0), num_experts, x.size(1), x.stride(0), dtype};
}

inline void check_topk_ids(const char* op, const Tensor& topk_ids, int64_t num_experts) {
  check_dtype(op, "topk_ids", topk_ids, ScalarType::Int);
  FERRUM_CHECK(topk_ids.dim() == 2, op, "topk_ids", "expected shape (tokens, top_k), got ", shape_string(topk_ids));
  check_contiguous(op, "topk_ids", topk_ids);
  FERRUM_CHECK(num_experts >= 1, op, "num_experts", "expected at least 1, got ", num_experts);
}

struct AlignArguments {
  const int32_t* expert_map;  // null without one
  int64_t blocks;             // that no routing of as many pairs exceeds
};

// The blocks that no routing of `pairs` pairs, which come from the argument `name`, exceeds.
inline int64_t check_blocks(const char* op, const char* name, int64_t pairs, int64_t num_experts, int64_t block_size) {
  constexpr int64_t kBlockSizes[] = {8, 16, 32, 48, 64, 128};
  FERRUM_CHECK(std::count(std::begin(kBlockSizes), std::end(kBlockSizes), block_size) == 1, op, "block_size",
               "expected one of (8, 16, 32, 48, 64, 128), got ", block_size);
  const int64_t bound = std::min(pairs * block_size, pairs + num_experts * (block_size - 1));
  const int64_t blocks = (bound + block_size - 1) / block_size;
  FERRUM_CHECK(blocks * block_size <= std::numeric_limits<int32_t>::max(), op, name,
               "expected entries that int32 can count, got ", blocks * block_size);
  return blocks;
}

inline AlignArguments check_align(const Tensor& topk_ids, int64_t num_experts, int64_t block_size,
                                  const std::optional<Tensor>& expert_map) {
  const char* op = "moe_align_block_size";
  check_topk_ids(op, topk_ids, num_experts);
  AlignArguments a{};
  a.blocks = check_blocks(op, "topk_ids", topk_ids.numel(), num_experts, block_size);
  if (expert_map.has_value()) {
    check_dtype(op, "expert_map", *expert_map, ScalarType::Int);
    check_shape(op, "expert_map", *expert_map, {num_experts});
    check_contiguous(op, "expert_map", *expert_map);
    a.expert_map = data<int32_t>(*expert_map);
  }
  return a;
}

inline void check_ids_tpe(const Tensor& topk_ids, int64_t num_experts, const std::vector<int64_t>& out_features) {
  const char* op = "moe_compute_ids_tpe";
  check_topk_ids(op, topk_ids, num_experts);
  for (int64_t features : out_features) {
    FERRUM_CHECK(features >= 1, op, "out_features", "expected at least 1, got ", features);
  }
}

}  // namespace ferrum
