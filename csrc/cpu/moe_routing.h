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

// x [tokens, hidden_size] with a row stride in elements, weight [num_experts, hidden_size] and logits
// [tokens, num_experts], both contiguous and of x's type.
struct RouterProduct {
  const void* x;
  const void* weight;
  void* logits;
  int64_t x_stride, hidden_size, num_experts;
  Dtype dtype;
};

constexpr int64_t kRouterExperts = 8;  // of one task: as many rows of the weight are read side by side

FERRUM_DECLARE_LEVELS(void route_tokens(const RouteRows& rows, int64_t begin, int64_t end);
                      // Logits of the tokens [begin, end) for the experts [first, first + kRouterExperts).
                      void router_logits(const RouterProduct& product, int64_t begin, int64_t end, int64_t first);)

}  // namespace ferrum::cpu
