// Orders of the (token, slot) pairs: stable counting sorts over the experts. A few thousand integers at most, so they
// stay on one thread.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "checks/moe_routing.h"
#include "cpu/allocate.h"

namespace ferrum::cpu {
namespace {

bool inside(int32_t id, int64_t num_experts) { return id >= 0 && id < num_experts; }

// First row of each expert [num_experts + 1] when its pairs are laid out one expert after the other.
template <typename ExpertOf>
std::vector<int32_t> first_rows(int64_t pairs, int64_t num_experts, ExpertOf expert_of) {
  std::vector<int32_t> first(static_cast<size_t>(num_experts) + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) {
    const int32_t expert = expert_of(p);
    if (inside(expert, num_experts)) {
      ++first[static_cast<size_t>(expert) + 1];
    }
  }
  std::partial_sum(first.begin(), first.end(), first.begin());
  return first;
}

// The packed row of every pair, or -1.
void number_pairs(const int32_t* ids, int64_t pairs, int64_t num_experts, std::vector<int32_t> next,
                  int32_t* pairs_by_token) {
  for (int64_t p = 0; p < pairs; ++p) {
    pairs_by_token[p] = inside(ids[p], num_experts) ? next[static_cast<size_t>(ids[p])]++ : -1;
  }
}

std::tuple<Tensor, Tensor, Tensor> moe_build_pairs_by_token(const Tensor& topk_ids, int64_t num_experts) {
  check_topk_ids("moe_build_pairs_by_token", topk_ids, num_experts);
  const int64_t pairs = topk_ids.numel(), top_k = topk_ids.size(1);
  const int32_t* ids = data<int32_t>(topk_ids);
  Tensor pairs_by_token = allocate(topk_ids, {pairs});
  Tensor packed_token_idx = allocate(topk_ids, {pairs});
  Tensor expert_offsets = allocate(topk_ids, {num_experts + 1});
  const std::vector<int32_t> first = first_rows(pairs, num_experts, [&](int64_t p) { return ids[p]; });
  std::copy(first.begin(), first.end(), mutable_data<int32_t>(expert_offsets));

  int32_t* rows = mutable_data<int32_t>(pairs_by_token);
  number_pairs(ids, pairs, num_experts, first, rows);
  int32_t* tokens = mutable_data<int32_t>(packed_token_idx);
  std::fill(tokens + first.back(), tokens + pairs, -1);
  for (int64_t t = 0, p = 0; t < topk_ids.size(0); ++t) {
    for (int64_t j = 0; j < top_k; ++j, ++p) {
      if (rows[p] >= 0) {
        tokens[rows[p]] = static_cast<int32_t>(t);
      }
    }
  }
  return {pairs_by_token, packed_token_idx, expert_offsets};
}

std::tuple<Tensor, Tensor, Tensor> moe_align_block_size(const Tensor& topk_ids, int64_t num_experts, int64_t block_size,
                                                        bool pair_ids, const std::optional<Tensor>& expert_map) {
  const AlignArguments a = check_align(topk_ids, num_experts, block_size, expert_map);
  const int32_t* ids = data<int32_t>(topk_ids);
  const int32_t* map = a.expert_map;
  const int64_t pairs = topk_ids.numel(), blocks = a.blocks;
  Tensor sorted_token_ids = allocate(topk_ids, {blocks * block_size});
  Tensor block_ids = allocate(topk_ids, {blocks});
  Tensor total_post_pad = allocate(topk_ids, {1});
  int32_t* sorted = mutable_data<int32_t>(sorted_token_ids);
  int32_t* block_experts = mutable_data<int32_t>(block_ids);

  const auto expert_of = [&](int64_t p) {
    const int32_t id = ids[p];
    return map == nullptr ? id : inside(id, num_experts) ? map[id] : -1;
  };
  const std::vector<int32_t> first = first_rows(pairs, num_experts, expert_of);
  std::vector<int32_t> next(static_cast<size_t>(num_experts));
  int64_t block = 0;
  for (size_t e = 0; e < next.size(); ++e) {
    next[e] = static_cast<int32_t>(block * block_size);
    const int64_t last = block + (first[e + 1] - first[e] + block_size - 1) / block_size;
    std::fill(block_experts + block, block_experts + last, static_cast<int32_t>(e));
    block = last;
  }
  std::fill(block_experts + block, block_experts + blocks, -1);
  *mutable_data<int32_t>(total_post_pad) = static_cast<int32_t>(block * block_size);

  std::vector<int32_t> packed_rows;
  if (!pair_ids) {
    packed_rows.resize(static_cast<size_t>(pairs));
    const auto by_id = [&](int64_t p) { return ids[p]; };
    number_pairs(ids, pairs, num_experts, first_rows(pairs, num_experts, by_id), packed_rows.data());
  }
  std::fill(sorted, sorted + blocks * block_size, static_cast<int32_t>(pairs));
  for (int64_t p = 0; p < pairs; ++p) {
    const int32_t expert = expert_of(p);
    if (inside(expert, num_experts)) {
      const int32_t entry = pair_ids ? static_cast<int32_t>(p) : packed_rows[static_cast<size_t>(p)];
      sorted[next[static_cast<size_t>(expert)]++] = entry;
    }
  }
  return {sorted_token_ids, block_ids, total_post_pad};
}

std::tuple<Tensor, Tensor, Tensor> moe_compute_ids_tpe(const Tensor& topk_ids, int64_t num_experts,
                                                       std::vector<int64_t> out_features) {
  check_ids_tpe(topk_ids, num_experts, out_features);
  const int64_t pairs = topk_ids.numel(), products = static_cast<int64_t>(out_features.size());
  const int32_t* ids = data<int32_t>(topk_ids);
  Tensor tokens_per_expert = allocate(topk_ids, {num_experts});
  Tensor ids_per_expert = allocate(topk_ids, {num_experts, pairs});
  Tensor dispatch = allocate(topk_ids, {products, 3});
  int32_t* counts = mutable_data<int32_t>(tokens_per_expert);
  int32_t* lists = mutable_data<int32_t>(ids_per_expert);
  std::fill(counts, counts + num_experts, 0);
  std::fill(lists, lists + num_experts * pairs, -1);
  for (int64_t p = 0; p < pairs; ++p) {
    if (inside(ids[p], num_experts)) {
      lists[ids[p] * pairs + counts[ids[p]]++] = static_cast<int32_t>(p);
    }
  }
  const int32_t most = *std::max_element(counts, counts + num_experts);
  int32_t* grid = mutable_data<int32_t>(dispatch);
  for (int64_t features : out_features) {
    *grid++ = std::max((most + kDispatchRows - 1) / kDispatchRows, 1);
    *grid++ = static_cast<int32_t>((features + kDispatchColumns - 1) / kDispatchColumns);
    *grid++ = static_cast<int32_t>(num_experts);
  }
  return {tokens_per_expert, ids_per_expert, dispatch};
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("moe_align_block_size", TORCH_BOX(&ferrum::cpu::moe_align_block_size));
  m.impl("moe_build_pairs_by_token", TORCH_BOX(&ferrum::cpu::moe_build_pairs_by_token));
  m.impl("moe_compute_ids_tpe", TORCH_BOX(&ferrum::cpu::moe_compute_ids_tpe));
}
