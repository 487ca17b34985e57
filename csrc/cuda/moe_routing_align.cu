// moe_align_block_size: the pairs sorted by expert, every expert padded to whole blocks; route_topk_align, which
// chooses their experts first.
//
// Floor: 4*P bytes of ids (or T*E logits) read, the capacity written once; of a decode step, the latency of one launch.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/moe_routing_sort.cuh"
#include "cuda/moe_routing_topk.cuh"

namespace ferrum::cuda {
namespace {

struct Blocks {
  int32_t* sorted_token_ids;  // [blocks * block_size]
  int32_t* block_ids;         // [blocks]
  int32_t* total_post_pad;
  int64_t blocks;
  int32_t block_size;
};

// `padded` [num_experts]: where each expert starts. By all blocks of a launch.
__device__ void write_block_ids(const Pairs& pairs, const int32_t* padded, const Blocks& out) {
  const int32_t total = *out.total_post_pad;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; block < out.blocks; block += step) {
    const int64_t row = block * out.block_size;
    // How many experts start at or before this row. The last of them owns it: one without pairs starts where the next
    // one does.
    int32_t low = 0, high = pairs.num_experts;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (padded[middle] <= row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    out.block_ids[block] = row < total ? low - 1 : -1;
  }
}

// `padded` [num_experts]: where the chunk's pairs of each expert start.
__device__ void write_entries(const Pairs& pairs, const Ranked& ranked, const int32_t* padded,
                              const int32_t (&entries)[kSteps], const Blocks& out) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (ranked.expert[step] >= 0) {
      out.sorted_token_ids[padded[ranked.expert[step]] + ranked.rank[step]] = entries[step];
    }
  }
}

// `pairs_by_token` gives the entry of each pair; null: its number.
__global__ void __launch_bounds__(1024)
    write_chunk_blocks(Pairs pairs, const int32_t* padded, const int32_t* pairs_by_token, Blocks out) {
  FERRUM_DYNAMIC_SHARED(uint16_t, table);
  const int64_t chunk = blockIdx.x, first = chunk * pairs.steps * blockDim.x;
  const Ranked ranked = rank_chunk(pairs, first, table, nullptr);
  int32_t entries[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t pair = pairs.index(first, step);
    entries[step] =
        pairs_by_token != nullptr && ranked.expert[step] >= 0 ? pairs_by_token[pair] : static_cast<int32_t>(pair);
  }
  write_entries(pairs, ranked, padded + chunk * pairs.num_experts, entries, out);
  write_block_ids(pairs, padded, out);
}

// By the one block of a launch. `shared`: two arrays of the experts and the table of rank_chunk.
__device__ __forceinline__ void align_pairs(const Pairs& pairs, bool pair_ids, const Blocks& out, int32_t* shared,
                                            int32_t* scratch) {
  const int32_t experts = pairs.num_experts;
  int32_t* const totals = shared;
  int32_t* const starts = shared + experts;
  uint16_t* const table = reinterpret_cast<uint16_t*>(shared + 2 * experts);
  write_padding(pairs, out.sorted_token_ids, out.blocks * out.block_size);
  int32_t entries[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    entries[step] = static_cast<int32_t>(pairs.index(0, step));
  }
  if (!pair_ids) {  // packed rows follow the ids, whatever the map
    Pairs by_id = pairs;
    by_id.expert_map = nullptr;
    const Ranked ranked = rank_chunk(by_id, 0, table, totals);
    find_starts({totals, starts, nullptr, nullptr, 1, experts, 1}, scratch);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      entries[step] = ranked.expert[step] < 0 ? -1 : starts[ranked.expert[step]] + ranked.rank[step];
    }
    __syncthreads();
  }
  const Ranked ranked = rank_chunk(pairs, 0, table, totals);
  find_starts({totals, starts, nullptr, out.total_post_pad, 1, experts, out.block_size}, scratch);
  write_entries(pairs, ranked, starts, entries, out);
  write_block_ids(pairs, starts, out);
}

