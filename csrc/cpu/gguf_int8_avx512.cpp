// Products of GGUF blocks with int8 activations for AVX512 with VNNI.
#if defined(__x86_64__)
#define FERRUM_LEVEL_AVX512
#include "cpu/simd.h"

#if defined(__clang__)
#define FERRUM_KEEP_ACCUMULATORS __attribute__((noinline))
#pragma clang attribute push(__attribute__((target("avx512vnni"))), apply_to = function)
#else
#define FERRUM_KEEP_ACCUMULATORS __attribute__((noinline, optimize("no-tree-coalesce-vars")))
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vnni")
#endif

#include "cpu/gguf_direct_avx512.h"
#include "cpu/gguf_panel_avx512.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// Up to here the panel's transposition costs more than each row's adding up of lanes.
template <Type T>
constexpr int kDirectRows = kSmall<T> ? 2 : 4;

template <Type T>
inline void direct(const GgufProduct& p, int64_t tile) {
  if constexpr (kSmall<T>) {
    return p.rows == 1 ? direct_small<T, 1>(p, tile) : direct_small<T, 2>(p, tile);
  } else {
    switch (p.rows) {
      case 1:
        return direct_large<T, 1>(p, tile);
      case 2:
        return direct_large<T, 2>(p, tile);
      case 3:
        return direct_large<T, 3>(p, tile);
      default:
        return direct_large<T, 4>(p, tile);
    }
  }
}

template <Type T>
void int8_columns(const GgufProduct& p) {
  const int64_t tiles = (p.columns + kGgufTile - 1) / kGgufTile;
  int64_t tile = 0;
  if (p.rows <= kDirectRows<T>) {
    for (; tile < tiles; ++tile) {
      direct<T>(p, tile);
    }
    return;
  }
  for (; tile + 2 <= tiles; tile += 2) {
    panel_columns<T, 2>(p, tile);
  }
  if (tile < tiles) {
    panel_columns<T, 1>(p, tile);
  }
}

}  // namespace

void gguf_int8_columns(const GgufProduct& product) {
  if (product.weights.tiled) {
    return gguf_int8_tiles(product);
  }
  for_type(product.weights.traits->type, [&](auto type) { int8_columns<decltype(type)::value>(product); });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL

#if defined(__clang__)
#pragma clang attribute pop
#endif
FERRUM_END_LEVEL
#endif
