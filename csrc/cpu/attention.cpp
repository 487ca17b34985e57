#include "cpu/attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <vector>

#include "cpu/allocate.h"
#include "cpu/kv_cache_args.h"

namespace ferrum::cpu {
namespace {

using AttendKernel = void (*)(const Attention&, const AttentionTask&, const AttentionTask*, float*);

// Products of bfloat16 pairs are used where they are faster than float32: on AMD's cores they do twice the work of an
// FMA in the same time, on Intel's without AMX half of it.
AttendKernel pick_attend(const Attention& a) {
#if defined(FERRUM_BF16_PAIRS)
  static const bool fast_pairs =
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_is("amd");
  if (fast_pairs && active_isa() == Isa::avx512 && a.dtype == Dtype::bfloat16) {
    return &avx512::attend_bf16_pairs;
  }
#endif
  return FERRUM_FOR_LEVEL(attend);
}

struct Plan {
  std::vector<AttentionSequence> sequences;
  std::vector<AttentionItem> items;
  std::vector<std::pair<size_t, int64_t>> split_items;  // the first split of its rows, and how many there are
  int64_t partial_floats = 0;
};

// The keys that the rows [begin, end) see between them.
Keys keys_of_rows(const Attention& a, const AttentionSequence& s, int64_t begin, int64_t end) {
  return {visible_keys(a, s, begin / a.group).begin, visible_keys(a, s, (end - 1) / a.group).end};
}

// Row tiles of one sequence, or a single row tile cut along the keys. Heads come last: where the heads of a token lie
// side by side, those who read them at the same time share pages.
void plan_sequence(const Attention& a, const AttentionSequence& s, Plan& plan) {
  const int64_t rows = s.tokens * a.group;
  for (int64_t row = 0; row < rows; row += kRowTile) {
    const int64_t end = std::min(row + kRowTile, rows);
    const Keys keys = keys_of_rows(a, s, row, end);
    const int64_t first = keys.begin / kKeySplit, last = (keys.end + kKeySplit - 1) / kKeySplit;
    const int64_t splits = rows > kRowTile ? 1 : std::max<int64_t>(last - first, 1);
    const int64_t floats = partial_floats(a, end - row);
    for (int64_t i = 0; i < splits; ++i) {
      const Keys part = {std::max(keys.begin, (first + i) * kKeySplit),
                         std::min(keys.end, (first + i + 1) * kKeySplit)};
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        if (splits > 1 && i == 0) {
          plan.split_items.emplace_back(plan.items.size(), splits);
        }
        const int64_t partial = splits > 1 ? plan.partial_floats + (h * splits + i) * floats : -1;
        plan.items.push_back({&s, h, row, end, splits > 1 ? part : keys, partial});
      }
    }
    plan.partial_floats += splits > 1 ? a.kv_heads * splits * floats : 0;
  }
}

// What the threads are given, long tasks first, so that none is left alone at the end.
std::vector<AttentionTask> make_tasks(const Attention& a, const std::vector<AttentionItem>& items, int64_t threads) {
  // Where heads lie side by side, as many as leave enough tasks for all threads and keep a step's keys and values, with
  // those fetched ahead, in a part of a core's second-level cache.
  constexpr int64_t kRowElements = 512, kTasksPerThread = 4;
  const int64_t items_per_task = static_cast<int64_t>(items.size()) / (threads * kTasksPerThread);
  const int64_t most = a.head_rows == 1 ? std::max<int64_t>(std::min(kRowElements / a.head_dim, items_per_task), 1) : 1;
  std::vector<AttentionTask> tasks;
  for (const AttentionItem& item : items) {
    AttentionTask* last = tasks.empty() ? nullptr : &tasks.back();
    if (last != nullptr && item.sequence->tokens == 1 && item.sequence == last->items->sequence &&
        item.row_begin == last->items->row_begin && item.keys.begin == last->items->keys.begin && last->heads < most) {
      ++last->heads;
    } else {
      tasks.push_back({&item, 1});
    }
  }
  const auto work = [](const AttentionTask& t) {
    return t.heads * (t.items->row_end - t.items->row_begin) * (t.items->keys.end - t.items->keys.begin);
  };
  std::stable_sort(tasks.begin(), tasks.end(),
                   [&](const AttentionTask& x, const AttentionTask& y) { return work(x) > work(y); });
  return tasks;
}

// Computes a.out, of the shape of q, for the sequences of the plan.
void run(Attention& a, Plan& plan, const Tensor& q) {
  for (const AttentionSequence& s : plan.sequences) {
    plan_sequence(a, s, plan);
  }
  if (plan.items.empty()) {
    return;
  }
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<AttentionTask> tasks = make_tasks(a, plan.items, threads);
  const int64_t count = static_cast<int64_t>(tasks.size()), workers = std::min(threads, count);
  int64_t floats = 0;
  for (const AttentionTask& t : tasks) {
    const int64_t rows = t.items->row_end - t.items->row_begin;
    floats = std::max(
        floats, t.items->sequence->tokens == 1 ? decode_scratch_floats(a, rows, t.heads) : scratch_floats(a, rows));
  }
  floats = (floats + 15) / 16 * 16;
  Tensor memory = allocate(q, {workers * floats + plan.partial_floats}, ScalarType::Float);
  float* const scratch = mutable_data<float>(memory);
  a.partial = scratch + workers * floats;
  const AttendKernel attend = pick_attend(a);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < count; i = next++) {
        const AttentionTask* after = i + workers < count ? &tasks[static_cast<size_t>(i + workers)] : nullptr;
        attend(a, tasks[static_cast<size_t>(i)], after, scratch + worker * floats);
      }
    }
  });
  const auto merge = FERRUM_FOR_LEVEL(merge_splits);
  torch::stable::parallel_for(0, static_cast<int64_t>(plan.split_items.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& [item, splits] = plan.split_items[static_cast<size_t>(i)];
      merge(a, plan.items[item], splits);
    }
  });
}

