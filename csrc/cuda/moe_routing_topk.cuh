// A router's choice of one token, by a warp with the token's logits in registers.
#pragma once

#include <tuple>
#include <type_traits>

#include "checks/moe_routing.h"
#include "cuda/order.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace ferrum::cuda {

template <typename T>
struct Route {
  const T* logits;
  int32_t* ids;
  float* weights;
  int64_t tokens, logits_stride;
  int num_experts, top_k;
  bool renormalize;
};

// Lane l holds experts l, l + 32, ... as keys (order.cuh); 0, below every key, where there is none or it is taken.
// `ids` [top_k]: the token's, in shared or device memory.
template <typename T, int kPerLane>
__device__ __forceinline__ void route_token(const Route<T>& route, int64_t token, int32_t* ids) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const T* const logits = route.logits + token * route.logits_stride;
  uint32_t keys[kPerLane];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * 32 + lane;
    // fmaxf of a NaN and a number is the number.
    keys[i] =
        expert < route.num_experts ? ordered(fminf(fmaxf(to_float(logits[expert]), -kLargestFloat), kLargestFloat)) : 0;
    largest = max(largest, keys[i]);
  }
  const float highest = from_ordered(__reduce_max_sync(kFullWarp, largest));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    sum += keys[i] != 0 ? expf(from_ordered(keys[i]) - highest) : 0.0f;
  }
  sum = warp_sum(sum);

  float* const weights = route.weights + token * route.top_k;
  float selected = 0.0f;  // the sum over the chosen experts, in every lane
  int32_t lane_id = 0;    // of the round that is this lane's, of each 32
  float lane_weight = 0.0f;
  for (int j = 0; j < route.top_k; ++j) {
    uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      best = max(best, keys[i]);
    }
    best = __reduce_max_sync(kFullWarp, best);
    uint32_t expert = ~0u;
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i) {
      expert = keys[i] == best ? static_cast<uint32_t>(i * 32 + lane) : expert;
    }
    expert = __reduce_min_sync(kFullWarp, expert);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      keys[i] = expert == static_cast<uint32_t>(i * 32 + lane) ? 0 : keys[i];
    }
    const float exponential = expf(from_ordered(best) - highest);
    selected += exponential;
    if (j % 32 == lane) {
      lane_id = static_cast<int32_t>(expert);
      lane_weight = exponential;
    }
    if (j % 32 == 31) {
      ids[j - 31 + lane] = lane_id;
      weights[j - 31 + lane] = lane_weight;
    }
  }

  const float total = route.renormalize ? selected : sum;
  // The highest logit adds 1 to the total, so the second case is for arithmetic gone wrong only.
  const auto scaled = [&](float weight) { return total > 0.0f ? weight / total : 1.0f / route.top_k; };
  const int written = route.top_k / 32 * 32;  // as they are; each lane reads what it wrote itself
  for (int j = lane; j < written; j += 32) {
    weights[j] = scaled(weights[j]);
  }
  if (written + lane < route.top_k) {
    ids[written + lane] = lane_id;
    weights[written + lane] = scaled(lane_weight);
  }
}

// Registers for the logits of one lane: a power of two from 2 to 32.
constexpr int pick_logits_per_lane(int64_t num_experts) {
  int per_lane = 2;
  while (per_lane * 32 < num_experts) {
    per_lane *= 2;
  }
  return per_lane;
}
static_assert(pick_logits_per_lane(1) == 2 && pick_logits_per_lane(64) == 2 && pick_logits_per_lane(65) == 4);
static_assert(pick_logits_per_lane(128) == 4 && pick_logits_per_lane(kMaxExperts) == 32);

// Calls f with the registers for the logits of one lane as a constant.
template <typename F>
void for_logits_per_lane(int64_t num_experts, const F& f) {
  switch (pick_logits_per_lane(num_experts)) {
    case 2:
      return f(std::integral_constant<int, 2>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 8:
      return f(std::integral_constant<int, 8>());
    case 16:
      return f(std::integral_constant<int, 16>());
    default:
      return f(std::integral_constant<int, 32>());
  }
}

template <typename T>
Route<T> route_of(const RouteArguments& a, const Tensor& logits, bool renormalize, const Tensor& ids,
                  const Tensor& weights) {
  return {data<T>(logits), mutable_data<int32_t>(ids),      mutable_data<float>(weights), a.tokens,
          a.logits_stride, static_cast<int>(a.num_experts), static_cast<int>(a.top_k),    renormalize};
}

// The launch of route_topk_softmax (moe_routing.cu).
void launch_route(const Stream& stream, const RouteArguments& a, const Tensor& logits, bool renormalize,
                  const Tensor& ids, const Tensor& weights);

}  // namespace ferrum::cuda
