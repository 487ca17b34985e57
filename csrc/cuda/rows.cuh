// Rows whose elements do not depend on each other, spread over blocks.
#pragma once

#include "cuda/launch.h"

namespace ferrum::cuda {

// Threads of a block over the vectors of a row (x) and over rows (y); blocks over rows (x) and the rest of a row (y).
struct SpreadConfig {
  unsigned columns, rows, chunks;
};

constexpr unsigned kSpreadThreads = 256;
constexpr int64_t kMaxGridY = 65535;

// A thread moves one vector at a time: 2048 threads of a multiprocessor have 32 KB of each stream in flight, where full
// bandwidth takes 26 KB of reads and writes together (4.3 TB/s x 0.8 us over the 132 multiprocessors of an H200). Where
// so many threads are not to be had, blocks are small, to lie on as many multiprocessors as they can.
constexpr SpreadConfig pick_spread_config(int64_t rows, int64_t vectors) {
  const int64_t threads = rows * vectors >= 128 * kSpreadThreads ? kSpreadThreads : 64;
  int64_t chunks = (vectors + threads - 1) / threads;
  chunks = chunks < 1 ? 1 : chunks > kMaxGridY ? kMaxGridY : chunks;
  int64_t columns = ((vectors + chunks - 1) / chunks + 31) / 32 * 32;
  columns = columns < 32 ? 32 : columns > threads ? threads : columns;
  const int64_t fitting = threads / columns;
  return {static_cast<unsigned>(columns), static_cast<unsigned>(rows < fitting && rows > 0 ? rows : fitting),
          static_cast<unsigned>(chunks)};
}
constexpr bool spreads(int64_t rows, int64_t vectors, SpreadConfig expected) {
  const SpreadConfig config = pick_spread_config(rows, vectors);
  return config.columns == expected.columns && config.rows == expected.rows && config.chunks == expected.chunks;
}
static_assert(spreads(1, 96, {64, 1, 2}), "one token, I = 768, bf16");
static_assert(spreads(4096, 96, {96, 2, 1}));
static_assert(spreads(4096, 300, {160, 1, 2}), "equal shares rather than 256 and 44");
static_assert(spreads(1 << 20, 1, {32, 8, 1}) && spreads(1, 0, {32, 1, 1}));
static_assert(spreads(1, int64_t{1} << 40, {256, 1, 65535}), "what the grid cannot hold is a loop in the kernel");

inline Grid spread_grid(const char* op, const SpreadConfig& config, int64_t rows) {
  const int64_t blocks = (rows + config.rows - 1) / config.rows;
  return {dim3(narrow(op, "rows", blocks), config.chunks), dim3(config.columns, config.rows)};
}

}  // namespace ferrum::cuda
