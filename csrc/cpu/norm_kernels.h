// RMS norm of rows, with or without the addition of a residual.
#include "cpu/norm.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// x + residual in float32. Formed twice rather than kept: the row is in L1, and the sum must not be rounded in between.
template <bool kResidual, typename T>
inline Vec load_sum(const T* x, const T* residual, int64_t i, int64_t count) {
  const Vec value = load_some(x + i, count);
  if constexpr (kResidual) {
    return value + load_some(residual + i, count);
  }
  return value;
}

template <bool kResidual, typename T>
inline float sum_of_squares(const T* x, const T* residual, int64_t size) {
  constexpr int64_t kStep = 4 * kLanes;
  Vec sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    for (int64_t s = 0; s < 4; ++s) {
      const Vec value = load_sum<kResidual>(x, residual, i + s * kLanes, kLanes);
      sums[s] = fma(value, value, sums[s]);
    }
  }
  for (; i < size; i += kLanes) {
    const Vec value = load_sum<kResidual>(x, residual, i, smaller(size - i, kLanes));
    sums[0] = fma(value, value, sums[0]);
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <bool kResidual, typename T, typename W>
void norm_row(const NormRows& rows, int64_t row) {
  const T* x = static_cast<const T*>(rows.x) + row * rows.x_stride;
  const T* residual = nullptr;
  T* residual_out = nullptr;
  if constexpr (kResidual) {
    residual = static_cast<const T*>(rows.residual) + row * rows.residual_stride;
    residual_out = static_cast<T*>(rows.residual_out) + row * rows.residual_out_stride;
  }
  const W* weight = static_cast<const W*>(rows.weight);
  T* out = static_cast<T*>(rows.out) + row * rows.out_stride;
  const float mean = sum_of_squares<kResidual>(x, residual, rows.size) / static_cast<float>(rows.size);
  const Vec inverse = broadcast(1.0f / __builtin_sqrtf(mean + rows.eps));
  for_vectors(rows.size, [&](int64_t i, int64_t count) {
    const Vec value = load_sum<kResidual>(x, residual, i, count);
    if constexpr (kResidual) {
      store_some(residual_out + i, value, count);
    }
    store_some(out + i, value * inverse * load_some(weight + i, count), count);
  });
}

}  // namespace

void norm_rows(const NormRows& rows, int64_t begin, int64_t end) {
  with_types(rows.dtype, rows.float_weight, [&](auto t, auto w) {
    for (int64_t row = begin; row < end; ++row) {
      if (rows.residual != nullptr) {
        norm_row<true, decltype(t), decltype(w)>(rows, row);
      } else {
        norm_row<false, decltype(t), decltype(w)>(rows, row);
      }
    }
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
