// moe_build_pairs_by_token: the packed order of the pairs.
//
// Floor: 4*P bytes of ids read, twice that written; of a decode step, the latency of one launch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/moe_routing_sort.cuh"

namespace ferrum::cuda {
namespace {

__global__ void __launch_bounds__(1024) count_chunks(Pairs pairs, int32_t* totals, Padding padding) {
  FERRUM_DYNAMIC_SHARED(uint16_t, table);
  const int64_t chunk = blockIdx.x;
  if (padding.entries != nullptr) {
    write_padding(pairs, padding.entries, padding.count);
  }
  rank_chunk(pairs, chunk * pairs.steps * blockDim.x, table, totals + chunk * pairs.num_experts);
}

__global__ void __launch_bounds__(1024) find_chunk_starts(Starts starts) {
  __shared__ int32_t scratch[kMaxWarps];
  find_starts(starts, scratch);
}

// `rows` [num_experts]: where the chunk's pairs of each expert start.
__device__ void write_rows(const Pairs& pairs, int64_t first, const Ranked& ranked, const int32_t* rows,
                           const PackedRows& out) {
  const int32_t kept = out.expert_offsets[pairs.num_experts];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t pair = pairs.index(first, step);
    if (step >= pairs.steps || pair >= pairs.count) {
      continue;
    }
    const int32_t expert = ranked.expert[step];
    const int32_t row = expert < 0 ? -1 : rows[expert] + ranked.rank[step];
    out.pairs_by_token[pair] = row;
    if (out.packed_token_idx != nullptr && row >= 0) {
      out.packed_token_idx[row] = static_cast<int32_t>(pair / out.top_k);
    }
    if (out.packed_token_idx != nullptr && pair >= kept) {
      out.packed_token_idx[pair] = -1;
    }
  }
}

__global__ void __launch_bounds__(1024) write_chunk_rows(Pairs pairs, const int32_t* rows, PackedRows out) {
  FERRUM_DYNAMIC_SHARED(uint16_t, table);
  const int64_t chunk = blockIdx.x, first = chunk * pairs.steps * blockDim.x;
  const Ranked ranked = rank_chunk(pairs, first, table, nullptr);
  write_rows(pairs, first, ranked, rows + chunk * pairs.num_experts, out);
}

// The launch has one block; left to itself the compiler spills to fit two into a multiprocessor.
__global__ void __launch_bounds__(1024, 1) build_rows(Pairs pairs, PackedRows out) {
  __shared__ int32_t scratch[kMaxWarps];
  FERRUM_DYNAMIC_SHARED(int32_t, shared);
  int32_t* const totals = shared;
  uint16_t* const table = reinterpret_cast<uint16_t*>(shared + pairs.num_experts);
  const Ranked ranked = rank_chunk(pairs, 0, table, totals);
  find_starts({totals, nullptr, out.expert_offsets, nullptr, 1, pairs.num_experts, 1}, scratch);
  write_rows(pairs, 0, ranked, out.expert_offsets, out);
}

}  // namespace

void launch_starts(const Stream& stream, const SortConfig& config, const Pairs& pairs, int32_t* totals,
                   const Starts& starts, const Padding& padding) {
  stream.launch(count_chunks, grid_of(config, pairs.num_experts), pairs, totals, padding);
  stream.launch(find_chunk_starts, Grid{dim3(1), dim3(1024)}, starts);
}

void launch_packed_rows(const Stream& stream, const SortConfig& config, const Pairs& pairs, const Tensor& like,
                        const PackedRows& out) {
  const Grid grid = grid_of(config, pairs.num_experts);
  if (config.one_launch) {
    return stream.launch(build_rows, grid, pairs, out);
  }
  Tensor totals = new_output(like, {config.chunks, pairs.num_experts});
  Tensor rows = new_output(like, {config.chunks, pairs.num_experts});
  int32_t* const starts = mutable_data<int32_t>(rows);
  launch_starts(stream, config, pairs, mutable_data<int32_t>(totals),
                {data<int32_t>(totals), starts, out.expert_offsets, nullptr, config.chunks, pairs.num_experts, 1}, {});
  stream.launch(write_chunk_rows, grid, pairs, starts, out);
}

namespace {

std::tuple<Tensor, Tensor, Tensor> moe_build_pairs_by_token(const Tensor& topk_ids, int64_t num_experts) {
  const char* op = "moe_build_pairs_by_token";
  check_topk_ids(op, topk_ids, num_experts);
  const int64_t pairs = topk_ids.numel();
  const SortConfig config = check_sort(op, pairs, num_experts);
  Tensor pairs_by_token = new_output(topk_ids, {pairs});
  Tensor packed_token_idx = new_output(topk_ids, {pairs});
  Tensor expert_offsets = new_output(topk_ids, {num_experts + 1});
  const PackedRows out{mutable_data<int32_t>(pairs_by_token), mutable_data<int32_t>(packed_token_idx),
                       mutable_data<int32_t>(expert_offsets), topk_ids.size(1)};
  launch_packed_rows(Stream(op, topk_ids), config, pairs_of(topk_ids, num_experts, nullptr, config), topk_ids, out);
  return {pairs_by_token, packed_token_idx, expert_offsets};
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("moe_build_pairs_by_token", TORCH_BOX(&ferrum::cuda::moe_build_pairs_by_token));
}
