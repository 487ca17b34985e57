// Which tile a product in the Marlin layout is cut into, and how often K is split.
//
// A block makes `tokens` x `columns` of the result, `depth` rows of K at a time. Four such stages lie in shared memory
// and three of them are under way (of 8-bit weights three and two). It takes 26 KB under way in each multiprocessor to
// have the bandwidth of an H200 (4.3 TB/s x 0.8 us / 132). Of 4-bit weights, a stage is columns * depth / 2 bytes:
//
//   tokens  columns  depth  stage of weights  under way  blocks wanted
//        8       64    256              8 KB      24 KB  3, for their instructions: 12 warps
//       16      128    128              8 KB      24 KB  3
//       32      128    128              8 KB      24 KB  2, as many as registers allow
//       64      256     64              8 KB      24 KB  1, of 8 warps
//
// As many blocks start as are resident at once, and walk over the tiles: a grouped product's list of blocks has room
// for every routing, and those behind its end (a quarter of them at M = 8, most at M = 32) cost no block of their own.
//
// A warp has four steps of 16 rows in each stage, over which it spreads what a stage costs besides its products.
// Narrow tiles make many blocks of one token's few weights. Wide ones read activations less often: of a routed block of
// Qwen3-30B-A3B at M = 512, 64 x 256 moves 0.67 GB from the second-level cache, 64 x 128 would 1.0.
#pragma once

#include <cstdint>

