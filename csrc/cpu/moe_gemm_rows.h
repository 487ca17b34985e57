// Rows of a routed expert block sorted by expert, how its tasks are shared out among threads, and the sums over a
// token's experts.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/int4_args.h"

namespace ferrum::cpu {

// (token, slot) pairs sorted by expert, in the order of the tokens inside one expert. Skipped pairs have no row.
struct Routing {
  std::vector<int32_t> active;    // experts that have rows, ascending
  std::vector<int32_t> offsets;   // rows of active[a]: [offsets[a], offsets[a + 1])
  std::vector<int32_t> pair;      // of each row
  std::vector<int32_t> token;     // of each row
  std::vector<int32_t> expert;    // of each row
  std::vector<int32_t> identity;  // 0, 1, 2, ...: the row ids of buffers that are in this order themselves

  int64_t num_active() const { return static_cast<int64_t>(active.size()); }
  int64_t rows() const { return static_cast<int64_t>(token.size()); }

  // ids: int32 [tokens, top_k]; those outside [0, experts) are skipped.
  Routing(const int32_t* ids, int64_t tokens, int64_t top_k, int64_t experts) {
    std::vector<int32_t> next(experts + 1, 0);
    const int64_t pairs = tokens * top_k;
    for (int64_t p = 0; p < pairs; ++p) {
      if (ids[p] >= 0 && ids[p] < experts) {
        ++next[ids[p] + 1];
      }
    }
    offsets.push_back(0);
    for (int64_t e = 0; e < experts; ++e) {
      if (next[e + 1] > 0) {
        active.push_back(static_cast<int32_t>(e));
        offsets.push_back(offsets.back() + next[e + 1]);
      }
      next[e + 1] += next[e];
    }
    pair.resize(next[experts]);
    token.resize(next[experts]);
    expert.resize(next[experts]);
    identity.resize(next[experts]);
    for (int64_t p = 0; p < pairs; ++p) {
      const int32_t e = ids[p];
      if (e >= 0 && e < experts) {
        const int32_t row = next[e]++;
        pair[row] = static_cast<int32_t>(p);
        token[row] = static_cast<int32_t>(p / top_k);
        expert[row] = e;
        identity[row] = row;
      }
    }
  }
};

// Runs f(thread, task, next) for every task, `next` being the task this thread will run then, or `tasks` after its
// last. Threads take runs of consecutive tasks as they become free, so that neither a busy core nor an expert with many
// rows is waited for: at most `run` tasks, and ever fewer towards the end. `bytes` is the memory the phase reads:
// little work stays on one thread.
template <typename F>
inline void for_each_task(int64_t tasks, int64_t run, int64_t bytes, int64_t threads, const F& f) {
  constexpr int64_t kBytesPerThread = 64 * 1024;
  const int64_t wanted = std::min({threads, (tasks + run - 1) / run, std::max<int64_t>(1, bytes / kBytesPerThread)});
  struct Run {
    int64_t begin, end;
  };
  std::atomic<int64_t> unclaimed{0};
  const auto claim = [&] {
    Run mine{unclaimed.load(), 0};
    do {
      mine.end = mine.begin + std::clamp<int64_t>((tasks - mine.begin) / (2 * wanted), mine.begin < tasks, run);
    } while (!unclaimed.compare_exchange_weak(mine.begin, mine.end));
    return mine;
  };
  torch::stable::parallel_for(0, wanted, 1, [&](int64_t begin, int64_t) {
    for (Run mine = claim(); mine.begin < tasks;) {
      for (; mine.begin + 1 < mine.end; ++mine.begin) {
        f(begin, mine.begin, mine.begin + 1);
      }
      const int64_t last = mine.begin;
      mine = claim();
      f(begin, last, mine.begin);
    }
  });
}

// Panels of the down product that one task takes for all experts. Long runs read each expert's panels as one stream;
// short ones keep the sums in the cache and the cores busy.
inline int64_t panels_per_task(int64_t panels, int64_t rows, int64_t threads) {
  const int64_t fits = std::max<int64_t>(1, 1024 / std::max<int64_t>(1, rows));
  return std::max<int64_t>(1, std::min(fits, panels / (threads * 4)));
}

// sums[token] += weight * panel row, for the rows [first, first + rows) of the routing.
inline void add_rows(const Int4Kernels& kernels, const Routing& routing, const float* weights, const float* panel,
                     int64_t first, int64_t rows, int64_t columns, float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    kernels.add_scaled(panel + r * kPanelColumns, weights[routing.pair[first + r]], columns,
                       sums + routing.token[first + r] * kPanelColumns);
  }
}

// The columns from `column` on of all tokens' outputs, `size` wide.
inline void store_sums(const Int4Kernels& kernels, FloatType type, const float* sums, int64_t tokens, int64_t size,
                       int64_t column, int64_t columns, char* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    kernels.from_float(sums + t * kPanelColumns, columns, type, out + (t * size + column) * float_bytes(type));
  }
}

}  // namespace ferrum::cpu
