// Weighted sums of the rows of each token, in ascending slot order.
#include "cpu/moe_combine.h"
#include "cpu/norm_squares.h"

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

// Columns [first, first + kVectors * 16), or `count` of them where kVectors is 1. finish(i, sum, count) takes the sums.
template <int kVectors, typename T, typename Finish>
inline void sum_columns(const WeightedRows& sums, int64_t token, int64_t first, int64_t count, Finish finish) {
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
  for (int v = 0; v < kVectors; ++v) {
    finish(first + v * kLanes, total[v], count);
  }
}

template <typename T, typename Finish>
inline void sum_token(const WeightedRows& sums, int64_t token, Finish finish) {
  constexpr int kVectors = 8;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= sums.size; i += kVectors * kLanes) {
    sum_columns<kVectors, T>(sums, token, i, kLanes, finish);
  }
  for (; i < sums.size; i += kLanes) {
    sum_columns<1, T>(sums, token, i, smaller(sums.size - i, kLanes), finish);
  }
}

template <typename T, typename W>
void add_norm_token(const WeightedRows& sums, const NormOfSums& norm, float* scratch, int64_t token) {
  T* residual = static_cast<T*>(sums.out) + token * sums.out_stride;
  sum_token<T>(sums, token, [&](int64_t i, Vec sum, int64_t count) {
    const Vec updated = load_some(residual + i, count) + sum;
    store_some(residual + i, updated, count);
    store_some(scratch + i, updated, count);
  });
  const float* unrounded = scratch;
  const float squares = sum_of_squares<false>(unrounded, unrounded, sums.size);
  const Vec inverse = inverse_rms(squares, sums.size, norm.eps);
  const W* weight = static_cast<const W*>(norm.weight);
  T* out = static_cast<T*>(norm.out) + token * sums.size;
  for_vectors(sums.size, [&](int64_t i, int64_t count) {
    store_some(out + i, load_some(unrounded + i, count) * inverse * load_some(weight + i, count), count);
  });
}

}  // namespace

void combine_tokens(const WeightedRows& sums, int64_t begin, int64_t end) {
  with_type(sums.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t token = begin; token < end; ++token) {
      T* out = static_cast<T*>(sums.out) + token * sums.out_stride;
      sum_token<T>(sums, token, [&](int64_t i, Vec sum, int64_t count) { store_some(out + i, sum, count); });
    }
  });
}

void add_tokens(const WeightedRows& sums, int64_t begin, int64_t end) {
  with_type(sums.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t token = begin; token < end; ++token) {
      T* out = static_cast<T*>(sums.out) + token * sums.out_stride;
      sum_token<T>(sums, token, [&](int64_t i, Vec sum, int64_t count) {
        store_some(out + i, load_some(out + i, count) + sum, count);
      });
    }
  });
}

void add_norm_tokens(const WeightedRows& sums, const NormOfSums& norm, float* scratch, int64_t begin, int64_t end) {
  with_types(sums.dtype, norm.float_weight, [&](auto t, auto w) {
    for (int64_t token = begin; token < end; ++token) {
      add_norm_token<decltype(t), decltype(w)>(sums, norm, scratch, token);
    }
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
