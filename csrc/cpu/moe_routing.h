// The kernels of the routing family. No torch here.
#pragma once

#include "common/moe.h"
#include "cpu/simd.h"

namespace ferrum::cpu {

// Logits [tokens, num_experts] with a row stride in elements; contiguous ids and weights [tokens, top_k].
struct RouteRows {
  const void* logits;
  int32_t* ids;
  float* weights;
  int64_t logits_stride;
  int64_t num_experts, top_k;  // 1 <= top_k <= num_experts <= kMaxExperts
  Dtype dtype;
  bool renormalize;
};

FERRUM_DECLARE_LEVELS(void route_tokens(const RouteRows& rows, int64_t begin, int64_t end);)

}  // namespace ferrum::cpu
