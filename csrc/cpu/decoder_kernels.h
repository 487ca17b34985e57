// The addition of the residual.
#include "cpu/decoder_sum.h"

namespace ferrum::cpu::FERRUM_LEVEL {

void add_to(void* to, const void* from, Dtype dtype, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    T* sum = static_cast<T*>(to) + begin;
    const T* other = static_cast<const T*>(from) + begin;
    for_vectors(end - begin, [&](int64_t i, int64_t count) {
      store_some(sum + i, load_some(static_cast<const T*>(sum) + i, count) + load_some(other + i, count), count);
    });
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
