// marlin_moe_gemm: the tiles of marlin_gemm over blocks of rows of one expert each.
#include <torch/csrc/stable/library.h>

#include "cuda/marlin_run.cuh"

namespace ferrum::cuda {
namespace {

Tensor marlin_moe_gemm(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                       const std::optional<Tensor>& perm, const std::optional<Tensor>& bias,
                       const Tensor& sorted_token_ids, const Tensor& block_ids, const Tensor& total_post_pad,
                       const std::optional<Tensor>& topk_weights, const Tensor& workspace, int64_t top_k,
                       int64_t block_size, int64_t out_features, int64_t group_size, int64_t bits,
                       const std::string& epilogue, const std::string& reduction, int64_t max_sms, int64_t slots) {
  const char* op = "marlin_moe_gemm";
  FERRUM_CHECK(epilogue == "none" || epilogue == "silu_mul", op, "epilogue",
               "expected one of ('none', 'silu_mul'), got '", epilogue, "'");
  FERRUM_CHECK(x.dim() == 2 && top_k >= 1, op, "x, top_k", "expected (M, K) and at least 1, got ", shape_string(x),
               " and ", top_k);
  const bool silu_mul = epilogue == "silu_mul";
  const int64_t columns = silu_mul ? 2 * kMarlinGateRun * divide_up(out_features, kMarlinGateRun) : out_features;
  const int64_t experts = packed.dim() > 0 ? packed.size(0) : 0, count = x.size(0) * top_k;
  MarlinCall call{op,   x,       packed, scales, zeros,   perm,     bias,    workspace,
                  bits, max_sms, {},     {},     columns, silu_mul, nullptr, slots};
  call.arguments = check_marlin(op, x, packed, scales, zeros, perm, workspace, experts, columns, group_size, bits,
                                reduction, max_sms);
  check_marlin_bias(op, bias, experts, columns);
  FERRUM_CHECK(slots >= 1 && slots <= kMarlinNamedRows && count % slots == 0, op, "slots", "expected a divisor of ",
               count, " rows, from 1 to ", kMarlinNamedRows, ", got ", slots);
  check_marlin_blocks(op, sorted_token_ids, block_ids, total_post_pad, topk_weights, count, block_size);
  check_device(op, x,
               {{"sorted_token_ids", sorted_token_ids}, {"block_ids", block_ids}, {"total_post_pad", total_post_pad}});
  if (topk_weights.has_value()) {
    check_device(op, x, {{"topk_weights", *topk_weights}});
    call.topk_weights = data<float>(*topk_weights);
  }
  call.rows.sorted_ids = data<int32_t>(sorted_token_ids);
  call.rows.block_ids = data<int32_t>(block_ids);
  call.rows.used_entries = data<int32_t>(total_post_pad);
  call.rows.entries = narrow(op, "sorted_token_ids", sorted_token_ids.numel());
  call.rows.count = narrow(op, "x, top_k", count);
  call.rows.block_size = static_cast<int>(block_size);
  call.rows.experts = static_cast<int>(narrow(op, "packed", experts));
  call.rows.top_k = static_cast<int>(narrow(op, "top_k", top_k));
  if (call.rows.entries == 0 && slots > 1) {  // sums of nothing: rows that nothing names
    call.rows.count = count / slots;
    call.slots = 1;
  }
  Tensor out = new_output(x, {count / slots, out_features});
  if (out.numel() > 0) {
    run_marlin(call, out);
  }
  return out;
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("marlin_moe_gemm", TORCH_BOX(&ferrum::cuda::marlin_moe_gemm));
}
