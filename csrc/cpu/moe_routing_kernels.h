// Softmax over the experts and the largest top_k of them.
#include "cpu/moe_routing.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

constexpr float kLargest = 3.402823466e+38f;

// Logits of one token as float32, all finite (+Inf the largest, NaN and -Inf the lowest), behind them -Inf up to whole
// vectors. Returns the largest.
template <typename T>
inline float load_finite(const T* logits, int64_t num_experts, float* values) {
  Vec largest = broadcast(-kLargest);
  for_vectors(num_experts, [&](int64_t i, int64_t count) {
    const Vec finite = min(max(load_some(logits + i, count), broadcast(-kLargest)), broadcast(kLargest));
    store(values + i, broadcast(-__builtin_inff()));
    store_some(values + i, finite, count);
    largest = max(largest, load(static_cast<const float*>(values + i)));
  });
  return reduce_max(largest);
}

// The top_k largest values in descending order, equal ones in ascending order of their ids. A round per expert, without
// branches on the data but for the search of the vector that holds it. Taken values become -Inf.
inline void select_largest(float* values, int64_t num_experts, int64_t top_k, int32_t* ids) {
  for (int64_t j = 0; j < top_k; ++j) {
    Vec lanes = load(static_cast<const float*>(values));
    for (int64_t i = kLanes; i < num_experts; i += kLanes) {
      lanes = max(lanes, load(static_cast<const float*>(values + i)));
    }
    const Vec largest = broadcast(reduce_max(lanes));
    int64_t i = 0;
    uint32_t smaller_lanes;
    while ((smaller_lanes = greater_mask(largest, load(static_cast<const float*>(values + i)))) == 0xffffu) {
      i += kLanes;
    }
    const int64_t expert = i + __builtin_ctz(~smaller_lanes);
    ids[j] = static_cast<int32_t>(expert);
    values[expert] = -__builtin_inff();
  }
}

template <typename T>
void route_token(const RouteRows& rows, int64_t token) {
  alignas(64) float values[kMaxExperts];
  alignas(64) float exponentials[kMaxExperts];
  int32_t* ids = rows.ids + token * rows.top_k;
  float* weights = rows.weights + token * rows.top_k;
  const T* logits = static_cast<const T*>(rows.logits) + token * rows.logits_stride;
  const Vec largest = broadcast(load_finite(logits, rows.num_experts, values));
  Vec sum = broadcast(0.0f);
  for (int64_t i = 0; i < rows.num_experts; i += kLanes) {
    const Vec exponential = exp(load(static_cast<const float*>(values + i)) - largest);
    store(exponentials + i, exponential);
    sum = sum + exponential;
  }
  select_largest(values, rows.num_experts, rows.top_k, ids);
  float total = reduce_add(sum);
  if (rows.renormalize) {
    total = 0.0f;
    for (int64_t j = 0; j < rows.top_k; ++j) {
      total += exponentials[ids[j]];
    }
  }
  for (int64_t j = 0; j < rows.top_k; ++j) {
    // The largest expert adds 1 to the total, so the second case is for arithmetic gone wrong only.
    weights[j] = total > 0.0f ? exponentials[ids[j]] / total : 1.0f / static_cast<float>(rows.top_k);
  }
}

}  // namespace

void route_tokens(const RouteRows& rows, int64_t begin, int64_t end) {
  with_type(rows.dtype, [&](auto t) {
    for (int64_t token = begin; token < end; ++token) {
      route_token<decltype(t)>(rows, token);
    }
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
