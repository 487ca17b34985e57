// SiLU(gate) * up and GELU(gate) * up over rows.
#include "cpu/activation.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

inline Vec silu(Vec x) { return x / (broadcast(1.0f) + exp(broadcast(0.0f) - x)); }

// x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), written as x / (1 + e^(-2u)).
inline Vec gelu_tanh(Vec x) {
  const Vec cubic = fma(x * x * broadcast(0.044715f), x, x);
  return x / (broadcast(1.0f) + exp(cubic * broadcast(-1.5957691216057308f)));
}

template <typename Activation>
inline void gated_rows(const GatedRows& rows, int64_t begin, int64_t end, Activation activation) {
  with_type(rows.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t row = begin; row < end; ++row) {
      const T* gate_row = static_cast<const T*>(rows.gate) + row * rows.gate_stride;
      const T* up_row = static_cast<const T*>(rows.up) + row * rows.up_stride;
      T* out_row = static_cast<T*>(rows.out) + row * rows.out_stride;
      for_vectors(rows.size, [&](int64_t i, int64_t count) {
        store_some(out_row + i, activation(load_some(gate_row + i, count)) * load_some(up_row + i, count), count);
      });
    }
  });
}

}  // namespace

void silu_mul_rows(const GatedRows& rows, int64_t begin, int64_t end) {
  gated_rows(rows, begin, end, [](Vec x) { return silu(x); });
}

void gelu_tanh_mul_rows(const GatedRows& rows, int64_t begin, int64_t end) {
  gated_rows(rows, begin, end, [](Vec x) { return gelu_tanh(x); });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
