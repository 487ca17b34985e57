// Weighted sums of the rows of each token, in ascending slot order.
#include "cpu/moe_combine.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

template <typename T>
inline const T* row_of(const WeightedRows& sums, int64_t token, int64_t slot) {
  const T* rows = static_cast<const T*>(sums.rows);
  if (sums.pairs == nullptr) {
    return rows + token * sums.token_stride + slot * sums.slot_stride;
  }
  const int64_t row = sums.pairs[token * sums.top_k + slot];
  return row >= 0 && row < sums.num_rows ? rows + row * sums.row_stride : nullptr;
}

// Columns [first, first + kVectors * 16), or `count` of them where kVectors is 1.
template <int kVectors, typename T>
inline void combine_columns(const WeightedRows& sums, int64_t token, int64_t first, int64_t count) {
  Vec total[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    total[v] = broadcast(0.0f);
  }
  for (int64_t slot = 0; slot < sums.top_k; ++slot) {
    const T* row = row_of<T>(sums, token, slot);
    if (row == nullptr) {
      continue;
    }
    const Vec weight = broadcast(sums.weights[token * sums.top_k + slot]);
    for (int v = 0; v < kVectors; ++v) {
      total[v] = fma(weight, load_some(row + first + v * kLanes, count), total[v]);
    }
  }
  T* out = static_cast<T*>(sums.out) + token * sums.size + first;
  for (int v = 0; v < kVectors; ++v) {
    store_some(out + v * kLanes, total[v], count);
  }
}

}  // namespace

void combine_tokens(const WeightedRows& sums, int64_t begin, int64_t end) {
  constexpr int kVectors = 8;
  with_type(sums.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t token = begin; token < end; ++token) {
      int64_t i = 0;
      for (; i + kVectors * kLanes <= sums.size; i += kVectors * kLanes) {
        combine_columns<kVectors, T>(sums, token, i, kLanes);
      }
      for (; i < sums.size; i += kLanes) {
        combine_columns<1, T>(sums, token, i, smaller(sums.size - i, kLanes));
      }
    }
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