void check_heads(const char* op, const Tensor& q, int64_t heads, int64_t kv_heads, int64_t window) {
  FERRUM_CHECK(kv_heads >= 1 && heads % kv_heads == 0, op, "q", "expected heads that are a multiple of the cache's ",
               kv_heads, ", got ", heads);
  check_last_contiguous(op, "q", q);
  FERRUM_CHECK(window >= 0, op, "window", "expected at least 0, got ", window);
}

const int32_t* check_lengths(const char* op, const char* name, const Tensor& t, int64_t size) {
  check_dtype(op, name, t, ScalarType::Int);
  check_shape(op, name, t, {size});
  check_contiguous(op, name, t);
  return data<int32_t>(t);
}

// An empty sequence stands for padding and gets zeros; any other holds its own queries' keys when it is causal.
void check_kv_len(const char* op, int64_t kv_len, int64_t tokens, int64_t capacity, bool causal) {
  FERRUM_CHECK(kv_len >= 0 && kv_len <= capacity, op, "kv_lens", "expected 0 <= length <= ", capacity, ", got ",
               kv_len);
  FERRUM_CHECK(!causal || kv_len == 0 || kv_len >= tokens, op, "kv_lens", "expected 0 or at least the ", tokens,
               " causal queries, got ", kv_len);
}

