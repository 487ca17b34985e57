// Per-head RMS norm and rotary embedding.
#include "cpu/rope.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// One head as the rotation sees it: elements times the inverse root mean square times the norm's weight.
template <typename T, typename W>
struct Head {
  const T* x;
  const W* weight;
  Vec inverse;

  Vec load(int64_t i, int64_t count) const {
    const Vec value = load_some(x + i, count);
    return weight == nullptr ? value : value * inverse * load_some(weight + i, count);
  }
};

template <typename T>
inline float inverse_rms(const T* x, int64_t size, float eps) {
  Vec sum = broadcast(0.0f);
  for_vectors(size, [&](int64_t i, int64_t count) {
    const Vec value = load_some(x + i, count);
    sum = fma(value, value, sum);
  });
  return 1.0f / __builtin_sqrtf(reduce_add(sum) / static_cast<float>(size) + eps);
}

template <typename T, typename W>
inline void rotate_half_split(const Head<T, W>& head, const float* cos, const float* sin, int64_t half, T* out) {
  for_vectors(half, [&](int64_t i, int64_t count) {
    const Vec a = head.load(i, count), b = head.load(half + i, count);
    const Vec c = load_some(cos + i, count), s = load_some(sin + i, count);
    store_some(out + i, a * c - b * s, count);
    store_some(out + half + i, b * c + a * s, count);
  });
}

// 16 pairs lie in two vectors; they are taken apart and put together again in memory.
template <typename T, typename W>
inline void rotate_interleaved(const Head<T, W>& head, const float* cos, const float* sin, int64_t half, T* out) {
  for_vectors(half, [&](int64_t i, int64_t count) {
    float pairs[2 * kLanes];
    const int64_t first = smaller(2 * count, kLanes), second = 2 * count - first;
    store(pairs, head.load(2 * i, first));
    if (second > 0) {
      store(pairs + kLanes, head.load(2 * i + kLanes, second));
    }
    for (int64_t p = 0; p < count; ++p) {
      const float a = pairs[2 * p], b = pairs[2 * p + 1];
      pairs[2 * p] = a * cos[i + p] - b * sin[i + p];
      pairs[2 * p + 1] = b * cos[i + p] + a * sin[i + p];
    }
    store_some(out + 2 * i, cpu::FERRUM_LEVEL::load(static_cast<const float*>(pairs)), first);
    if (second > 0) {
      store_some(out + 2 * i + kLanes, cpu::FERRUM_LEVEL::load(static_cast<const float*>(pairs + kLanes)), second);
    }
  });
}

template <typename T, typename W>
void rope_token(const HeadsRope& heads, int64_t token) {
  int64_t position = token;
  if (heads.positions != nullptr) {
    position = heads.long_positions ? static_cast<const int64_t*>(heads.positions)[token]
                                    : static_cast<const int32_t*>(heads.positions)[token];
  }
  const float* cos = heads.cos + position * heads.cos_stride;
  const float* sin = heads.sin + position * heads.sin_stride;
  const int64_t rotated = 2 * heads.half;
  Head<T, W> head{nullptr, static_cast<const W*>(heads.weight), broadcast(1.0f)};
  for (int64_t h = 0; h < heads.heads; ++h) {
    head.x = static_cast<const T*>(heads.x) + token * heads.token_stride + h * heads.head_stride;
    T* out = static_cast<T*>(heads.out) + (token * heads.heads + h) * heads.head_dim;
    if (head.weight != nullptr) {
      head.inverse = broadcast(inverse_rms(head.x, heads.head_dim, heads.eps));
    }
    if (heads.interleaved) {
      rotate_interleaved(head, cos, sin, heads.half, out);
    } else {
      rotate_half_split(head, cos, sin, heads.half, out);
    }
    for_vectors(heads.head_dim - rotated,
                [&](int64_t i, int64_t count) { store_some(out + rotated + i, head.load(rotated + i, count), count); });
  }
}

}  // namespace

void rope_tokens(const HeadsRope& heads, int64_t begin, int64_t end) {
  with_types(heads.dtype, heads.float_weight, [&](auto t, auto w) {
    for (int64_t token = begin; token < end; ++token) {
      rope_token<decltype(t), decltype(w)>(heads, token);
    }
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
