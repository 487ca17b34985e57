// route_topk_softmax: one warp per token, the token's logits in registers.
//
// Floor: T*E logits read once, 8*T*K bytes written. Below some thousand tokens the time is that of the K rounds of one
// warp, each two warp-wide reductions (redux) and a few instructions per register: no shared memory, no barrier.
#include <torch/csrc/stable/library.h>

#include "cuda/moe_routing_topk.cuh"

namespace ferrum::cuda {
namespace {

constexpr int kWarps = 4;  // of a block, each with a token of its own

template <typename T, int kPerLane>
__global__ void __launch_bounds__(32 * kWarps) route_tokens(Route<T> route) {
  start_next_kernel();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= route.tokens) {
    return;  // whole warps, and there is no barrier
  }
  route_token<T, kPerLane>(route, token, route.ids + token * route.top_k);
}

std::tuple<Tensor, Tensor> route_topk_softmax(const Tensor& logits, int64_t top_k, bool renormalize) {
  const char* op = "route_topk_softmax";
  const RouteArguments a = check_route(op, logits, top_k);
  Tensor ids = new_output(logits, {a.tokens, top_k}, ScalarType::Int);
  Tensor weights = new_output(logits, {a.tokens, top_k}, ScalarType::Float);
  launch_route(Stream(op, logits), a, logits, renormalize, ids, weights);
  return {ids, weights};
}

}  // namespace

void launch_route(const Stream& stream, const RouteArguments& a, const Tensor& logits, bool renormalize,
                  const Tensor& ids, const Tensor& weights) {
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Route<T> route = route_of<T>(a, logits, renormalize, ids, weights);
    const Grid grid{dim3(static_cast<unsigned>((a.tokens + kWarps - 1) / kWarps)), dim3(32 * kWarps)};
    for_logits_per_lane(a.num_experts,
                        [&](auto per_lane) { stream.launch(route_tokens<T, decltype(per_lane)::value>, grid, route); });
  });
}

}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("route_topk_softmax", TORCH_BOX(&ferrum::cuda::route_topk_softmax));
}