// Caches [batch, kv_heads, capacity, head_dim] whose strides are whole rows of head_dim: contiguous ones, the part of a
// larger buffer that is in use, token-major tensors seen with their heads first.
void check_cache_rows(const char* op, const Tensor& k_cache, const Tensor& v_cache) {
  FERRUM_CHECK(k_cache.dim() == 4, op, "k_cache", "expected shape (batch, kv_heads, capacity, head_dim), got ",
               shape_string(k_cache));
  check_same_dtype(op, "v_cache", v_cache, k_cache);
  check_same_shape(op, "v_cache", v_cache, k_cache);
  check_last_contiguous(op, "k_cache", k_cache);
  if (k_cache.numel() == 0) {
    return;
  }
  for (int64_t i = 0; i < 3; ++i) {
    FERRUM_CHECK(k_cache.size(i) == 1 || k_cache.stride(i) % k_cache.size(3) == 0, op, "k_cache",
                 "expected strides that are multiples of head_dim, got ", stride_string(k_cache));
  }
  for (int64_t i = 0; i < 4; ++i) {
    FERRUM_CHECK(k_cache.size(i) == 1 || v_cache.stride(i) == k_cache.stride(i), op, "v_cache", "expected the ",
                 stride_string(k_cache), " of k_cache, got ", stride_string(v_cache));
  }
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_lens, double scale,
                 bool causal, int64_t window) {
  const char* op = "attention";
  Attention a{};
  a.dtype = activation_dtype(op, "q", q);
  FERRUM_CHECK(q.dim() == 4, op, "q", "expected shape (batch, tokens, heads, head_dim), got ", shape_string(q));
  check_cache_rows(op, k_cache, v_cache);
  check_same_dtype(op, "k_cache", k_cache, q);
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), capacity = k_cache.size(2);
  a.head_dim = q.size(3);
  a.kv_heads = k_cache.size(1);
  check_shape(op, "k_cache", k_cache, {batch, -1, -1, a.head_dim});
  check_heads(op, q, heads, a.kv_heads, window);
  const int32_t* lens = check_lengths(op, "kv_lens", kv_lens, batch);
  for (int64_t b = 0; b < batch; ++b) {
    check_kv_len(op, lens[b], tokens, capacity, causal);
  }
  Tensor out = allocate(q, {batch, tokens, heads, a.head_dim});
  if (out.numel() == 0) {
    return out;
  }
  a.q = q.const_data_ptr(), a.out = out.mutable_data_ptr();
  a.k = k_cache.const_data_ptr(), a.v = v_cache.const_data_ptr();
  a.q_token_stride = q.stride(1), a.q_head_stride = q.stride(2);
  a.block_size = capacity > 0 ? capacity : 1;
  a.block_rows = k_cache.stride(0) / a.head_dim, a.head_rows = k_cache.stride(1) / a.head_dim;
  a.key_rows = k_cache.stride(2) / a.head_dim;
  a.group = heads / a.kv_heads;
  a.scale = static_cast<float>(scale), a.causal = causal, a.window = window;
  std::vector<int32_t> block(static_cast<size_t>(batch));
  std::iota(block.begin(), block.end(), 0);
  Plan plan;
  for (int64_t b = 0; b < batch; ++b) {
    plan.sequences.push_back({b * q.stride(0), b * tokens, tokens, lens[b], &block[static_cast<size_t>(b)]});
  }
  run(a, plan, q);
  return out;
}

