// SiLU(gate) * up over rows.
#include "cpu/activation.h"

namespace ferrum::cpu::FERRUM_LEVEL {

void silu_mul_rows(const GatedRows& rows, int64_t begin, int64_t end) {
  with_type(rows.dtype, [&](auto t) {
    using T = decltype(t);
    const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
    for (int64_t row = begin; row < end; ++row) {
      const T* gate_row = static_cast<const T*>(rows.gate) + row * rows.gate_stride;
      const T* up_row = static_cast<const T*>(rows.up) + row * rows.up_stride;
      T* out_row = static_cast<T*>(rows.out) + row * rows.out_stride;
      for_vectors(rows.size, [&](int64_t i, int64_t count) {
        const Vec gate = load_some(gate_row + i, count);
        const Vec silu = gate / (one + exp(zero - gate));
        store_some(out_row + i, silu * load_some(up_row + i, count), count);
      });
    }
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
