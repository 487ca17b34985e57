#include "cpu/moe_routing.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "checks/moe_routing.h"
#include "cpu/allocate.h"

namespace ferrum::cpu {
namespace {

std::tuple<Tensor, Tensor> route(const RouteArguments& a, const Tensor& logits, int64_t top_k, bool renormalize) {
  RouteRows rows{};
  rows.dtype = a.dtype;
  rows.num_experts = a.num_experts;
  Tensor ids = allocate(logits, {a.tokens, top_k}, ScalarType::Int);
  Tensor weights = allocate(logits, {a.tokens, top_k}, ScalarType::Float);
  rows.logits = logits.const_data_ptr();
  rows.ids = mutable_data<int32_t>(ids);
  rows.weights = mutable_data<float>(weights);
  rows.logits_stride = a.logits_stride;
  rows.top_k = top_k;
  rows.renormalize = renormalize;
  const auto kernel = FERRUM_FOR_LEVEL(route_tokens);
  torch::stable::parallel_for(0, a.tokens, rows_per_task(8 * rows.num_experts),
                              [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  return {ids, weights};
}

std::tuple<Tensor, Tensor> route_topk_softmax(const Tensor& logits, int64_t top_k, bool renormalize) {
  return route(check_route("route_topk_softmax", logits, top_k), logits, top_k, renormalize);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> router_topk_softmax(const Tensor& x, const Tensor& weight, int64_t top_k,
                                                       bool renormalize) {
  const RouterArguments a = check_router(x, weight, top_k);
  Tensor logits = allocate(x, {a.tokens, a.num_experts});
  const RouterProduct product{x.const_data_ptr(),
                              weight.const_data_ptr(),
                              logits.mutable_data_ptr(),
                              a.x_stride,
                              a.hidden_size,
                              a.num_experts,
                              a.dtype};
  // A task is a few experts for a block of tokens, few enough to stay in the second-level cache from task to task.
  constexpr int64_t kTokens = 32;
  const int64_t parts = (a.num_experts + kRouterExperts - 1) / kRouterExperts;
  const int64_t blocks = (a.tokens + kTokens - 1) / kTokens;
  const int64_t work = std::min(a.tokens, kTokens) * kRouterExperts * a.hidden_size;
  const auto kernel = FERRUM_FOR_LEVEL(router_logits);
  torch::stable::parallel_for(0, blocks * parts, rows_per_task(work / 2), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t token = task / parts * kTokens;
      kernel(product, token, std::min(token + kTokens, a.tokens), task % parts * kRouterExperts);
    }
  });
  const RouteArguments rows{a.tokens, a.num_experts, top_k, a.num_experts, a.dtype};
  auto [ids, weights] = route(rows, logits, top_k, renormalize);
  return {logits, ids, weights};
}

}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("route_topk_softmax", TORCH_BOX(&ferrum::cpu::route_topk_softmax));
  m.impl("router_topk_softmax", TORCH_BOX(&ferrum::cpu::router_topk_softmax));
}
