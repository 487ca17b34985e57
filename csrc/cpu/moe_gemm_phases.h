// The phases of one block of experts over int4-packed weights.
#pragma once

#include <cstdint>

#include "cpu/int4_activations.h"
#include "cpu/int4_kernels.h"

namespace ferrum::cpu {

// One of the two stacked projections.
struct ExpertMatrices {
  PackedWeights first;  // expert 0
  int64_t tiles;        // of one expert
  const int32_t* perm;  // [E, perm_parts, K_packed] or nullptr
  int64_t perm_parts;
  int64_t group_size;

  int64_t packed_rows() const { return first.lines * int4::kLineRows; }
  PackedWeights expert(int64_t e) const {
    PackedWeights w = first;
    const int64_t per_expert = tiles * w.groups * int4::kTileColumns;
    w.codes += e * tiles * w.lines * int4::kLineBytes;
    w.scales += e * per_expert;
    w.zeros = w.zeros ? w.zeros + e * per_expert : nullptr;
    return w;
  }
  const int32_t* perm_of(int64_t e, int64_t part) const {
    return perm ? perm + (e * perm_parts + part) * packed_rows() : nullptr;
  }
};

struct ExpertBlock {
  const Int4Kernels& kernels;
  bool int8;
  int64_t experts, hidden_size, intermediate_size, top_k;
  FloatType type;
  ExpertMatrices w13;  // tiles alternate: gate, up
  ExpertMatrices w2;
};

struct TokenChunk {
  int64_t tokens;
  const char* hidden;    // [tokens, hidden_size] of the block's type
  const int32_t* ids;    // [tokens, top_k]; outside [0, experts): skipped
  const float* weights;  // [tokens, top_k]
  char* out;             // like hidden
};

// Entries of the permutations are checked where they are used: reading them all first would cost a pass of its own.
enum class PermStatus { ok, bad_w13, bad_w2 };

// out[t] = sum over k of weights[t, k] * down(silu(gate) * up). Throws only for lack of memory.
PermStatus run_expert_block(const ExpertBlock& block, const TokenChunk& chunk);

}  // namespace ferrum::cpu
