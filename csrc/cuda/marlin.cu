// marlin_gemm, and what it shares with marlin_moe_gemm: the activations in the order of the packed rows, the choice of
// tiles, the memory for partial sums.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cuda/marlin_run.cuh"
#include "cuda/marlin_wgmma.h"

namespace ferrum::cuda {
namespace {

constexpr int kGatherThreads = 128;

__global__ void __launch_bounds__(kGatherThreads) gather_rows(MarlinGather g) {
  wait_for_previous_kernel();
  start_next_kernel();
  const int64_t row = blockIdx.x;
  int64_t source = row;
  const int32_t* perm = g.perm;
  if (g.rows.by_entry) {
    if (row >= *g.rows.used_entries) {
      return;
    }
    const int32_t id = g.rows.sorted_ids[row];
    const int32_t expert = g.rows.block_ids[row / g.rows.block_size];
    if (!g.rows.names(id, expert)) {
      return;
    }
    source = id / g.rows.top_k;
    perm += expert * g.perm_expert;
  }
  const uint16_t* const from = g.x + source * g.x_stride;
  for (int j = (blockIdx.y * kGatherThreads + threadIdx.x) * 8; j < g.packed_rows;
       j += gridDim.y * kGatherThreads * 8) {
    Vec<uint16_t, 8> values;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = perm != nullptr ? perm[j + i] : j + i;
      values.values[i] = column >= 0 && column < g.in_features ? from[column] : uint16_t{0};
    }
    *reinterpret_cast<Vec<uint16_t, 8>*>(g.out + row * g.packed_rows + j) = values;
  }
}

template <typename T>
MarlinProduct<T> product_of(const MarlinCall& call, const Tensor& out) {
  const MarlinArguments& a = call.arguments;
  const int64_t lead = call.packed.dim() - 2, pieces = call.bits * 8;  // of 16 bytes, of a unit
  MarlinProduct<T> p{};
  p.x = data<T>(call.x);
  p.x_stride = a.x.stride;
  p.in_features = static_cast<int>(narrow(call.op, "x", a.x.size));
  p.packed = static_cast<const uint4*>(call.packed.const_data_ptr());
  p.packed_row = call.packed.size(lead) > 1 ? call.packed.stride(lead) / 4 : a.columns / kMarlinUnit * pieces;
  p.packed_expert = lead > 0 ? call.packed.stride(0) / 4 : 0;
  p.scales = {call.scales.const_data_ptr(), float_dtype(call.scales)};
  p.scales_row = call.scales.stride(lead);
  p.scales_expert = lead > 0 ? call.scales.stride(0) : 0;
  if (call.zeros.has_value()) {
    p.zeros = static_cast<const uint4*>(call.zeros->const_data_ptr());
    p.zeros_row = call.zeros->stride(lead) / 4;
    p.zeros_expert = lead > 0 ? call.zeros->stride(0) / 4 : 0;
  }
  if (call.bias.has_value()) {
    p.bias = {call.bias->const_data_ptr(), float_dtype(*call.bias)};
    p.bias_expert = lead > 0 ? call.product_columns : 0;
  }
  p.topk_weights = call.topk_weights;
  p.out = mutable_data<T>(out);
  p.out_features = out.size(out.dim() - 1);
  p.silu_mul = call.silu_mul;
  p.rows = call.rows;
  p.steps = static_cast<int>(narrow(call.op, "packed", a.packed_rows) / kMarlinStep);
  p.units = static_cast<int>(narrow(call.op, "packed", a.columns) / kMarlinUnit);
  p.group_steps = a.groups > 1 ? static_cast<int>(a.group_size / kMarlinStep) : INT32_MAX / 2;
  p.inverse_group_steps = a.groups > 1 ? 1.0f / static_cast<float>(p.group_steps) : 0.0f;
  p.reduction = a.reduction;
  p.counters = mutable_data<int32_t>(call.workspace);
  if (call.rows.grouped()) {
    p.zero_blocks = call.slots > 1 ? 0 : static_cast<int>(divide_up(call.rows.count, kMarlinNamedRows));
  }
  // The blocks of a product whose rows of x are those of the list are known since an earlier one of the same list.
  p.prefetch = !call.rows.grouped() || call.rows.top_k == 1;
  p.slots = static_cast<int>(call.slots);
  return p;
}

// Rows that start at 16 bytes, in the order of the packed rows. Returns the memory they lie in.
template <typename T>
Tensor gather(const Stream& stream, const MarlinCall& call, MarlinProduct<T>& p) {
  const int64_t size = call.arguments.packed_rows;
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride % 8 == 0;
  if (!call.perm.has_value() && (aligned || call.arguments.x.rows == 0)) {
    return Tensor();
  }
  p.rows.by_entry = call.perm.has_value() && p.rows.grouped();
  // Rows of x without columns, all of whose packed rows are padding, are none in its layout.
  const int64_t count = p.rows.by_entry ? p.rows.entries : p.rows.grouped() ? call.arguments.x.rows : p.rows.count;
  Tensor rows = new_output(call.x, {count, size});
  MarlinGather g{};
  g.x = static_cast<const uint16_t*>(call.x.const_data_ptr());
  g.x_stride = p.x_stride;
  g.in_features = p.in_features;
  if (call.perm.has_value()) {
    g.perm = data<int32_t>(*call.perm);
    g.perm_expert = call.perm->dim() == 2 ? call.perm->stride(0) : 0;
  }
  g.rows = p.rows;
  g.out = static_cast<uint16_t*>(rows.mutable_data_ptr());
  g.count = count;
  g.packed_rows = static_cast<int>(size);
  launch_marlin_gather(stream, g);
  p.x = data<T>(rows);
  p.x_stride = size;
  p.in_features = static_cast<int>(size);
  return rows;
}

// Memory for the sums of a product whose K is split.
Tensor partial_sums(const MarlinCall& call, const MarlinConfig& config) {
  const int64_t numbers = config.token_tiles * config.column_tiles * config.tile.tokens * config.tile.columns;
  switch (call.arguments.reduction) {
    case MarlinReduction::atomic:
      return torch::stable::new_zeros(call.x, {numbers}, ScalarType::Float);
    case MarlinReduction::rounded:
      return new_output(call.x, {numbers * config.splits});
    default:
      return new_output(call.x, {numbers * config.splits}, ScalarType::Float);
  }
}

// Counters of the sums over slots, of which there is one for each tile of columns.
int64_t slot_counters(const MarlinCall& call) {
  const int64_t wanted = call.slots > 1 ? divide_up(call.product_columns, kMarlinUnit) : 0;
  FERRUM_CHECK(call.workspace.numel() >= wanted, call.op, "workspace", "expected at least ", wanted,
               " counters for sums over slots, got ", call.workspace.numel());
  return wanted;
}

template <typename T>
void run_typed(const MarlinCall& call, const Tensor& out) {
  const Stream stream(call.op, call.x);
  MarlinProduct<T> p = product_of<T>(call, out);
  const Tensor gathered = gather(stream, call, p);
  const int64_t reserved = slot_counters(call);
  p.slot_counters = p.counters;
  p.counters += reserved;
  const MarlinShape shape{call.rows.grouped() ? call.rows.entries : call.rows.count,
                          call.rows.block_size,
                          call.product_columns,
                          call.arguments.packed_rows,
                          stream.multiprocessors(),
                          call.workspace.numel() - reserved,
                          call.max_sms,
                          divide_up(call.rows.count, std::max(call.rows.experts, 1)),
                          marlin_wgmma_asked_for()};
  const MarlinConfig config = pick_marlin_config(shape);
  // Beyond the last tile a block adds its stride once more.
  narrow(call.op, "x", config.token_tiles * config.column_tiles * config.splits + config.blocks + p.zero_blocks);
  Tensor partials;
  if (config.splits > 1) {
    partials = partial_sums(call, config);
    p.partials = partials.mutable_data_ptr();
  }
  Tensor slot_sums;
  if (call.slots > 1) {  // in vectors of four
    p.slot_stride = divide_up(p.out_features, 4) * 4;
    slot_sums = new_output(call.x, {call.rows.count, p.slot_stride}, ScalarType::Float);
    p.slot_sums = mutable_data<float>(slot_sums);
  }
  if (config.wgmma) {
    launch_marlin_wgmma(stream, config, p, call.bits);
  } else if (call.bits == 4) {
    launch_marlin<T, 4>(stream, config, p);
  } else {
    launch_marlin<T, 8>(stream, config, p);
  }
}

Tensor marlin_gemm(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                   const std::optional<Tensor>& perm, const std::optional<Tensor>& bias, const Tensor& workspace,
                   int64_t out_features, int64_t group_size, int64_t bits, const std::string& reduction,
                   int64_t max_sms) {
  const char* op = "marlin_gemm";
  MarlinCall call{op,   x,       packed, scales, zeros,        perm,  bias,    workspace,
                  bits, max_sms, {},     {},     out_features, false, nullptr, 1};
  call.arguments = check_marlin(op, x, packed, scales, zeros, perm, workspace, -1, out_features, group_size, bits,
                                reduction, max_sms);
  check_marlin_bias(op, bias, -1, out_features);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor out = new_output(x, shape);
  call.rows.count = out_features == 0 ? 0 : out.numel() / out_features;
  narrow(op, "x", call.rows.count);
  if (out.numel() > 0) {
    run_marlin(call, out);
  }
  return out;
}

}  // namespace

void launch_marlin_gather(const Stream& stream, const MarlinGather& gather) {
  const int64_t chunks = divide_up(gather.packed_rows, 8 * kGatherThreads);
  stream.launch_early(
      gather_rows,
      Grid{dim3(narrow("marlin_gemm", "x", gather.count), static_cast<unsigned>(chunks)), dim3(kGatherThreads)},
      gather);
}

void run_marlin(const MarlinCall& call, const Tensor& out) {
  check_device(call.op, call.x, {{"packed", call.packed}, {"scales", call.scales}, {"workspace", call.workspace}});
  for (const auto& [name, tensor] : {std::pair{"zeros", &call.zeros}, {"perm", &call.perm}, {"bias", &call.bias}}) {
    if (tensor->has_value()) {
      check_device(call.op, call.x, {{name, **tensor}});
    }
  }
  if (call.arguments.dtype == Dtype::float16) {
    run_typed<__half>(call, out);
  } else {
    run_typed<__nv_bfloat16>(call, out);
  }
}

}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("marlin_gemm", TORCH_BOX(&ferrum::cuda::marlin_gemm));
}
