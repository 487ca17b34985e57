// The statistics of an RMS norm, shared by every kernel that normalises a row.
#pragma once

#include "cpu/simd.h"

namespace ferrum::cpu::FERRUM_LEVEL {

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

// 1 / sqrt(mean + eps)
inline Vec inverse_rms(float squares, int64_t size, float eps) {
  return broadcast(1.0f / __builtin_sqrtf(squares / static_cast<float>(size) + eps));
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