// The launch has one block; left to itself the compiler spills to fit two into a multiprocessor.
__global__ void __launch_bounds__(1024, 1) align_blocks(Pairs pairs, bool pair_ids, Blocks out) {
  __shared__ int32_t scratch[kMaxWarps];
  FERRUM_DYNAMIC_SHARED(int32_t, shared);
  wait_for_previous_kernel();
  start_next_kernel();
  align_pairs(pairs, pair_ids, out, shared, scratch);
}

constexpr int kRouteWarps = 16;  // of the one block, each with a token of its own: registers for 1024 logits fit

// `pairs` without ids, which are chosen here and stay in shared memory for their sorting.
template <typename T, int kPerLane>
__global__ void __launch_bounds__(32 * kRouteWarps, 1) route_and_align(Route<T> route, Pairs pairs, Blocks out) {
  __shared__ int32_t scratch[kMaxWarps];
  FERRUM_DYNAMIC_SHARED(int32_t, shared);
  wait_for_previous_kernel();
  start_next_kernel();
  int32_t* const ids = shared;  // the sorting's memory lies behind them
  const int token = static_cast<int>(threadIdx.x / 32);
  if (token < route.tokens) {
    route_token<T, kPerLane>(route, token, ids + token * route.top_k);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < pairs.count; i += static_cast<int>(blockDim.x)) {
    route.ids[i] = ids[i];
  }
  pairs.ids = ids;
  align_pairs(pairs, true, out, ids + pairs.count, scratch);
}

void align(const Stream& stream, const SortConfig& config, const Pairs& pairs, bool pair_ids, const Tensor& like,
           const Blocks& out) {
  const Grid grid = grid_of(config, pairs.num_experts);
  if (config.one_launch) {
    return stream.launch_early(align_blocks, grid, pairs, pair_ids, out);
  }
  Tensor packed_rows = new_output(like, {pair_ids ? 0 : pairs.count});
  Tensor offsets = new_output(like, {pair_ids ? 0 : pairs.num_experts + 1});
  if (!pair_ids) {  // packed rows follow the ids, whatever the map
    Pairs by_id = pairs;
    by_id.expert_map = nullptr;
    launch_packed_rows(stream, config, by_id, like,
                       {mutable_data<int32_t>(packed_rows), nullptr, mutable_data<int32_t>(offsets), 1});
  }
  Tensor totals = new_output(like, {config.chunks, pairs.num_experts});
  Tensor first = new_output(like, {config.chunks, pairs.num_experts});
  int32_t* const starts = mutable_data<int32_t>(first);
  launch_starts(
      stream, config, pairs, mutable_data<int32_t>(totals),
      {data<int32_t>(totals), starts, nullptr, out.total_post_pad, config.chunks, pairs.num_experts, out.block_size},
      {out.sorted_token_ids, out.blocks * out.block_size});
  stream.launch(write_chunk_blocks, grid, pairs, starts, pair_ids ? nullptr : data<int32_t>(packed_rows), out);
}

std::tuple<Tensor, Tensor, Tensor> moe_align_block_size(const Tensor& topk_ids, int64_t num_experts, int64_t block_size,
                                                        bool pair_ids, const std::optional<Tensor>& expert_map) {
  const char* op = "moe_align_block_size";
  const AlignArguments a = check_align(topk_ids, num_experts, block_size, expert_map);
  const SortConfig config = check_sort(op, topk_ids.numel(), num_experts);
  if (expert_map.has_value()) {
    check_device(op, topk_ids, {{"expert_map", *expert_map}});
  }
  Tensor sorted_token_ids = new_output(topk_ids, {a.blocks * block_size});
  Tensor block_ids = new_output(topk_ids, {a.blocks});
  Tensor total_post_pad = new_output(topk_ids, {1});
  const Blocks out{mutable_data<int32_t>(sorted_token_ids), mutable_data<int32_t>(block_ids),
                   mutable_data<int32_t>(total_post_pad), a.blocks, static_cast<int32_t>(block_size)};
  align(Stream(op, topk_ids), config, pairs_of(topk_ids, num_experts, a.expert_map, config), pair_ids, topk_ids, out);
  return {sorted_token_ids, block_ids, total_post_pad};
}

