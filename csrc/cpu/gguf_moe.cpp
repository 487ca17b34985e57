// gguf_moe_linear and moe_experts_gguf on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/allocate.h"
#include "cpu/decoder.h"
#include "cpu/gguf_activations.h"
#include "cpu/moe_gemm_rows.h"

namespace ferrum::cpu {
namespace {

constexpr const char* kLinear = "gguf_moe_linear";
constexpr const char* kExperts = "moe_experts_gguf";
// Tokens handled at a time, which bounds the scratch memory. By then an expert has rows enough that reading its weights
// again for the next chunk costs little beside the arithmetic.
constexpr int64_t kTokensPerChunk = 1024;

// The stack of one projection, [experts, rows, bytes].
struct Stack {
  GgufWeights first;  // of expert 0
  int64_t experts;

  GgufWeights expert(int64_t e) const {
    GgufWeights w = first;
    w.blocks += e * bytes();
    return w;
  }
  int64_t bytes() const { return first.bytes(); }  // of one expert
  int64_t panels(int64_t width) const { return (first.rows + width - 1) / width; }
};

// Tokens [first, first + tokens) of a call.
struct Tokens {
  int64_t tokens, top_k;
  const int32_t* ids;  // outside [0, experts): skipped
};

// Runs of tasks that are one expert's: long enough to read its rows as a stream, short enough to share out.
int64_t run_of(int64_t tasks) { return std::max<int64_t>(1, tasks / (torch::stable::get_num_threads() * 16)); }

// Rows of `width` values of any float type, `count` of them, prepared for int8 or full products.
GgufRows prepare(const GgufLayout& layout, const void* values, FloatType type, int64_t count, int64_t stride) {
  GgufRows rows(layout, count);
  const Int4Kernels& kernels = int4_kernels();
  const int64_t threads = torch::stable::get_num_threads();
  const Scratch<float> staging(threads * rows.staging());
  const int64_t bytes = stride * float_bytes(type);
  for_each_task(count, 4, count * bytes, threads, [&](int64_t thread, int64_t row, int64_t) {
    rows.fill(kernels, row, static_cast<const char*>(values) + row * bytes, type,
              staging.get() + thread * rows.staging());
  });
  return rows;
}

// Calls f(first, rows, whether it is the last) for blocks of the rows of active expert a.
template <typename F>
void for_each_row_block(const Routing& routing, int64_t a, const F& f) {
  const int64_t end = routing.offsets[a + 1];
  for (int64_t row = routing.offsets[a]; row < end; row += kGgufRowBlock) {
    f(row, std::min(kGgufRowBlock, end - row), row + kGgufRowBlock >= end);
  }
}

// The weights of a task that is a panel of `width` columns of one expert, nullptr behind the last.
const uint8_t* weights_of_task(const Stack& stack, const Routing& routing, int64_t task, int64_t width) {
  const int64_t panels = stack.panels(width);
  return task == routing.num_active() * panels ? nullptr
                                               : stack.expert(routing.active[task / panels]).at(task % panels * width);
}

// gguf_moe_linear

void check_routing(const char* op, const Tensor& ids, int64_t tokens) {
  check_dtype(op, "topk_ids", ids, ScalarType::Int);
  check_shape(op, "topk_ids", ids, {tokens, -1});
  check_contiguous(op, "topk_ids", ids);
}

Stack check_stack(const char* op, const char* name, const char* type_name, const Tensor& blocks, int64_t type,
                  int64_t experts, int64_t rows, const char* in_name, int64_t in_features) {
  const GgufFormat format = check_gguf_quantized(op, type_name, type);
  const int64_t line_bytes = gguf_line_bytes(op, in_name, format, in_features);
  check_gguf_bytes(op, name, blocks);
  FERRUM_CHECK(rows % format.line_rows() == 0 || rows < 0, op, name, "expected rows in packed rows, not in tiles of ",
               gguf::kTileRows, ", for ", rows, " rows");
  check_shape(op, name, blocks, {experts, rows < 0 ? rows : rows / format.line_rows(), line_bytes});
  FERRUM_CHECK(blocks.size(0) >= 1 && blocks.size(1) >= 1, op, name, "expected at least 1 expert and 1 row, got shape ",
               shape_string(blocks));
  const int64_t stacked = blocks.size(1) * format.line_rows();
  return {{format.traits, data<uint8_t>(blocks), stacked, in_features, format.tiled}, blocks.size(0)};
}

Tensor gguf_moe_linear(const Tensor& x, const Tensor& blocks, int64_t type, const Tensor& topk_ids,
                       std::string activation) {
  const bool int8 = check_int8_activation(kLinear, activation);
  check_activation(kLinear, "x", x);
  check_contiguous(kLinear, "x", x);
  FERRUM_CHECK(x.dim() == 2 || x.dim() == 3, kLinear, "x", "expected 2 dimensions (for all slots) or 3, got shape ",
               shape_string(x));
  const int64_t tokens = x.size(0), in_features = x.size(x.dim() - 1);
  check_routing(kLinear, topk_ids, tokens);
  const int64_t top_k = topk_ids.size(1);
  const bool per_slot = x.dim() == 3;
  FERRUM_CHECK(!per_slot || x.size(1) == top_k, kLinear, "x", "expected ", top_k, " slots, got shape ",
               shape_string(x));
  const Stack stack = check_stack(kLinear, "blocks", "type", blocks, type, -1, -1, "x", in_features);
  const int64_t out_features = stack.first.rows;
  Tensor out = torch::stable::new_zeros(x, {tokens, top_k, out_features});
  if (tokens * top_k == 0) {
    return out;
  }
  const Routing routing(data<int32_t>(topk_ids), tokens, top_k, stack.experts);
  const FloatType float_kind = float_type(x);
  const GgufRows rows = prepare(GgufLayout(int8, *stack.first.traits, in_features), x.const_data_ptr(), float_kind,
                                x.numel() / in_features, in_features);
  const int32_t* row_ids = per_slot ? routing.pair.data() : routing.token.data();
  const int64_t panels = stack.panels(kGgufPanel), tasks = routing.num_active() * panels;
  const GgufKernel kernel = gguf_kernel(int8);
  const auto from_float = int4_kernels().from_float;
  char* result = mutable_data<char>(out);
  for_each_task(tasks, run_of(tasks), routing.num_active() * stack.bytes(), torch::stable::get_num_threads(),
                [&](int64_t, int64_t task, int64_t next_task) {
                  alignas(64) float panel[kGgufRowBlock * kGgufPanel];
                  const int64_t a = task / panels, first = task % panels * kGgufPanel;
                  const int64_t columns = std::min(kGgufPanel, out_features - first);
                  for_each_row_block(routing, a, [&](int64_t row, int64_t count, bool last) {
                    const uint8_t* next = weights_of_task(stack, routing, last ? next_task : task, kGgufPanel);
                    kernel({stack.expert(routing.active[a]), first, columns, rows.view(), row_ids + row, count,
                            kGgufTile, next, panel});
                    for (int64_t r = 0; r < count; ++r) {
                      const int64_t at = routing.pair[row + r] * out_features + first;
                      from_float(panel + r * kGgufPanel, columns, float_kind, result + at * float_bytes(float_kind));
                    }
                  });
                });
  return out;
}

// moe_experts_gguf

struct Block {
  Stack gate, up, down;
  bool int8;
  FloatType type;
  int64_t hidden_size;

