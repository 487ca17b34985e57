// RMS norm of rows, with or without the addition of a residual.
#include "cpu/norm.h"
#include "cpu/norm_squares.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

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
  const Vec inverse = inverse_rms(sum_of_squares<kResidual>(x, residual, rows.size), rows.size, rows.eps);
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