// A warp for each token, a thread for each pair and each expert as far as a block goes; no warps where it cannot hold
// them.
constexpr SortConfig pick_route_config(int64_t tokens, int64_t top_k, int64_t num_experts) {
  const int64_t pairs = tokens * top_k;
  if (tokens > kRouteWarps || pairs > kSteps * 32 * kRouteWarps) {
    return {};
  }
  const int64_t threads = pairs > num_experts ? pairs : num_experts, wanted = (threads + 31) / 32;
  const int64_t most = wanted > tokens ? wanted : tokens;
  const int warps = most < kRouteWarps ? static_cast<int>(most) : kRouteWarps;
  return {warps, static_cast<int>((pairs + 32 * warps - 1) / (32 * warps)), 1, true};
}
static_assert(pick_route_config(2, 8, 128).warps == 4 && pick_route_config(16, 8, 128).warps == 16);
static_assert(pick_route_config(16, 8, 128).steps == 1 && pick_route_config(16, 128, 128).steps == kSteps);
static_assert(pick_route_config(17, 8, 128).warps == 0 && pick_route_config(16, 129, 1024).warps == 0);
static_assert(pick_route_config(0, 1, 1).warps == 1 && pick_route_config(1, 1024, 1024).steps == 2);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_topk_align(const Tensor& logits, int64_t top_k,
                                                                    bool renormalize, int64_t block_size) {
  const char* op = "route_topk_align";
  const RouteArguments a = check_route(op, logits, top_k);
  const int64_t pairs = a.tokens * top_k, blocks = check_blocks(op, "logits", pairs, a.num_experts, block_size);
  const auto integers = [&](int64_t count) { return new_output(logits, {count}, ScalarType::Int); };
  Tensor ids = new_output(logits, {a.tokens, top_k}, ScalarType::Int);
  Tensor weights = new_output(logits, {a.tokens, top_k}, ScalarType::Float);
  Tensor sorted_token_ids = integers(blocks * block_size), block_ids = integers(blocks), total_post_pad = integers(1);
  const Blocks out{mutable_data<int32_t>(sorted_token_ids), mutable_data<int32_t>(block_ids),
                   mutable_data<int32_t>(total_post_pad), blocks, static_cast<int32_t>(block_size)};
  const Stream stream(op, logits);
  const SortConfig config = pick_route_config(a.tokens, top_k, a.num_experts);
  if (config.warps > 0) {
    Grid grid = grid_of(config, a.num_experts);
    grid.shared_bytes += pairs * sizeof(int32_t);
    const Pairs unchosen{nullptr, nullptr, pairs, static_cast<int32_t>(a.num_experts), config.steps};
    for_dtype(a.dtype, [&](auto type) {
      using T = decltype(type);
      const Route<T> route = route_of<T>(a, logits, renormalize, ids, weights);
      for_logits_per_lane(a.num_experts, [&](auto per_lane) {
        stream.launch_early(route_and_align<T, decltype(per_lane)::value>, grid, route, unchosen, out);
      });
    });
  } else {
    launch_route(stream, a, logits, renormalize, ids, weights);
    const SortConfig sort = check_sort(op, pairs, a.num_experts);
    align(stream, sort, pairs_of(ids, a.num_experts, nullptr, sort), true, ids, out);
  }
  return {ids, weights, sorted_token_ids, block_ids, total_post_pad};
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("moe_align_block_size", TORCH_BOX(&ferrum::cuda::moe_align_block_size));
  m.impl("route_topk_align", TORCH_BOX(&ferrum::cuda::route_topk_align));
}