  int64_t width() const { return (gate.first.rows + kGgufTile - 1) / kGgufTile * kGgufTile; }
};

// activated[row] = silu(gate) * up. One task is 32 columns of both for all rows of one expert.
void gate_up(const Block& block, const Routing& routing, const GgufRows& gate_rows, const GgufRows& up_rows,
             float* activated) {
  constexpr int64_t kColumns = kGgufPanel / 2;
  const GgufKernel kernel = gguf_kernel(block.int8);
  const Int4Kernels& kernels = int4_kernels();
  const int64_t width = block.width();
  const int64_t panels = block.gate.panels(kColumns), tasks = routing.num_active() * panels;
  const int64_t bytes = routing.num_active() * (block.gate.bytes() + block.up.bytes());
  for_each_task(
      tasks, run_of(tasks), bytes, torch::stable::get_num_threads(), [&](int64_t, int64_t task, int64_t next_task) {
        alignas(64) float panel[kGgufRowBlock * kGgufPanel];
        const int64_t a = task / panels, first = task % panels * kColumns;
        const int64_t columns = std::min(kColumns, block.gate.first.rows - first);
        const GgufWeights gate = block.gate.expert(routing.active[a]), up = block.up.expert(routing.active[a]);
        for_each_row_block(routing, a, [&](int64_t row, int64_t count, bool last) {
          const int32_t* ids = routing.token.data() + row;
          const uint8_t* next = weights_of_task(block.gate, routing, last ? next_task : task, kColumns);
          kernel({gate, first, columns, gate_rows.view(), ids, count, 2 * kGgufTile, up.at(first), panel});
          kernel({up, first, columns, up_rows.view(), ids, count, 2 * kGgufTile, next, panel + kGgufTile});
          for (int64_t r = 0; r < count; ++r) {
            kernels.silu_mul_tiles(panel + r * kGgufPanel, (columns + kGgufTile - 1) / kGgufTile,
                                   activated + (row + r) * width + first);
          }
        });
      });
}

static_assert(kGgufPanel == kPanelColumns);

// The down product and the weighted sum over a token's experts, in ascending order. One task is a run of panels for all
// experts: the sums never leave the core's cache, and no thread waits for another before them.
void down_and_combine(const Block& block, const Tokens& t, const float* weights, const Routing& routing,
                      const GgufRows& rows, char* out) {
  const GgufKernel kernel = gguf_kernel(block.int8);
  const int64_t panels = block.down.panels(kGgufPanel), active = routing.num_active();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t run = panels_per_task(panels, routing.rows(), threads);
  const int64_t panel_sums = t.tokens * kGgufPanel;
  const Scratch<float> sums(threads * run * panel_sums);
  const Int4Kernels& kernels = int4_kernels();
  for_each_task((panels + run - 1) / run, 1, active * block.down.bytes(), threads,
                [&](int64_t thread, int64_t task, int64_t next_task) {
                  alignas(64) float products[kGgufRowBlock * kGgufPanel];
                  float* mine = sums.get() + thread * run * panel_sums;
                  const int64_t begin = task * run, end = std::min(begin + run, panels);
                  std::fill_n(mine, (end - begin) * panel_sums, 0.0f);
                  for (int64_t a = 0; a < active; ++a) {
                    const GgufWeights expert = block.down.expert(routing.active[a]);
                    const int64_t next_expert = routing.active[a + 1 < active ? a + 1 : 0];
                    const int64_t next_panel = a + 1 < active ? begin : next_task * run;
                    // Behind the expert's part of the task.
                    const uint8_t* after =
                        next_panel < panels ? block.down.expert(next_expert).at(next_panel * kGgufPanel) : nullptr;
                    for (int64_t panel = begin; panel < end; ++panel) {
                      const int64_t first = panel * kGgufPanel, columns = std::min(kGgufPanel, expert.rows - first);
                      const uint8_t* behind = panel + 1 < end ? expert.at(first + kGgufPanel) : after;
                      for_each_row_block(routing, a, [&](int64_t row, int64_t count, bool last) {
                        kernel({expert, first, columns, rows.view(), routing.identity.data() + row, count, kGgufTile,
                                last ? behind : expert.at(first), products});
                        add_rows(kernels, routing, weights, products, row, count, columns,
                                 mine + (panel - begin) * panel_sums);
                      });
                    }
                  }
                  for (int64_t panel = begin; panel < end; ++panel) {
                    const int64_t first = panel * kGgufPanel, columns = std::min(kGgufPanel, block.hidden_size - first);
                    store_sums(kernels, block.type, mine + (panel - begin) * panel_sums, t.tokens, block.hidden_size,
                               first, columns, out);
                  }
                });
}

void run_block(const Block& block, const Tokens& t, const char* hidden, const float* weights, char* out) {
  const Routing routing(t.ids, t.tokens, t.top_k, block.gate.experts);
  const int64_t width = block.width();
  const Scratch<float> activated(routing.rows() * width);
  {
    const GgufLayout gate(block.int8, *block.gate.first.traits, block.hidden_size);
    const GgufLayout up(block.int8, *block.up.first.traits, block.hidden_size);
    const GgufRows gate_rows = prepare(gate, hidden, block.type, t.tokens, block.hidden_size);
    if (gate.same_as(up)) {
      gate_up(block, routing, gate_rows, gate_rows, activated.get());
    } else {
      gate_up(block, routing, gate_rows, prepare(up, hidden, block.type, t.tokens, block.hidden_size), activated.get());
    }
  }
  const GgufLayout down(block.int8, *block.down.first.traits, block.down.first.in_features);
  const GgufRows rows = prepare(down, activated.get(), FloatType::f32, routing.rows(), width);
  down_and_combine(block, t, weights, routing, rows, out);
}

}  // namespace

Tensor moe_experts_gguf(const Tensor& hidden, const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& gate,
                        const Tensor& up, const Tensor& down, std::vector<int64_t> types, std::string activation) {
  const bool int8 = check_int8_activation(kExperts, activation);
  check_activation(kExperts, "hidden", hidden);
  check_shape(kExperts, "hidden", hidden, {-1, -1});
  check_contiguous(kExperts, "hidden", hidden);
  const int64_t tokens = hidden.size(0), hidden_size = hidden.size(1);
  check_routing(kExperts, topk_ids, tokens);
  const int64_t top_k = topk_ids.size(1);
  check_dtype(kExperts, "topk_weights", topk_weights, ScalarType::Float);
  check_shape(kExperts, "topk_weights", topk_weights, {tokens, top_k});
  check_contiguous(kExperts, "topk_weights", topk_weights);
  FERRUM_CHECK(types.size() == 3, kExperts, "types", "expected 3 (gate, up, down), got ", types.size());
  const Stack gates = check_stack(kExperts, "gate", "types", gate, types[0], -1, -1, "hidden", hidden_size);
  const int64_t experts = gates.experts, width = gates.first.rows;
  const Stack ups = check_stack(kExperts, "up", "types", up, types[1], experts, width, "hidden", hidden_size);
  const Stack downs = check_stack(kExperts, "down", "types", down, types[2], experts, hidden_size, "gate", width);
  const Block block{gates, ups, downs, int8, float_type(hidden), hidden_size};
  Tensor out = allocate(hidden, {tokens, hidden_size});
  for (int64_t first = 0; first < tokens; first += kTokensPerChunk) {
    const int64_t bytes = hidden_size * float_bytes(block.type);
    const Tokens chunk{std::min(kTokensPerChunk, tokens - first), top_k, data<int32_t>(topk_ids) + first * top_k};
    run_block(block, chunk, data<char>(hidden) + first * bytes, data<float>(topk_weights) + first * top_k,
              mutable_data<char>(out) + first * bytes);
  }
  return out;
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("gguf_moe_linear", TORCH_BOX(&gguf_moe_linear));
  m.impl("moe_experts_gguf", TORCH_BOX(&moe_experts_gguf));
}

}  // namespace
}  // namespace ferrum::cpu
