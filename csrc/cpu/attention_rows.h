// Where the rows of an item lie in the caches, and what becomes of its results. Shared by the two kernels.
#pragma once

#include "cpu/attention_products.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// The rows of the caches that hold the keys [begin, end), one after the other, times `size`.
inline void find_rows(const Attention& a, const AttentionItem& item, Keys keys, int64_t size, int64_t* rows) {
  const int64_t stride = a.key_rows * size;
  int64_t block = keys.begin / a.block_size, position = keys.begin % a.block_size;
  for (int64_t key = keys.begin; key < keys.end; ++block, position = 0) {
    const int64_t first = (item.sequence->table[block] * a.block_rows + item.kv_head * a.head_rows) * size;
    const int64_t end = smaller(a.block_size, position + keys.end - key);
    for (int64_t row = first + position * stride; position < end; ++position, ++key, row += stride) {
      *rows++ = row;
    }
  }
}

// Appends the keys of a table whose rows have `bytes` bytes, of `heads` heads from the item's on, as runs.
inline Run* add_runs(const Attention& a, const AttentionItem& item, Keys keys, int64_t heads, const void* table,
                     int64_t bytes, Run* to) {
  const Run* const first = to;
  const auto add = [&](const char* begin, int64_t size) {
    if (to != first && to[-1].end == begin) {
      to[-1].end += size;
    } else {
      *to++ = {begin, begin + size};
    }
  };
  const int64_t stride = a.key_rows * bytes, width = heads * bytes;
  int64_t block = keys.begin / a.block_size, position = keys.begin % a.block_size;
  for (int64_t key = keys.begin; key < keys.end; ++block, position = 0) {
    const int64_t row = item.sequence->table[block] * a.block_rows + item.kv_head * a.head_rows;
    const char* at = static_cast<const char*>(table) + row * bytes + position * stride;
    const int64_t count = smaller(a.block_size - position, keys.end - key);
    key += count;
    if (stride == width) {
      add(at, count * width);
      continue;
    }
    for (int64_t i = 0; i < count; ++i, at += stride) {
      add(at, width);
    }
  }
  return to;
}

// Has the products fetch the next `most` keys: those of the task from `begin` on, or else of the next task. Fills
// `runs`, of which there may be four for every key.
template <typename T>
inline Ahead fetch_ahead(const Attention& a, const AttentionTask& task, int64_t begin, const AttentionTask* next,
                         int64_t most, Run* runs) {
  if (begin >= task.items->keys.end) {
    if (next == nullptr || next->items->keys.begin >= next->items->keys.end) {
      return {};
    }
    begin = next->items->keys.begin;
  } else {
    next = &task;
  }
  const AttentionItem& item = *next->items;
  const Keys keys{begin, smaller(begin + most, item.keys.end)};
  Run* end = runs;
  const auto add = [&](const void* table, size_t bytes) {
    end = add_runs(a, item, keys, next->heads, table, static_cast<int64_t>(bytes), end);
  };
  if (a.k_scale != nullptr) {
    add(a.k_scale, sizeof(float));
    add(a.v_scale, sizeof(float));
  }
  add(a.k, static_cast<size_t>(a.head_dim) * sizeof(T));
  add(a.v, static_cast<size_t>(a.head_dim) * sizeof(T));
  // Where blocks lie scattered, looking up their pages' addresses takes as long as reading them. Asked for in a row,
  // several are looked up at a time.
  constexpr int64_t kPage = 4096;
  uintptr_t page = 0;
  for (const Run* run = runs; run != end; ++run) {
    for (const char* at = run->begin; at < run->end; at += kPage) {
      if (reinterpret_cast<uintptr_t>(at) / kPage != page) {
        Ahead::fetch(at);
        page = reinterpret_cast<uintptr_t>(at) / kPage;
      }
    }
  }
  return {nullptr, nullptr, runs, end};
}

// Rounds the row divided by its sum to the output. A row that sees no key is 0.
inline void write_row(const Attention& a, const AttentionItem& item, int64_t row, const float* from, float sum) {
  const AttentionSequence& sequence = *item.sequence;
  const int64_t token = row / a.group, head = item.kv_head * a.group + row % a.group;
  const int64_t at = ((sequence.out_token + token) * a.kv_heads * a.group + head) * a.head_dim;
  const Keys keys = visible_keys(a, sequence, token);
  const Vec factor = broadcast(keys.begin < keys.end ? 1.0f / sum : 0.0f);
  with_type(a.dtype, [&](auto t) {
    auto* to = static_cast<decltype(t)*>(a.out) + at;
    for_vectors(a.head_dim,
                [&](int64_t i, int64_t count) { store_some(to + i, load_some(from + i, count) * factor, count); });
  });
}

// Where the result of row r of an item goes until its splits are merged; see AttentionItem::partial.
struct Partial {
  float *out, *largest, *sum;

  Partial(const Attention& a, const AttentionItem& item, int64_t r) {
    const int64_t rows = item.row_end - item.row_begin, padded = padded_head_dim(a);
    float* const first = a.partial + item.partial;
    out = first + r * padded;
    largest = first + rows * padded + r;
    sum = largest + rows;
  }
};

inline void finish_row(const Attention& a, const AttentionItem& item, int64_t r, const float* out, float largest,
                       float sum) {
  if (item.partial < 0) {
    write_row(a, item, item.row_begin + r, out, sum);
    return;
  }
  const Partial to(a, item, r);
  __builtin_memcpy(to.out, out, static_cast<size_t>(padded_head_dim(a)) * sizeof(float));
  *to.largest = largest;
  *to.sum = sum;
}

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL
