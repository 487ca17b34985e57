// moe_compute_ids_tpe: the pairs of every expert as a list, and the grid of an indirect dispatch over them.
//
// Floor: the lists, 4*E*P bytes, written once. One block per expert reads all ids, 4*P bytes from the second-level
// cache, twice: as many bytes as it writes or two times that, for an order that needs no atomic.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks/moe_routing.h"
#include "cuda/reduce.cuh"

namespace ferrum::cuda {
namespace {

constexpr int kListThreads = 256, kListWarps = kListThreads / 32;
constexpr int kMaxProducts = 64;  // of one launch

__global__ void __launch_bounds__(kListThreads)
    list_pairs(const int32_t* ids, int64_t pairs, int32_t* tokens_per_expert, int32_t* ids_per_expert) {
  __shared__ int32_t scratch[kListWarps];
  const int32_t expert = static_cast<int32_t>(blockIdx.x);
  const unsigned lane = threadIdx.x % 32;
  // Consecutive pairs for each warp, in whole groups of 32.
  const int64_t groups = (pairs + 31) / 32, share = (groups + kListWarps - 1) / kListWarps * 32;
  const int64_t begin = threadIdx.x / 32 * share, end = min(begin + share, pairs);
  int32_t count = 0;
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t pair = first + lane;
    count += __popc(__ballot_sync(kFullWarp, pair < end && ids[pair] == expert));
  }
  const auto running = block_running_sum(lane == 0 ? count : 0, scratch);
  const int32_t total = running.total;
  int32_t next = __shfl_sync(kFullWarp, running.exclusive, 0);
  int32_t* const list = ids_per_expert + static_cast<int64_t>(expert) * pairs;
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t pair = first + lane;
    const bool mine = pair < end && ids[pair] == expert;
    const unsigned votes = __ballot_sync(kFullWarp, mine);
    if (mine) {
      list[next + __popc(votes & ((1u << lane) - 1))] = static_cast<int32_t>(pair);
    }
    next += __popc(votes);
  }
  for (int64_t i = total + static_cast<int64_t>(threadIdx.x); i < pairs; i += kListThreads) {
    list[i] = -1;
  }
  if (threadIdx.x == 0) {
    tokens_per_expert[expert] = total;
  }
}

struct Products {
  int32_t columns[kMaxProducts];  // threadgroups across
  int32_t count;
};

__global__ void __launch_bounds__(kListThreads)
    write_dispatch(const int32_t* tokens_per_expert, int32_t num_experts, Products products, int32_t* dispatch) {
  __shared__ int32_t scratch[kListWarps];
  int32_t most = 0;
  for (int32_t expert = static_cast<int32_t>(threadIdx.x); expert < num_experts; expert += kListThreads) {
    most = max(most, tokens_per_expert[expert]);
  }
  most = row_max(most, scratch);
  const int32_t product = static_cast<int32_t>(threadIdx.x);
  if (product < products.count) {
    dispatch[3 * product] = max((most + kDispatchRows - 1) / kDispatchRows, 1);
    dispatch[3 * product + 1] = products.columns[product];
    dispatch[3 * product + 2] = num_experts;
  }
}

std::tuple<Tensor, Tensor, Tensor> moe_compute_ids_tpe(const Tensor& topk_ids, int64_t num_experts,
                                                       std::vector<int64_t> out_features) {
  check_ids_tpe(topk_ids, num_experts, out_features);
  const int64_t pairs = topk_ids.numel(), all = static_cast<int64_t>(out_features.size());
  Tensor tokens_per_expert = new_output(topk_ids, {num_experts});
  Tensor ids_per_expert = new_output(topk_ids, {num_experts, pairs});
  Tensor dispatch = new_output(topk_ids, {all, 3});
  int32_t* const counts = mutable_data<int32_t>(tokens_per_expert);
  const Stream stream("moe_compute_ids_tpe", topk_ids);
  stream.launch(list_pairs, Grid{dim3(static_cast<unsigned>(num_experts)), dim3(kListThreads)}, data<int32_t>(topk_ids),
                pairs, counts, mutable_data<int32_t>(ids_per_expert));
  for (int64_t first = 0; first < all; first += kMaxProducts) {
    Products products{};
    products.count = static_cast<int32_t>(std::min<int64_t>(all - first, kMaxProducts));
    for (int32_t i = 0; i < products.count; ++i) {
      const int64_t features = out_features[static_cast<size_t>(first + i)];
      products.columns[i] = static_cast<int32_t>((features + kDispatchColumns - 1) / kDispatchColumns);
    }
    stream.launch(write_dispatch, Grid{dim3(1), dim3(kListThreads)}, counts, num_experts, products,
                  mutable_data<int32_t>(dispatch) + 3 * first);
  }
  return {tokens_per_expert, ids_per_expert, dispatch};
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("moe_compute_ids_tpe", TORCH_BOX(&ferrum::cuda::moe_compute_ids_tpe));
}
