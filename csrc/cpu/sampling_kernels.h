// Greedy choice and repetition penalty on rows of logits.
#include "cpu/sampling.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

constexpr float kInfinity = __builtin_inff();

// The values that may be chosen, -Inf in place of all others. Both sums leave a value as it is or make it NaN, which
// loses every comparison: x - x is 0 for a finite x and NaN for the rest.
template <bool kMasked, typename T>
inline Vec candidates(const T* logits, const uint8_t* mask, int64_t count) {
  const Vec x = load_some(logits, count);
  Vec competing = x + (x - x);
  if constexpr (kMasked) {
    float bar[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      bar[i] = mask[i] ? 0.0f : __builtin_nanf("");
    }
    competing = competing + load(static_cast<const float*>(bar));
  }
  const Vec lowest = broadcast(-kInfinity);
  const Vec chosen = max(competing, lowest);
  if (count == kLanes) {
    return chosen;
  }
  float lanes[kLanes];
  store(lanes, lowest);
  store_some(lanes, chosen, count);
  return load(static_cast<const float*>(lanes));
}

template <bool kMasked, typename T>
Largest largest_in(const T* logits, const uint8_t* mask, int64_t begin, int64_t end) {
  // The row is read once: only the block that raised the maximum last is searched for its place.
  constexpr int64_t kBlock = 32 * kLanes;
  Largest best{-kInfinity, -1};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t size = smaller(kBlock, end - block);
    Vec lanes = broadcast(-kInfinity);
    for_vectors(size, [&](int64_t i, int64_t count) {
      lanes = max(candidates<kMasked>(logits + block + i, mask + (kMasked ? block + i : 0), count), lanes);
    });
    const float largest = reduce_max(lanes);
    if (largest > best.value) {
      best = {largest, block};
    }
  }
  if (best.index < 0) {
    return best;
  }
  for (int64_t i = best.index;; i += kLanes) {
    const int64_t count = smaller(kLanes, end - i);
    const Vec values = candidates<kMasked>(logits + i, mask + (kMasked ? i : 0), count);
    const uint32_t equal = ~greater_mask(broadcast(best.value), values) & 0xffffu;
    if (equal != 0) {
      return {best.value, i + __builtin_ctz(equal)};
    }
  }
}

template <typename T>
inline float value_of(const T* from) {
  float lanes[kLanes];
  store(lanes, load(from, 1));
  return lanes[0];
}

}  // namespace

Largest largest_of(const LogitRows& rows, int64_t row, int64_t begin, int64_t end) {
  Largest largest{-kInfinity, -1};
  with_type(rows.dtype, [&](auto t) {
    using T = decltype(t);
    const T* logits = static_cast<const T*>(rows.logits) + row * rows.logits_stride;
    if (rows.mask == nullptr) {
      largest = largest_in<false>(logits, nullptr, begin, end);
    } else {
      largest = largest_in<true>(logits, rows.mask + row * rows.mask_stride, begin, end);
    }
  });
  return largest;
}

void penalize(void* logits, Dtype dtype, const int64_t* ids, int64_t count, float penalty, float* values) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    T* row = static_cast<T*>(logits);
    // All are read before any is written, so that an id listed twice counts once.
    for (int64_t i = 0; i < count; ++i) {
      const float value = value_of(row + ids[i]);
      const float penalized = value > 0.0f ? value / penalty : value * penalty;
      values[i] = value - value == 0.0f ? penalized : __builtin_nanf("");
    }
    for (int64_t i = 0; i < count; ++i) {
      if (values[i] == values[i]) {
        store(row + ids[i], broadcast(values[i]), 1);
      }
    }
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
