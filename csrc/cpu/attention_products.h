// The two products of attention, scores = queries * keys and results = weights * values: how they read their operands,
// and the register tile of a matrix multiplication that computes them.
#pragma once

#include "cpu/attention_pack.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// Operands are one float32 after the other. See the bfloat16 form for the other way.
struct Float32Product {
  static constexpr int64_t kPerElement = 1;  // values in one float of an operand
  static constexpr bool kIntegers = false;   // whether weights need a factor that makes them integers
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
  static Vec to_float(Vec sum) { return sum; }

  // Returns by what its products are to be multiplied.
  static float load_query(Dtype dtype, const void* q, int64_t offset, int64_t head_dim, float* to) {
    with_type(dtype, [&](auto t) {
      const auto* from = static_cast<const decltype(t)*>(q) + offset;
      for_vectors(head_dim, [&](int64_t i, int64_t count) { store_some(to + i, load_some(from + i, count), count); });
    });
    return 1.0f;
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
  // Elements [d, d + kPanel) of value `line`; `Whole`: all of them are there.
  template <bool Whole, typename T>
  static void load_values(const CacheRows<T>& v, int64_t line, int64_t d, Vec* to) {
    for (int i = 0; i < kTileVectors; ++i, d += kLanes) {
      to[i] = Whole || v.whole(line, 1, d, kLanes) ? v.load_whole(line, d) : v.load(line, d);
    }
  }
  // Stores 16 weights as the left operand of the product with the values.
  static void store_weights(float* to, Vec weights) { store(to, weights); }
};

// Rounding to integers of at most 32767 in magnitude: the step, and by what to multiply before rounding. `most` is the
// largest magnitude in each lane. One that is not finite makes the step NaN.
struct IntegerSteps {
  Vec step, inverse;
  explicit IntegerSteps(Vec most) {
    const Vec above_zero = max(most, broadcast(1e-33f));  // whose inverse does not overflow
    step = fma(most, broadcast(0.0f), above_zero) * broadcast(1.0f / 32767);
    inverse = broadcast(32767.0f) / above_zero;
  }
};

#if defined(FERRUM_ATTENTION_PAIRS)
// Pairs of bfloat16 in every float of the operands: products exact, sums in float32. The weights are rounded to
// bfloat16, as is the result in the end.
struct Bf16PairProduct {
  static constexpr int64_t kPerElement = 2;
  static constexpr bool kIntegers = false;
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
  static Vec to_float(Vec sum) { return sum; }

  static float load_query(Dtype, const void* q, int64_t offset, int64_t head_dim, float* to) {
    __builtin_memcpy(to, static_cast<const BFloat16*>(q) + offset, static_cast<size_t>(head_dim) * sizeof(BFloat16));
    return 1.0f;
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
  // Elements [d, d + kPanel) of the values 2 * line and 2 * line + 1; `Whole`: all of them are there.
  template <bool Whole, typename T>
  static void load_values(const CacheRows<T>& v, int64_t line, int64_t d, Vec* to) {
    if constexpr (Whole) {
      interleave(load_whole_pairs(v, 2 * line, d), load_whole_pairs(v, 2 * line + 1, d), to);
    } else {
      interleave(load_pairs(v, 2 * line, d), load_pairs(v, 2 * line + 1, d), to);
    }
  }
  static void store_weights(float* to, Vec weights) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weights.v)));
  }
};

