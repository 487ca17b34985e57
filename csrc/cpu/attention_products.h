// The two products of attention, scores = queries * keys and results = weights * values: how they read their operands,
// and the register tile of a matrix multiplication that computes them.
#pragma once

#include "cpu/attention_pack.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// Operands are one float32 after the other. See the bfloat16 form for the other way.
struct Float32Product {
  static constexpr int64_t kPerElement = 1;  // values in one float of an operand
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }

  static void load_query(Dtype dtype, const void* q, int64_t offset, int64_t head_dim, float* to) {
    with_type(dtype, [&](auto t) {
      const auto* from = static_cast<const decltype(t)*>(q) + offset;
      for_vectors(head_dim, [&](int64_t i, int64_t count) { store_some(to + i, load_some(from + i, count), count); });
    });
  }
  template <typename T>
  static void pack_keys(const CacheRows<T>& k, int64_t depth, float* to) {
    pack_keys_float32(k, depth, to);
  }
  template <typename T>
  static bool pack_values(const CacheRows<T>& v, int64_t padded, bool look, float* to) {
    return pack_values_float32(v, padded, look, to);
  }
  // One key as an operand, with zeros up to a multiple of kPad elements.
  template <typename T>
  static void widen_key(const CacheRows<T>& k, int64_t key, int64_t padded, float* to) {
    for (int64_t d = 0; d < padded; d += kLanes) {
      store(to + d, k.whole(key, 1, d, kLanes) ? k.load_whole(key, d) : k.load(key, d));
    }
  }
  // Elements [d, d + kPanel) of value `line`.
  template <typename T>
  static void load_values(const CacheRows<T>& v, int64_t line, int64_t d, Vec* to) {
    for (int i = 0; i < kTileVectors; ++i, d += kLanes) {
      to[i] = v.whole(line, 1, d, kLanes) ? v.load_whole(line, d) : v.load(line, d);
    }
  }
  // Stores 16 weights as the left operand of the product with the values.
  static void store_weights(float* to, Vec weights) { store(to, weights); }
};

#if defined(FERRUM_ATTENTION_PAIRS)
// Pairs of bfloat16 in every float of the operands: products exact, sums in float32. The weights are rounded to
// bfloat16, as is the result in the end.
struct Bf16PairProduct {
  static constexpr int64_t kPerElement = 2;
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }

  static void load_query(Dtype, const void* q, int64_t offset, int64_t head_dim, float* to) {
    __builtin_memcpy(to, static_cast<const BFloat16*>(q) + offset, static_cast<size_t>(head_dim) * sizeof(BFloat16));
  }
  template <typename T>
  static void pack_keys(const CacheRows<T>& k, int64_t depth, float* to) {
    pack_keys_pairs(k, depth, to);
  }
  template <typename T>
  static bool pack_values(const CacheRows<T>& v, int64_t padded, bool look, float* to) {
    return pack_values_pairs(v, padded, look, to);
  }
  template <typename T>
  static void widen_key(const CacheRows<T>& k, int64_t key, int64_t padded, float* to) {
    for (int64_t d = 0; d < padded; d += 2 * kLanes) {
      store(to + d / 2, load_pairs(k, key, d));
    }
  }
  // Elements [d, d + kPanel) of the values 2 * line and 2 * line + 1.
  template <typename T>
  static void load_values(const CacheRows<T>& v, int64_t line, int64_t d, Vec* to) {
    interleave(load_pairs(v, 2 * line, d), load_pairs(v, 2 * line + 1, d), to);
  }
  static void store_weights(float* to, Vec weights) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weights.v)));
  }
};
#endif

// Rows of both caches that will be needed next. The products ask for a cache line per step of their inner loop, of keys
// and values in turn, so that memory is read at an even pace while the processor computes. To the second level: more
// loads may wait there than at the first.
struct Ahead {
  const char* cache = nullptr;
  const char* other = nullptr;
  const char* keys = nullptr;
  const int64_t* row = nullptr;  // in bytes from the caches
  const int64_t* end = nullptr;
  int64_t row_bytes = 0, byte = 0;

  void step() {
    if (row == end) {
      return;
    }
    __builtin_prefetch(cache + *row + byte, 0, 2);
    const char* next = other;
    other = cache;
    cache = next;
    if (cache == keys && (byte += 64) >= row_bytes) {
      byte = 0;
      ++row;
    }
  }
  void steps(int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      step();
    }
  }
};

// c = start * c + a b for `Rows` rows of a and one panel of b, over the elements [begin, end) of the rows; strides in
// floats. Without `start`, c is not read.
struct PanelProduct {
  const float* a;
  const float* b;
  float* c;
  const float* start;
  int64_t a_stride, c_stride, begin, end;
};

template <typename Product, int Rows>
inline void multiply_rows(const PanelProduct& p, Ahead& next) {
  Ahead ahead = next;
  Vec sum[Rows][kTileVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      sum[r][v] = p.start == nullptr
                      ? broadcast(0.0f)
                      : load(static_cast<const float*>(p.c + r * p.c_stride + v * kLanes)) * broadcast(p.start[r]);
    }
  }
  for (int64_t i = p.begin; i < p.end; ++i) {
    ahead.step();
    Vec b[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      b[v] = load(p.b + i * kPanel + v * kLanes);
    }
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < kTileVectors; ++v) {
        sum[r][v] = Product::multiply_add(broadcast(p.a[r * p.a_stride + i]), b[v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      store(p.c + r * p.c_stride + v * kLanes, sum[r][v]);
    }
  }
  next = ahead;
}

template <typename Product, int Rows>
inline void multiply_panel(const PanelProduct& p, int64_t rows, Ahead& ahead) {
  if (rows == Rows) {
    multiply_rows<Product, Rows>(p, ahead);
  } else if constexpr (Rows > 1) {
    multiply_panel<Product, Rows - 1>(p, rows, ahead);
  }
}

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL
