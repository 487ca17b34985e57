// The kernels of the attention family. No torch here.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu {

// Rows of queries that one work item holds, and keys of one step of its online softmax.
constexpr int64_t kRowTile = 128;
constexpr int64_t kKeyTile = 128;
// Keys of a step where a sequence has a single query token. Measured: with 64, what is fetched ahead of several heads
// comes too early.
constexpr int64_t kDecodeTile = 32;
// A sequence whose queries fit one row tile is cut every this many keys, so that a long one occupies all cores. The
// cuts lie at multiples of it whatever the number of threads: the result does not depend on that.
constexpr int64_t kKeySplit = 512;

// What one call has in common. A cache is a table of rows of head_dim elements: key j of a sequence and head h is row
// `table[j / block_size] * block_rows + j % block_size * key_rows + h * head_rows`. A contiguous cache is one block per
// sequence, as long as its capacity.
struct Attention {
  const void* q;
  void* out;  // contiguous [tokens, heads, head_dim]
  const void* k;
  const void* v;
  const float* k_scale;  // per row, of int8 caches; else null
  const float* v_scale;
  float* partial;                         // results of splits
  int64_t q_token_stride, q_head_stride;  // in elements
  int64_t block_size, block_rows, key_rows, head_rows;
  int64_t kv_heads, group, head_dim;  // group: query heads per KV head
  int64_t window;                     // 0: all
  float scale;
  bool causal;
  Dtype dtype;  // of q, out and, without scales, the caches
};

struct Keys {
  int64_t begin, end;
};

struct AttentionSequence {
  int64_t q_offset;   // of its first token, in elements
  int64_t out_token;  // its first token in out
  int64_t tokens, kv_len;
  const int32_t* table;
};

// The keys that token t of the sequence sees.
inline Keys visible_keys(const Attention& a, const AttentionSequence& s, int64_t t) {
  int64_t end = a.causal ? s.kv_len - s.tokens + t + 1 : s.kv_len;
  end = end < 0 ? 0 : end;
  const bool cut = a.window > 0 && end > a.window;
  return {cut ? end - a.window : 0, end};
}

// The rows (token, query head of the group) [row_begin, row_end) of one sequence and KV head against the keys
// [key_begin, key_end) of which they may see some. Row r is token r / group, head r % group.
struct AttentionItem {
  const AttentionSequence* sequence;
  int64_t kv_head;
  int64_t row_begin, row_end;
  Keys keys;
  // Where in Attention::partial the result of one of several splits goes: rows of padded_head_dim floats not yet
  // divided by their sum, then the largest score and the sum of each row. -1: the only split, the result goes to out.
  int64_t partial;
};

// What a thread is given at a time: an item, or for a sequence of a single token those of several KV heads that lie
// side by side in the cache and see the same keys, so that memory is read in the order of its addresses.
struct AttentionTask {
  const AttentionItem* items;
  int64_t heads;
};

constexpr int64_t kPad = 32;  // head_dim in scratch is a multiple of this many floats

inline int64_t padded_head_dim(const Attention& a) { return (a.head_dim + kPad - 1) / kPad * kPad; }

// Floats of the partial result of `rows` rows.
inline int64_t partial_floats(const Attention& a, int64_t rows) { return rows * (padded_head_dim(a) + 2); }

// Floats of a decode task's scratch for every eight rows of a KV head: results, queries, three numbers for both lanes
// of a row.
inline int64_t decode_row_floats(const Attention& a) { return 16 * padded_head_dim(a) + 48; }

// Floats of scratch, 64-byte aligned, for items of at most `rows` rows: queries and results, scores and weights, the
// packed tiles of keys and values, five numbers per row.
inline int64_t scratch_floats(const Attention& a, int64_t rows) {
  rows = (rows + 15) / 16 * 16;
  return 2 * rows * padded_head_dim(a) + 2 * rows * kKeyTile + 2 * kKeyTile * padded_head_dim(a) + 5 * rows;
}

// The same for single tokens: state of the rows of all heads, keys as operands, scores and weights.
inline int64_t decode_scratch_floats(const Attention& a, int64_t rows, int64_t heads) {
  return heads * ((rows + 7) / 8) * decode_row_floats(a) + kDecodeTile * padded_head_dim(a) + 16 * kDecodeTile;
}

FERRUM_DECLARE_LEVELS(
    // `next` is the task that this thread will probably be given next, or null: its first keys are fetched meanwhile.
    void attend(const Attention& a, const AttentionTask& task, const AttentionTask* next, float* scratch);
    // out of all rows of the item's sequence and head from its splits: `splits` partial results one after the other.
    void merge_splits(const Attention& a, const AttentionItem& item, int64_t splits);)

// Not in the level's own file: a second declaration for other instructions would make it a second version.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(FERRUM_LEVEL)
#define FERRUM_BF16_PAIRS
namespace avx512 {
// attend for bfloat16 queries, over caches of that type or int8, with the instruction that multiplies pairs of them.
void attend_bf16_pairs(const Attention& a, const AttentionTask& task, const AttentionTask* next, float* scratch);
}  // namespace avx512
#endif

}  // namespace ferrum::cpu
