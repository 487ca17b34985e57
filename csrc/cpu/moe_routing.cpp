#include "cpu/moe_routing.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks/rows.h"

namespace ferrum::cpu {
namespace {

std::tuple<Tensor, Tensor> route_topk_softmax(const Tensor& logits, int64_t top_k, bool renormalize) {
  const char* op = "route_topk_softmax";
  RouteRows rows{};
  rows.dtype = activation_dtype(op, "logits", logits);
  FERRUM_CHECK(logits.dim() == 2 && logits.size(1) <= kMaxExperts, op, "logits",
               "expected shape (tokens, experts) with at most ", kMaxExperts, " experts, got ", shape_string(logits));
  check_last_contiguous(op, "logits", logits);
  const int64_t tokens = logits.size(0);
  rows.num_experts = logits.size(1);
  FERRUM_CHECK(top_k >= 1 && top_k <= rows.num_experts, op, "top_k", "expected 1 <= top_k <= ", rows.num_experts,
               ", got ", top_k);
  Tensor ids = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Float);
  rows.logits = logits.const_data_ptr();
  rows.ids = mutable_data<int32_t>(ids);
  rows.weights = mutable_data<float>(weights);
  rows.logits_stride = logits.stride(0);
  rows.top_k = top_k;
  rows.renormalize = renormalize;
  const auto kernel = FERRUM_FOR_LEVEL(route_tokens);
  torch::stable::parallel_for(0, tokens, rows_per_task(8 * rows.num_experts),
                              [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  return {ids, weights};
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) { m.impl("route_topk_softmax", TORCH_BOX(&ferrum::cpu::route_topk_softmax)); }
