// moe_experts_int4 on the CPU: argument checks and the order of the phases. The phases are in moe_gemm_phases.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>

#include "cpu/allocate.h"
#include "cpu/int4_args.h"
#include "cpu/moe_gemm_phases.h"

namespace ferrum::cpu {
namespace {

constexpr const char* kOp = "moe_experts_int4";
// Tokens handled at a time: bounds the scratch memory. By then an expert has rows enough that reading its weights again
// for the next chunk costs little beside the arithmetic.
constexpr int64_t kTokensPerChunk = 1024;

// Checks a permutation tensor [E, (parts,) K_packed] and returns K_packed; without one, `features` rounded up.
int64_t packed_rows_of(const char* name, const std::optional<Tensor>& perm, int64_t dims, int64_t features) {
  if (!perm) {
    return int4::round_up(features, int4::kLineRows);
  }
  check_dtype(kOp, name, *perm, ScalarType::Int);
  FERRUM_CHECK(perm->dim() == dims, kOp, name, "expected ", dims, " dimensions, got shape ", shape_string(*perm));
  const int64_t rows = perm->size(dims - 1);
  FERRUM_CHECK(rows >= 1 && rows % int4::kLineRows == 0, kOp, name, "expected K_packed a multiple of 8, got shape ",
               shape_string(*perm));
  check_contiguous(kOp, name, *perm);
  return rows;
}

ExpertMatrices matrices(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                        const std::optional<Tensor>& perm, int64_t perm_parts, int64_t group_size) {
  const int64_t tiles = codes.size(1);
  const int64_t lines = codes.size(2);
  const PackedWeights first = packed_weights(codes, scales, zeros, 0, tiles, lines, group_size);
  return {first, tiles, perm ? data<int32_t>(*perm) : nullptr, perm_parts, group_size};
}

}  // namespace

Tensor moe_experts_int4(const Tensor& hidden, const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& w13,
                        const Tensor& w13_scales, std::optional<Tensor> w13_zeros, std::optional<Tensor> w13_perm,
                        int64_t w13_group_size, const Tensor& w2, const Tensor& w2_scales,
                        std::optional<Tensor> w2_zeros, std::optional<Tensor> w2_perm, int64_t w2_group_size,
                        int64_t intermediate_size, std::string activation) {
  const bool int8 = check_int8_activation(kOp, activation);
  check_activation(kOp, "hidden", hidden);
  check_shape(kOp, "hidden", hidden, {-1, -1});
  check_contiguous(kOp, "hidden", hidden);
  const int64_t tokens = hidden.size(0);
  const int64_t hidden_size = hidden.size(1);
  FERRUM_CHECK(hidden_size >= 1, kOp, "hidden", "expected at least 1 channel, got shape ", shape_string(hidden));
  check_dtype(kOp, "topk_ids", topk_ids, ScalarType::Int);
  check_shape(kOp, "topk_ids", topk_ids, {tokens, -1});
  check_contiguous(kOp, "topk_ids", topk_ids);
  const int64_t top_k = topk_ids.size(1);
  check_dtype(kOp, "topk_weights", topk_weights, ScalarType::Float);
  check_shape(kOp, "topk_weights", topk_weights, {tokens, top_k});
  check_contiguous(kOp, "topk_weights", topk_weights);
  FERRUM_CHECK(intermediate_size >= 1, kOp, "intermediate_size", "expected at least 1, got ", intermediate_size);
  check_group_size(kOp, "w13_group_size", w13_group_size);
  check_group_size(kOp, "w2_group_size", w2_group_size);
  check_shape(kOp, "w13", w13, {-1, -1, -1, int4::kLineBytes});
  const int64_t experts = w13.size(0);

  const int64_t w13_rows = packed_rows_of("w13_perm", w13_perm, 3, hidden_size);
  int64_t perm_parts = 1;
  if (w13_perm) {
    perm_parts = w13_perm->size(1);
    FERRUM_CHECK(w13_perm->size(0) == experts && (perm_parts == 1 || perm_parts == 2), kOp, "w13_perm",
                 "expected shape (", experts, ", 1 or 2, K_packed), got ", shape_string(*w13_perm));
  }
  const int64_t w2_rows = packed_rows_of("w2_perm", w2_perm, 2, intermediate_size);
  if (w2_perm) {
    check_shape(kOp, "w2_perm", *w2_perm, {experts, w2_rows});
  }
  check_packed({kOp, "w13", "w13_scales", "w13_zeros"}, w13, w13_scales, w13_zeros, experts,
               2 * int4::ceil_div(intermediate_size, int4::kTileColumns), w13_rows / int4::kLineRows, w13_group_size);
  check_packed({kOp, "w2", "w2_scales", "w2_zeros"}, w2, w2_scales, w2_zeros, experts,
               int4::ceil_div(hidden_size, int4::kTileColumns), w2_rows / int4::kLineRows, w2_group_size);

  Tensor out = allocate(hidden, {tokens, hidden_size});
  ExpertBlock block{int4_kernels(),
                    int8,
                    experts,
                    hidden_size,
                    intermediate_size,
                    top_k,
                    float_type(hidden),
                    matrices(w13, w13_scales, w13_zeros, w13_perm, perm_parts, w13_group_size),
                    matrices(w2, w2_scales, w2_zeros, w2_perm, 1, w2_group_size)};
  for (int64_t first = 0; first < tokens; first += kTokensPerChunk) {
    const int64_t bytes = hidden_size * float_bytes(block.type);
    const TokenChunk chunk{std::min(kTokensPerChunk, tokens - first), data<char>(hidden) + first * bytes,
                           data<int32_t>(topk_ids) + first * top_k, data<float>(topk_weights) + first * top_k,
                           mutable_data<char>(out) + first * bytes};
    const PermStatus status = run_expert_block(block, chunk);
    FERRUM_CHECK(status != PermStatus::bad_w13, kOp, "w13_perm", "expected entries from -1 to ", hidden_size - 1,
                 ", got one outside");
    FERRUM_CHECK(status != PermStatus::bad_w2, kOp, "w2_perm", "expected entries from -1 to ", intermediate_size - 1,
                 ", got one outside");
  }
  return out;
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) { m.impl("moe_experts_int4", TORCH_BOX(&moe_experts_int4)); }

}  // namespace
}  // namespace ferrum::cpu
