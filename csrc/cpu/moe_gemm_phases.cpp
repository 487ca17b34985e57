#include "cpu/moe_gemm_phases.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/moe_gemm_rows.h"

namespace ferrum::cpu {
namespace {

// The prepared inputs of the gate/up product: by token when all experts share the channel order, else by row, once per
// part of the permutation.
struct GateUpInputs {
  ActivationBuffer parts[2];
  const int32_t* row_ids = nullptr;
  bool valid = true;
};

GateUpInputs prepare_hidden(const ExpertBlock& block, const TokenChunk& chunk, const Routing& routing,
                            int64_t threads) {
  const ExpertMatrices& w13 = block.w13;
  const ActivationLayout layout{block.int8, w13.packed_rows(), w13.group_size};
  const int64_t width = block.hidden_size;
  const bool by_row = w13.perm != nullptr;
  const int64_t rows = by_row ? routing.rows() : chunk.tokens;
  GateUpInputs inputs;
  for (int64_t part = 0; part < w13.perm_parts; ++part) {
    inputs.parts[part] = ActivationBuffer(layout, rows);
  }
  inputs.row_ids = by_row ? routing.identity.data() : routing.token.data();
  const int64_t row_bytes = width * 4;
  const bool as_it_is = block.type == FloatType::f32;
  const Scratch<float> staging(threads * (width + layout.packed_rows));
  std::atomic<bool> valid{true};
  for_each_task(rows, 4, rows * row_bytes, threads, [&](int64_t thread, int64_t row, int64_t) {
    float* converted = staging.get() + thread * (width + layout.packed_rows);
    const int64_t token = by_row ? routing.token[row] : row;
    const char* hidden = chunk.hidden + token * width * (as_it_is ? 4 : 2);
    if (!as_it_is) {
      block.kernels.to_float(hidden, block.type, width, converted);
    }
    const float* values = as_it_is ? reinterpret_cast<const float*>(hidden) : converted;
    for (int64_t part = 0; part < w13.perm_parts; ++part) {
      const int32_t* perm = by_row ? w13.perm_of(routing.expert[row], part) : nullptr;
      if (!inputs.parts[part].fill(block.kernels, row, values, width, perm, converted + width)) {
        valid = false;
      }
    }
  });
  inputs.valid = valid;
  return inputs;
}

// One panel of the gate/up product.
void multiply_gate_up(const ExpertBlock& block, const PackedWeights& weights, const ActivationRows (&parts)[2],
                      int64_t tile, const int32_t* row_ids, int64_t rows, const TileStart& next, float* panel) {
  const TileKernel tiles_kernel = block.int8 ? block.kernels.int4_by_int8 : block.kernels.int4_by_full;
  const int64_t tiles = std::min(kPanelTiles, block.w13.tiles - tile);
  if (block.w13.perm_parts == 1) {
    tiles_kernel(weights, tile, 1, tiles, parts[0], row_ids, rows, next, panel);
    return;
  }
  tiles_kernel(weights, tile, 2, tiles / 2, parts[0], row_ids, rows, weights.tile(tile + 1), panel);
  tiles_kernel(weights, tile + 1, 2, tiles / 2, parts[1], row_ids, rows, next, panel + int4::kTileColumns);
}

// The panels whose values make up a group of the down product's input, for gate_up to prepare it while they are in the
// cache; 0 where they cannot, or where tasks of that size would be few.
int64_t panels_of_group(const ExpertBlock& block, const Routing& routing) {
  constexpr int64_t kOutputs = kPanelColumns / 2;
  const bool whole_panels = block.int8 && block.w2.perm == nullptr && block.w2.group_size % kOutputs == 0;
  return whole_panels && routing.rows() >= 4 * routing.num_active() ? block.w2.group_size / kOutputs : 0;
}

// silu(gate) * up: into `activated`, or for group_panels > 0 prepared as rows of `down`. One task is so many panels of
// one expert, for all its rows.
void gate_up(const ExpertBlock& block, const Routing& routing, const GateUpInputs& inputs, int64_t threads,
             int64_t group_panels, const Scratch<float>& activated, const ActivationBuffer& down) {
  const ExpertMatrices& w13 = block.w13;
  const int64_t width = w13.tiles / 2 * int4::kTileColumns;
  const int64_t panels = int4::ceil_div(w13.tiles, kPanelTiles);
  const int64_t step = std::max<int64_t>(1, group_panels);
  const int64_t groups = int4::ceil_div(panels, step);
  const int64_t tasks = routing.num_active() * groups;
  const int64_t bytes = routing.num_active() * w13.tiles * w13.first.lines * int4::kLineBytes;
  const int64_t run = std::max<int64_t>(1, tasks / (threads * 16));
  const ActivationRows parts[2] = {inputs.parts[0].view(), inputs.parts[w13.perm_parts - 1].view()};
  const auto start_of = [&](int64_t task) {
    return task == tasks ? w13.first.tile(0)
                         : w13.expert(routing.active[task / groups]).tile(task % groups * step * kPanelTiles);
  };
  for_each_task(tasks, run, bytes, threads, [&](int64_t, int64_t task, int64_t next_task) {
    alignas(64) float panel[kRowBlock * kPanelColumns];
    alignas(64) float group[kRowBlock * int4::kMaxGroupSize];
    const int64_t a = task / groups;
    const int64_t first = task % groups * step;
    const int64_t last = std::min(first + step, panels);
    const PackedWeights weights = w13.expert(routing.active[a]);
    const int64_t end = routing.offsets[a + 1];
    for (int64_t row = routing.offsets[a]; row < end; row += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, end - row);
      const int64_t stride = group_panels > 0 ? int4::kMaxGroupSize : width;
      float* to = group_panels > 0 ? group : activated.get() + row * width + first * kPanelColumns / 2;
      for (int64_t p = first; p < last; ++p, to += kPanelColumns / 2) {
        const int64_t tile = p * kPanelTiles;
        const TileStart next =
            p + 1 < last ? weights.tile(tile + kPanelTiles) : start_of(row + rows < end ? task : next_task);
        multiply_gate_up(block, weights, parts, tile, inputs.row_ids + row, rows, next, panel);
        const int64_t pairs = std::min(kPanelTiles, w13.tiles - tile) / 2;
        for (int64_t r = 0; r < rows; ++r) {
          block.kernels.silu_mul_tiles(panel + r * kPanelColumns, pairs, to + r * stride);
        }
      }
      for (int64_t r = 0; group_panels > 0 && r < rows; ++r) {
        down.fill_group(block.kernels, row + r, task % groups, group + r * stride, block.intermediate_size);
      }
    }
  });
}

// Prepares the rows of `activated` for the down product. Returns false for a bad entry of the permutation.
bool prepare_activated(const ExpertBlock& block, const Routing& routing, const Scratch<float>& activated,
                       int64_t threads, const ActivationBuffer& inputs) {
  const ExpertMatrices& w2 = block.w2;
  const int64_t width = block.w13.tiles / 2 * int4::kTileColumns;
  const Scratch<float> staging(threads * w2.packed_rows());
  std::atomic<bool> valid{true};
  for_each_task(routing.rows(), 4, routing.rows() * width * 4, threads, [&](int64_t thread, int64_t row, int64_t) {
    const int32_t* perm = w2.perm_of(routing.expert[row], 0);
    if (!inputs.fill(block.kernels, row, activated.get() + row * width, block.intermediate_size, perm,
                     staging.get() + thread * w2.packed_rows())) {
      valid = false;
    }
  });
  return valid;
}

// The down product and the weighted sum over a token's experts, in ascending order. One task is a run of panels for all
// experts: the sums never leave the core's cache, and no thread waits for another before them.
void down_and_combine(const ExpertBlock& block, const TokenChunk& chunk, const Routing& routing,
                      const ActivationRows& inputs, int64_t threads) {
  const ExpertMatrices& w2 = block.w2;
  const TileKernel tiles_kernel = block.int8 ? block.kernels.int4_by_int8 : block.kernels.int4_by_full;
  const int64_t panels = int4::ceil_div(w2.tiles, kPanelTiles);
  const int64_t active = routing.num_active();
  const int64_t run = panels_per_task(panels, routing.rows(), threads);
  const int64_t tasks = int4::ceil_div(panels, run);
  const int64_t bytes = active * w2.tiles * w2.first.lines * int4::kLineBytes;
  const int64_t panel_sums = chunk.tokens * kPanelColumns;
  const Scratch<float> sums(threads * run * panel_sums);
  for_each_task(tasks, 1, bytes, threads, [&](int64_t thread, int64_t task, int64_t next_task) {
    alignas(64) float panel[kRowBlock * kPanelColumns];
    float* mine = sums.get() + thread * run * panel_sums;
    const int64_t first = task * run;
    const int64_t last = std::min(first + run, panels);
    const auto columns_of = [&](int64_t p) { return std::min(kPanelColumns, block.hidden_size - p * kPanelColumns); };
    std::fill_n(mine, (last - first) * panel_sums, 0.0f);
    for (int64_t a = 0; a < active; ++a) {
      const PackedWeights weights = w2.expert(routing.active[a]);
      // The first panel behind this expert's part of the task.
      const PackedWeights following = w2.expert(routing.active[a + 1 < active ? a + 1 : 0]);
      const int64_t following_panel = a + 1 < active ? first : next_task * run;
      for (int64_t p = first; p < last; ++p) {
        const int64_t tile = p * kPanelTiles;
        const TileStart next =
            p + 1 < last ? weights.tile(tile + kPanelTiles) : following.tile(following_panel * kPanelTiles);
        for (int64_t row = routing.offsets[a]; row < routing.offsets[a + 1]; row += kRowBlock) {
          const int64_t rows = std::min<int64_t>(kRowBlock, routing.offsets[a + 1] - row);
          const bool more_rows = row + rows < routing.offsets[a + 1];
          tiles_kernel(weights, tile, 1, std::min(kPanelTiles, w2.tiles - tile), inputs, routing.identity.data() + row,
                       rows, more_rows ? weights.tile(tile) : next, panel);
          add_rows(block.kernels, routing, chunk.weights, panel, row, rows, columns_of(p),
                   mine + (p - first) * panel_sums);
        }
      }
    }
    for (int64_t p = first; p < last; ++p) {
      store_sums(block.kernels, block.type, mine + (p - first) * panel_sums, chunk.tokens, block.hidden_size,
                 p * kPanelColumns, columns_of(p), chunk.out);
    }
  });
}

}  // namespace

PermStatus run_expert_block(const ExpertBlock& block, const TokenChunk& chunk) {
  const int64_t threads = torch::stable::get_num_threads();
  const Routing routing(chunk.ids, chunk.tokens, block.top_k, block.experts);
  const GateUpInputs hidden = prepare_hidden(block, chunk, routing, threads);
  if (!hidden.valid) {
    return PermStatus::bad_w13;
  }
  const ActivationLayout layout{block.int8, block.w2.packed_rows(), block.w2.group_size};
  const ActivationBuffer inputs(layout, routing.rows());
  const int64_t group_panels = panels_of_group(block, routing);
  const int64_t width = block.w13.tiles / 2 * int4::kTileColumns;
  const Scratch<float> activated(group_panels > 0 ? 0 : routing.rows() * width);
  gate_up(block, routing, hidden, threads, group_panels, activated, inputs);
  if (group_panels == 0 && !prepare_activated(block, routing, activated, threads, inputs)) {
    return PermStatus::bad_w2;
  }
  down_and_combine(block, chunk, routing, inputs.view(), threads);
  return PermStatus::ok;
}

}  // namespace ferrum::cpu
