// Router logits; softmax over the experts and the largest top_k of them.
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

// The logits of kTokens tokens for kExperts experts. Every sum is a chain of its own over the channels in order,
// whatever the tile, so that a token's logits do not depend on its neighbours. The rows of the next task are fetched
// meanwhile: a row is a page, and the processor's own prefetching stops at its end.
template <int kTokens, int kExperts, typename T>
void router_tile(const RouterProduct& p, int64_t token, int64_t expert) {
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight) + expert * p.hidden_size;
  Vec sums[kTokens][kExperts];
  for (int t = 0; t < kTokens; ++t) {
    for (int e = 0; e < kExperts; ++e) {
      sums[t][e] = broadcast(0.0f);
    }
  }
  for_vectors(p.hidden_size, [&](int64_t i, int64_t count) {
    Vec values[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      values[t] = load_some(x + t * p.x_stride + i, count);
    }
    for (int e = 0; e < kExperts; ++e) {
      const T* row = weight + e * p.hidden_size + i;
      __builtin_prefetch(row + kRouterExperts * p.hidden_size);
      const Vec factor = load_some(row, count);
      for (int t = 0; t < kTokens; ++t) {
        sums[t][e] = fma(values[t], factor, sums[t][e]);
      }
    }
  });
  for (int t = 0; t < kTokens; ++t) {
    T* logits = static_cast<T*>(p.logits) + (token + t) * p.num_experts + expert;
    for (int e = 0; e < kExperts; ++e) {
      store(logits + e, broadcast(reduce_add(sums[t][e])), 1);
    }
  }
}

template <int kTokens, int kExperts, typename T>
void router_tokens(const RouterProduct& p, int64_t token, int64_t first, int64_t last) {
  int64_t expert = first;
  for (; expert + kExperts <= last; expert += kExperts) {
    router_tile<kTokens, kExperts, T>(p, token, expert);
  }
  for (; expert < last; ++expert) {
    router_tile<kTokens, 1, T>(p, token, expert);
  }
}

}  // namespace

void router_logits(const RouterProduct& p, int64_t begin, int64_t end, int64_t first) {
  const int64_t last = smaller(first + kRouterExperts, p.num_experts);
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    int64_t token = begin;
    for (; token + 4 <= end; token += 4) {
      router_tokens<4, 4, T>(p, token, first, last);
    }
    for (; token < end; ++token) {
      router_tokens<1, kRouterExperts, T>(p, token, first, last);
    }
  });
}

void route_tokens(const RouteRows& rows, int64_t begin, int64_t end) {
  with_type(rows.dtype, [&](auto t) {
    for (int64_t token = begin; token < end; ++token) {
      route_token<decltype(t)>(rows, token);
    }
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
