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

// The top_k largest values in descending order, by insertion: experts come in ascending order of their ids and only a
// strictly larger value moves ahead of another, so equal ones stay in that order.
inline void select_largest(const float* values, int64_t num_experts, int64_t top_k, int32_t* ids, float* best) {
  for (int64_t j = 0; j < top_k; ++j) {
    best[j] = -__builtin_inff();
  }
  for (int64_t i = 0; i < num_experts; i += kLanes) {
    uint32_t candidates = greater_mask(load(values + i), broadcast(best[top_k - 1]));
    for (; candidates != 0; candidates &= candidates - 1) {
      const int64_t expert = i + __builtin_ctz(candidates);
      const float value = values[expert];
      if (!(value > best[top_k - 1])) {
        continue;  // the bar rose since the mask was made
      }
      int64_t j = top_k - 1;
      for (; j > 0 && value > best[j - 1]; --j) {
        best[j] = best[j - 1];
        ids[j] = ids[j - 1];
      }
      best[j] = value;
      ids[j] = static_cast<int32_t>(expert);
    }
  }
}

template <typename T>
void route_token(const RouteRows& rows, int64_t token) {
  alignas(64) float values[kMaxExperts];
  float best[kMaxExperts];
  int32_t* ids = rows.ids + token * rows.top_k;
  float* weights = rows.weights + token * rows.top_k;
  const T* logits = static_cast<const T*>(rows.logits) + token * rows.logits_stride;
  const Vec largest = broadcast(load_finite(logits, rows.num_experts, values));
  select_largest(values, rows.num_experts, rows.top_k, ids, best);
  Vec sum = broadcast(0.0f);
  for (int64_t i = 0; i < rows.num_experts; i += kLanes) {
    const Vec exponential = exp(load(static_cast<const float*>(values + i)) - largest);
    store(values + i, exponential);
    sum = sum + exponential;
  }
  float total = reduce_add(sum);
  if (rows.renormalize) {
    total = 0.0f;
    for (int64_t j = 0; j < rows.top_k; ++j) {
      total += values[ids[j]];
    }
  }
  for (int64_t j = 0; j < rows.top_k; ++j) {
    // The largest expert adds 1 to the total, so the second case is for arithmetic gone wrong only.
    weights[j] = total > 0.0f ? values[ids[j]] / total : 1.0f / static_cast<float>(rows.top_k);
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
