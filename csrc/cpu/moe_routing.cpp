#include "cpu/moe_routing.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks/moe_routing.h"

namespace ferrum::cpu {
namespace {

std::tuple<Tensor, Tensor> route_topk_softmax(const Tensor& logits, int64_t top_k, bool renormalize) {
  const RouteArguments a = check_route(logits, top_k);
  RouteRows rows{};
  rows.dtype = a.dtype;
  rows.num_experts = a.num_experts;
  Tensor ids = torch::stable::new_empty(logits, {a.tokens, top_k}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(logits, {a.tokens, top_k}, ScalarType::Float);
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

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) { m.impl("route_topk_softmax", TORCH_BOX(&ferrum::cpu::route_topk_softmax)); }