namespace {

// The dtype of the pools and their scales. Returns whether they are int8.
bool check_pool_dtype(const char* op, const Tensor& q, const Tensor& k_cache, const std::optional<Tensor>& k_scale,
                      const std::optional<Tensor>& v_scale) {
  const bool int8 = k_cache.scalar_type() == ScalarType::Char;
  for (const auto& [name, scale] : {std::make_pair("k_scale", &k_scale), std::make_pair("v_scale", &v_scale)}) {
    FERRUM_CHECK(scale->has_value() == int8, op, name,
                 int8 ? "expected a tensor beside int8 caches, got none"
                      : "expected none beside caches that are not int8, got a tensor");
    if (int8) {
      check_dtype(op, name, **scale, ScalarType::Float);
      check_shape(op, name, **scale, {k_cache.size(0), k_cache.size(1), k_cache.size(2)});
      check_contiguous(op, name, **scale);
    }
  }
  if (!int8) {
    check_same_dtype(op, "k_cache", k_cache, q);
  }
  return int8;
}

// Every block that holds a visible key lies in the pool.
void check_blocks(const char* op, const Attention& a, const AttentionSequence& s, int64_t num_blocks) {
  const Keys keys = keys_of_rows(a, s, 0, s.tokens * a.group);
  for (int64_t i = keys.begin / a.block_size; i * a.block_size < keys.end; ++i) {
    FERRUM_CHECK(s.table[i] >= 0 && s.table[i] < num_blocks, op, "block_tables", "expected 0 <= block < ", num_blocks,
                 ", got ", s.table[i]);
  }
}

// The sequences of a batch of `tokens` queries, cu_seqlens_q[i] the first of sequence i.
void plan_sequences(const char* op, const Attention& a, const Tensor& q, const Tensor& block_tables,
                    const Tensor& cu_seqlens_q, const Tensor& kv_lens, int64_t num_blocks, Plan& plan) {
  const int64_t count = block_tables.size(0), max_blocks = block_tables.size(1);
  const int32_t* starts = check_lengths(op, "cu_seqlens_q", cu_seqlens_q, count + 1);
  const int32_t* lens = check_lengths(op, "kv_lens", kv_lens, count);
  FERRUM_CHECK(starts[0] == 0, op, "cu_seqlens_q", "expected 0 first, got ", starts[0]);
  FERRUM_CHECK(starts[count] == q.size(0), op, "cu_seqlens_q", "expected the ", q.size(0), " rows of q last, got ",
               starts[count]);
  for (int64_t i = 0; i < count; ++i) {
    FERRUM_CHECK(starts[i] <= starts[i + 1], op, "cu_seqlens_q", "expected ascending values, got ", starts[i],
                 " before ", starts[i + 1]);
    const int64_t tokens = starts[i + 1] - starts[i];
    check_kv_len(op, lens[i], tokens, max_blocks * a.block_size, a.causal);
    if (tokens > 0) {
      const int32_t* table = data<int32_t>(block_tables) + i * max_blocks;
      plan.sequences.push_back({starts[i] * q.stride(0), starts[i], tokens, lens[i], table});
      check_blocks(op, a, plan.sequences.back(), num_blocks);
    }
  }
}

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                       const Tensor& cu_seqlens_q, const Tensor& kv_lens, double scale, bool causal, int64_t window,
                       const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const char* op = "paged_attention";
  Attention a{};
  a.dtype = activation_dtype(op, "q", q);
  FERRUM_CHECK(q.dim() == 3, op, "q", "expected shape (tokens, heads, head_dim), got ", shape_string(q));
  check_caches(op, k_cache, v_cache, "(num_blocks, block_size, kv_heads, head_dim)");
  const bool int8 = check_pool_dtype(op, q, k_cache, k_scale, v_scale);
  const int64_t tokens = q.size(0), heads = q.size(1), num_blocks = k_cache.size(0);
  a.head_dim = q.size(2);
  a.block_size = k_cache.size(1);
  a.kv_heads = k_cache.size(2);
  check_shape(op, "k_cache", k_cache, {-1, -1, -1, a.head_dim});
  FERRUM_CHECK(a.block_size >= 1, op, "k_cache", "expected a block size of at least 1, got 0");
  check_heads(op, q, heads, a.kv_heads, window);
  check_dtype(op, "block_tables", block_tables, ScalarType::Int);
  FERRUM_CHECK(block_tables.dim() == 2, op, "block_tables", "expected shape (sequences, max_blocks), got ",
               shape_string(block_tables));
  check_contiguous(op, "block_tables", block_tables);
  a.block_rows = a.block_size * a.kv_heads, a.key_rows = a.kv_heads, a.head_rows = 1;
  a.group = heads / a.kv_heads;
  a.scale = static_cast<float>(scale), a.causal = causal, a.window = window;
  Plan plan;
  plan_sequences(op, a, q, block_tables, cu_seqlens_q, kv_lens, num_blocks, plan);
  Tensor out = allocate(q, {tokens, heads, a.head_dim});
  if (out.numel() == 0) {
    return out;
  }
  a.q = q.const_data_ptr(), a.out = out.mutable_data_ptr();
  a.k = k_cache.const_data_ptr(), a.v = v_cache.const_data_ptr();
  a.k_scale = int8 ? data<float>(*k_scale) : nullptr;
  a.v_scale = int8 ? data<float>(*v_scale) : nullptr;
  a.q_token_stride = q.stride(0), a.q_head_stride = q.stride(1);
  run(a, plan, q);
  return out;
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("attention", TORCH_BOX(&ferrum::cpu::attention));
  m.impl("paged_attention", TORCH_BOX(&ferrum::cpu::paged_attention));
}