// Single tokens over int8 caches: pairs of 16-bit integers, products and sums exact. Codes widen to them in one
// instruction, to bfloat16 in three. A query is rounded to steps of its largest element / 32767, the weights of a tile
// to steps of the largest of their row, times their keys' scales: finer than the bfloat16 that they come from and are
// otherwise rounded to.
struct Int16PairProduct {
  static constexpr int64_t kPerElement = 2;
  static constexpr bool kIntegers = true;
  static constexpr int64_t kMaxHeadDim = 1024;  // half of 32767 * 127 * 1024 and a whole tile of weights fit 32 bits
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return from(_mm512_dpwssd_epi32(bits(sum), bits(a), bits(b))); }
  static Vec to_float(Vec sum) { return {_mm512_cvtepi32_ps(bits(sum))}; }

  static float load_query(Dtype dtype, const void* q, int64_t offset, int64_t head_dim, float* to) {
    float row[kMaxHeadDim];
    Float32Product::load_query(dtype, q, offset, head_dim, row);
    Vec most = broadcast(0.0f), zero = broadcast(0.0f);  // NaN where an element is not finite
    for_vectors(head_dim, [&](int64_t i, int64_t count) {
      const Vec x = load_some(static_cast<const float*>(row + i), count);
      most = max({_mm512_abs_ps(x.v)}, most);
      zero = fma(x, broadcast(0.0f), zero);
    });
    const IntegerSteps steps(broadcast(reduce_max(most) + reduce_add(zero)));
    for_vectors(head_dim, [&](int64_t i, int64_t count) {
      const Vec x = load_some(static_cast<const float*>(row + i), count) * steps.inverse;
      store_words(to + i / 2, x, count);
    });
    return reduce_max(steps.step);
  }
  template <typename T>
  static void widen_key(const CacheRows<T>& k, int64_t key, int64_t padded, float* to) {
    for (int64_t d = 0; d < padded; d += 2 * kLanes) {
      store(to + d / 2, load_codes(k, key, d));
    }
  }
  // Elements [d, d + kPanel) of the values 2 * line and 2 * line + 1; `Whole`: all of them are there.
  template <bool Whole, typename T>
  static void load_values(const CacheRows<T>& v, int64_t line, int64_t d, Vec* to) {
    if constexpr (Whole) {
      interleave(load_whole_codes(v, 2 * line, d), load_whole_codes(v, 2 * line + 1, d), to);
    } else {
      interleave(load_codes(v, 2 * line, d), load_codes(v, 2 * line + 1, d), to);
    }
  }
  static void store_weights(float* to, Vec weights) { store_words(to, weights, kLanes); }

 private:
  static __m512i bits(Vec x) { return _mm512_castps_si512(x.v); }
  static Vec from(__m512i x) { return {_mm512_castsi512_ps(x)}; }
  static void store_words(float* to, Vec x, int64_t count) {
    _mm512_mask_cvtsepi32_storeu_epi16(to, first_lanes(count), _mm512_cvtps_epi32(x.v));
  }
  // 32 codes [d, d + 32) of a key of which all are there, as 16-bit integers.
  template <typename T>
  static Vec load_whole_codes(const CacheRows<T>& rows, int64_t key, int64_t d) {
    const void* const at = rows.data + rows.offsets[key] + d;
    return from(_mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(at))));
  }
  // The same with zeros behind the end of the head and behind the last key.
  template <typename T>
  static Vec load_codes(const CacheRows<T>& rows, int64_t key, int64_t d) {
    if (rows.whole(key, 1, d, 2 * kLanes)) {
      return load_whole_codes(rows, key, d);
    }
    const int64_t some = key < rows.count ? smaller(rows.head_dim - d, 2 * kLanes) : 0;
    const __mmask32 mask = some > 0 ? static_cast<__mmask32>((uint64_t{1} << some) - 1) : 0;
    return from(
        _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, rows.data + rows.offsets[key < rows.count ? key : 0] + d)));
  }
};
#endif

// Bytes of the caches that lie side by side.
struct Run {
  const char *begin, *end;
};

// Parts of the caches that will be needed next. The products ask for cache lines in step with their inner loops, so
// that memory is read at an even pace while the processor computes, and in the order of addresses, which the
// processor's own prefetchers recognise.
struct Ahead {
  static constexpr int64_t kLine = 64;
  const char* at = nullptr;  // in the run at hand
  const char* end = nullptr;
  const Run* next = nullptr;
  const Run* last = nullptr;

  // To the second level: more may wait there than at the first.
  static void fetch(const char* line) { __builtin_prefetch(line, 0, 2); }
  // Inlined into every loop: left to itself GCC calls it from the innermost ones, which then take twice as long.
  [[gnu::always_inline]] void lines(int64_t count) {
    if (__builtin_expect(end - at >= count * kLine, 1)) {
      for (int64_t i = 0; i < count; ++i, at += kLine) {
        fetch(at);
      }
      return;
    }
    for (; count > 0; --count, at += kLine) {
      if (at >= end) {
        if (next == last) {
          return;
        }
        at = next->begin;
        end = next->end;
        ++next;
      }
      fetch(at);
    }
  }
  void rest() {
    while (at < end || next != last) {
      lines(1);
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
    ahead.lines(1);
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