namespace ferrum::cuda {

struct MarlinTile {
  int tokens, columns, depth;
  int blocks;  // wanted in each multiprocessor
};

constexpr MarlinTile kMarlinTiles[] = {{8, 64, 256, 3}, {16, 128, 128, 3}, {32, 128, 128, 2}, {64, 256, 64, 1}};
constexpr int64_t kMarlinMinDepth = 256;  // rows of K that are worth a block of their own

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct MarlinShape {
  int64_t tokens;      // rows of the result; of a grouped product, entries of the list of blocks
  int64_t block_size;  // of a grouped product; 0: all rows have the same weights
  int64_t columns, depth;
  int64_t multiprocessors;
  int64_t counters;             // tiles that may be split
  int64_t max_sms = 0;          // the most multiprocessors to use; 0: all
  int64_t rows_per_matrix = 0;  // on average, of a grouped product; of another all of them
  bool wgmma = false;           // asked for
};

struct MarlinConfig {
  MarlinTile tile;
  int64_t token_tiles, column_tiles, splits;
  int64_t blocks;      // that walk over tiles x splits
  bool read_once;      // the weights, as far as anybody knows
  bool wgmma = false;  // tiles of 64 tokens by marlin_wgmma.cuh
};

// Those that are used.
constexpr int64_t marlin_multiprocessors(const MarlinShape& s) {
  return s.max_sms > 0 && s.max_sms < s.multiprocessors ? s.max_sms : s.multiprocessors;
}

constexpr MarlinConfig marlin_config(const MarlinShape& s, const MarlinTile& tile) {
  const int64_t multiprocessors = marlin_multiprocessors(s);
  const int64_t block = s.block_size > 0 ? s.block_size : s.tokens;
  const int64_t blocks = s.block_size > 0 ? divide_up(s.tokens, s.block_size) : 1;
  MarlinConfig c{tile, blocks * divide_up(block, tile.tokens), divide_up(s.columns, tile.columns), 1, 0, false};
  const int64_t tiles = c.token_tiles * c.column_tiles;
  if (tiles > 0 && tiles <= s.counters) {  // as many splits as are resident at once
    const int64_t resident = multiprocessors * tile.blocks / tiles, deep = s.depth / kMarlinMinDepth;
    const int64_t splits = resident < deep ? resident : deep;
    c.splits = splits > 1 ? splits : 1;
  }
  const int64_t most = s.max_sms > 0 ? multiprocessors : multiprocessors * tile.blocks;
  c.blocks = tiles * c.splits < most ? tiles * c.splits : most;
  c.read_once = s.rows_per_matrix <= tile.tokens;
  return c;
}

// The products that a multiprocessor makes one after another, in numbers of the result.
constexpr int64_t marlin_cost(const MarlinShape& s, const MarlinConfig& c) {
  const int64_t resident = marlin_multiprocessors(s) * c.tile.blocks;
  const int64_t rounds = divide_up(c.token_tiles * c.column_tiles * c.splits, resident);
  return rounds * c.tile.blocks * c.tile.tokens * c.tile.columns / c.splits;
}

// The smallest tile that holds a block of tokens: weights are then read once for it. More than 32 tokens of one matrix
// are cut by the time the products take. Those are what wgmma could be faster for; no device has measured it yet, so it
// is taken only where a test or a benchmark asks for it (marlin_wgmma.h).
constexpr MarlinConfig pick_marlin_config(const MarlinShape& s) {
  const int64_t block = s.block_size > 0 ? s.block_size : s.tokens;
  for (const MarlinTile& tile : kMarlinTiles) {
    if (block <= tile.tokens && tile.tokens < 64) {
      return marlin_config(s, tile);
    }
  }
  MarlinConfig wide = marlin_config(s, kMarlinTiles[3]);
  if (s.wgmma) {
    wide.wgmma = true;
    return wide;
  }
  const MarlinConfig narrow = marlin_config(s, kMarlinTiles[2]);
  return s.block_size > 0 || marlin_cost(s, wide) <= marlin_cost(s, narrow) ? wide : narrow;
}

// Qwen3-30B-A3B on an H200: experts of 2048 x 1536 and 768 x 2048 (M tokens, top-8, so 8 M pairs; entries is the
// capacity of moe_align_block_size), dense 2048 x 5120 and 4096 x 2048.
constexpr bool picks(int64_t tokens, int64_t block_size, int64_t columns, int64_t depth, int tile, int64_t tiles,
                     int64_t splits) {
  const MarlinConfig c = pick_marlin_config({tokens, block_size, columns, depth, 132, 16 * 132});
  return c.tile.tokens == tile && c.token_tiles * c.column_tiles == tiles && c.splits == splits;
}
static_assert(picks(64, 8, 1536, 2048, 8, 192, 2), "M = 1: 384 blocks, 2.9 a multiprocessor; unsplit it were 1.5");
static_assert(picks(64, 8, 2048, 768, 8, 256, 1),
              "M = 1: 1.9 blocks a multiprocessor, all of whose weights are under way");
static_assert(picks(512, 8, 1536, 2048, 8, 1536, 1), "M = 8: about 52 of 64 blocks have rows, 3.2 waves of 3");
static_assert(picks(512, 8, 2048, 768, 8, 2048, 1));
static_assert(picks(256 + 128 * 7, 8, 1536, 2048, 8, 144 * 24, 1), "M = 32: 2.3 rows an expert");
static_assert(picks(1024 + 128 * 15, 16, 1536, 2048, 16, 184 * 12, 1), "M = 128: 8 rows an expert");
static_assert(picks(1024 + 128 * 15, 16, 2048, 768, 16, 184 * 16, 1));
static_assert(picks(4096 + 128 * 31, 32, 1536, 2048, 32, 252 * 12, 1), "M = 512: 32 rows an expert");
static_assert(picks(4096 + 128 * 63, 64, 1536, 2048, 64, 190 * 6, 1), "M = 512, 5 to 8 waves of 132 blocks");
static_assert(picks(4096 + 128 * 47, 48, 2048, 768, 64, 211 * 8, 1), "48 rows of 64 are used");
static_assert(picks(128 * 130, 128, 2048, 768, 64, 260 * 8, 1), "a block is two tiles");
static_assert(picks(1, 0, 5120, 2048, 8, 80, 4), "320 blocks of 512 rows");
static_assert(picks(1, 0, 2048, 4096, 8, 32, 12), "384 blocks of 341 rows");
static_assert(picks(16, 0, 5120, 2048, 16, 40, 8), "320 blocks of 256 rows");
static_assert(picks(32, 0, 2048, 4096, 32, 16, 16), "256 blocks of 256 rows");
static_assert(picks(128, 0, 5120, 2048, 64, 40, 3), "120 blocks in one round");
static_assert(picks(512, 0, 5120, 2048, 32, 640, 1), "3 rounds of 2 x 32 x 128 take less than 2 of 64 x 256");
static_assert(picks(512, 0, 2048, 4096, 64, 64, 2));
constexpr MarlinConfig picked(int64_t tokens, int64_t block_size, int64_t columns, int64_t rows, int64_t max_sms = 0) {
  return pick_marlin_config({tokens, block_size, columns, 2048, 132, 16 * 132, max_sms, rows});
}
static_assert(picked(64, 8, 1536, 1).blocks == 384 && picked(512, 8, 1536, 1).blocks == 396, "3 a multiprocessor");
static_assert(picked(1024 + 128 * 15, 16, 1536, 8).blocks == 396, "M = 128: 5.6 tiles each, one after another");
static_assert(picked(4096 + 128 * 31, 32, 1536, 32).blocks == 264 &&
              picked(4096 + 128 * 63, 64, 1536, 32).blocks == 132);
static_assert(picked(512, 8, 1536, 1, 7).blocks == 7, "no more blocks than multiprocessors");
static_assert(picked(512, 8, 1536, 1).read_once && picked(1024 + 128 * 15, 16, 1536, 8).read_once);
static_assert(!picked(4096 + 128 * 31, 32, 1536, 40).read_once && !picked(65, 0, 5120, 65).read_once);
constexpr bool picks_wgmma(int64_t tokens, int64_t block_size, bool asked_for) {
  return pick_marlin_config({tokens, block_size, 1536, 2048, 132, 0, 0, 0, asked_for}).wgmma;
}
static_assert(picks_wgmma(4096 + 128 * 63, 64, true) && picks_wgmma(512, 0, true), "more than 32 rows of a matrix");
static_assert(!picks_wgmma(4096 + 128 * 31, 32, true) && !picks_wgmma(4096 + 128 * 63, 64, false), "not by itself");
static_assert(picks(0, 0, 2048, 4096, 8, 0, 1) && picks(1, 0, 0, 4096, 8, 0, 1) && picks(1, 0, 64, 0, 8, 1, 1));

}  // namespace ferrum::cuda
