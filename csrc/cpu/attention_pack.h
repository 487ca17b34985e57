// Tiles of keys and values in the order in which the products of attention read them.
//
// A packed tile is a row of panels of kPanel floats by `depth`: element [i][c] of a panel stands beside its neighbours
// c of the output. Keys: c is the key, i the element of the head. Values: c is the element of the head, i the key.
// A float holds either one value or, in the bfloat16 form, the two values i = 2n (low half) and 2n + 1.
#pragma once

#include "cpu/attention.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// Rows by vectors of the register tile of a product: its accumulators, one line of the panel and a factor fit the
// registers of the level.
#if defined(FERRUM_LEVEL_AVX512)
constexpr int kTileRows = 8, kTileVectors = 2;
#elif defined(FERRUM_LEVEL_AVX2)
constexpr int kTileRows = 6, kTileVectors = 1;
#else
constexpr int kTileRows = 2, kTileVectors = 1;
#endif
constexpr int64_t kPanel = kTileVectors * kLanes;
static_assert(kPad % kPanel == 0 && kKeyTile % kPanel == 0, "padded tiles are whole panels");

#if defined(FERRUM_LEVEL_AVX512)
inline Vec load_codes(const int8_t* from, int64_t count) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), from)))};
}

inline __m512 unpack_low(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}
inline __m512 unpack_high(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}

inline void transpose(Vec* rows) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // block n of b[i + c] holds column 4n + c of rows i to i + 3
    b[i] = unpack_low(a[i], a[i + 2]);
    b[i + 1] = unpack_high(a[i], a[i + 2]);
    b[i + 2] = unpack_low(a[i + 1], a[i + 3]);
    b[i + 3] = unpack_high(a[i + 1], a[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
    const __m512 even_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 odd_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    rows[c].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    rows[4 + c].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    rows[8 + c].v = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    rows[12 + c].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}
#elif defined(FERRUM_LEVEL_AVX2)
inline Vec load_codes(const int8_t* from, int64_t count) {
  int8_t lanes[kLanes] = {};
  __builtin_memcpy(lanes, from, static_cast<size_t>(count));
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
}

inline void transpose8(__m256* rows) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}

inline void transpose(Vec* rows) {
  __m256 quarter[4][8];  // low and high lanes of rows 0 to 7, then of rows 8 to 15
  for (int i = 0; i < 8; ++i) {
    quarter[0][i] = rows[i].low;
    quarter[1][i] = rows[i].high;
    quarter[2][i] = rows[8 + i].low;
    quarter[3][i] = rows[8 + i].high;
  }
  for (auto& q : quarter) {
    transpose8(q);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = {quarter[0][i], quarter[2][i]};
    rows[8 + i] = {quarter[1][i], quarter[3][i]};
  }
}
#else
inline Vec load_codes(const int8_t* from, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    lanes[i] = static_cast<float>(from[i]);
  }
  return load(static_cast<const float*>(lanes));
}

// Four by four elements, the other way about.
inline void transpose(Floats& a, Floats& b, Floats& c, Floats& d) {
  const Floats ab_low = shuffle<0, 4, 1, 5>(a, b), ab_high = shuffle<2, 6, 3, 7>(a, b);
  const Floats cd_low = shuffle<0, 4, 1, 5>(c, d), cd_high = shuffle<2, 6, 3, 7>(c, d);
  a = shuffle<0, 1, 4, 5>(ab_low, cd_low);
  b = shuffle<2, 3, 6, 7>(ab_low, cd_low);
  c = shuffle<0, 1, 4, 5>(ab_high, cd_high);
  d = shuffle<2, 3, 6, 7>(ab_high, cd_high);
}

inline void transpose(Vec* rows) {
  for (int i = 0; i < kParts; ++i) {
    for (int j = 0; j < kParts; ++j) {
      transpose(rows[4 * i].v[j], rows[4 * i + 1].v[j], rows[4 * i + 2].v[j], rows[4 * i + 3].v[j]);
    }
  }
  for (int i = 0; i < kParts; ++i) {  // whole blocks of four by four change places
    for (int j = 0; j < i; ++j) {
      for (int k = 0; k < 4; ++k) {
        const Floats x = rows[4 * i + k].v[j];
        rows[4 * i + k].v[j] = rows[4 * j + k].v[i];
        rows[4 * j + k].v[i] = x;
      }
    }
  }
}
#endif

// The keys of a tile in one cache.
template <typename T>
struct CacheRows {
  const T* data;
  const int64_t* offsets;  // of each key's row, in elements
  int64_t count, head_dim;

  // Whether the keys [key, key + keys) and their elements [d, d + elements) are all there.
  bool whole(int64_t key, int64_t keys, int64_t d, int64_t elements) const {
    return key + keys <= count && d + elements <= head_dim;
  }
  // Elements [d, d + 16) of a key of which all are there; int8 codes without their scale.
  Vec load_whole(int64_t key, int64_t d) const {
    if constexpr (sizeof(T) == 1) {
      return load_codes(data + offsets[key] + d, kLanes);
    } else {
      return cpu::FERRUM_LEVEL::load(data + offsets[key] + d);
    }
  }
  // Zeros behind the end of the head and behind the last key.
  Vec load(int64_t key, int64_t d) const {
    if (key >= count || d >= head_dim) {
      return broadcast(0.0f);
    }
    const int64_t some = smaller(head_dim - d, kLanes);
    if constexpr (sizeof(T) == 1) {
      return load_codes(data + offsets[key] + d, some);
    } else {
      return load_some(data + offsets[key] + d, some);
    }
  }
};

// Whether no element seen so far is NaN or infinite: x * 0 is 0 for all others.
struct FiniteProbe {
  Vec sum = broadcast(0.0f);
  void see(Vec x) { sum = fma(x, broadcast(0.0f), sum); }
  bool finite() const { return reduce_add(sum) == 0.0f; }
};

template <typename T>
inline void pack_keys_float32(const CacheRows<T>& k, int64_t depth, float* to) {
  for (int64_t key = 0; key < k.count; key += kPanel) {
    float* panel = to + key * depth;
    for (int64_t block = 0; block < kPanel; block += kLanes) {
      for (int64_t d = 0; d < k.head_dim; d += kLanes) {
        Vec rows[kLanes];
        if (k.whole(key + block, kLanes, d, kLanes)) {
          for (int64_t i = 0; i < kLanes; ++i) {
            rows[i] = k.load_whole(key + block + i, d);
          }
        } else {
          for (int64_t i = 0; i < kLanes; ++i) {
            rows[i] = k.load(key + block + i, d);
          }
        }
        transpose(rows);
        for (int64_t i = 0; i < smaller(k.head_dim - d, kLanes); ++i) {
          store(panel + (d + i) * kPanel + block, rows[i]);
        }
      }
    }
  }
}

// Returns whether all values are finite, if it is asked to look; codes always are. A panel has kKeyTile lines, of which
// those of the tile's keys are written.
template <typename T>
inline bool pack_values_float32(const CacheRows<T>& v, int64_t padded, bool look, float* to) {
  FiniteProbe probe;
  for (int64_t key = 0; key < v.count; ++key) {
    for (int64_t d = 0; d < padded; d += kLanes) {
      const Vec value = v.whole(key, 1, d, kLanes) ? v.load_whole(key, d) : v.load(key, d);
      if (sizeof(T) > 1 && look) {
        probe.see(value);
      }
      store(to + d / kPanel * kPanel * kKeyTile + key * kPanel + d % kPanel, value);
    }
  }
  return probe.finite();
}

#if defined(FERRUM_ATTENTION_PAIRS)
// Two vectors of integers of at most 8 bits as 32 bfloat16, which hold them exactly.
inline Vec narrow_pair(Vec low, Vec high) { return {reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(high.v, low.v))}; }

// 32 elements [d, d + 32) of a key of which all are there, as bfloat16 in the order of memory.
template <typename T>
inline Vec load_whole_pairs(const CacheRows<T>& rows, int64_t key, int64_t d) {
  if constexpr (sizeof(T) == 1) {
    return narrow_pair(rows.load_whole(key, d), rows.load_whole(key, d + kLanes));
  } else {
    return {_mm512_loadu_ps(rows.data + rows.offsets[key] + d)};
  }
}

// The same with zeros behind the end of the head and behind the last key.
template <typename T>
inline Vec load_pairs(const CacheRows<T>& rows, int64_t key, int64_t d) {
  if (rows.whole(key, 1, d, 2 * kLanes)) {
    return load_whole_pairs(rows, key, d);
  }
  if (key >= rows.count) {
    return broadcast(0.0f);
  }
  if constexpr (sizeof(T) == 1) {
    return narrow_pair(rows.load(key, d), rows.load(key, d + kLanes));
  } else {
    const int64_t some = smaller(rows.head_dim - d, 2 * kLanes);
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << some) - 1);
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, rows.data + rows.offsets[key] + d))};
  }
}

// Element i of `first` and of `second` side by side, for all 32 of them.
inline void interleave(Vec first, Vec second, Vec* to) {
  const __m512i word = _mm512_set1_epi32(32 << 16);  // 32 + i is word i of the second operand
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i first_half = _mm512_add_epi32(_mm512_or_si512(lane, _mm512_slli_epi32(lane, 16)), word);
  const __m512i second_half = _mm512_add_epi32(first_half, _mm512_set1_epi32(16 << 16 | 16));
  const __m512i a = _mm512_castps_si512(first.v), b = _mm512_castps_si512(second.v);
  to[0] = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(a, first_half, b))};
  to[1] = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(a, second_half, b))};
}

template <typename T>
inline void pack_keys_pairs(const CacheRows<T>& k, int64_t depth, float* to) {
  for (int64_t key = 0; key < k.count; key += kPanel) {
    float* panel = to + key * depth;
    for (int64_t block = 0; block < kPanel; block += kLanes) {
      for (int64_t i = 0; i < depth; i += kLanes) {
        Vec rows[kLanes];
        if (k.whole(key + block, kLanes, 2 * i, 2 * kLanes)) {
          for (int64_t j = 0; j < kLanes; ++j) {
            rows[j] = load_whole_pairs(k, key + block + j, 2 * i);
          }
        } else {
          for (int64_t j = 0; j < kLanes; ++j) {
            rows[j] = load_pairs(k, key + block + j, 2 * i);
          }
        }
        transpose(rows);
        for (int64_t j = 0; j < smaller(depth - i, kLanes); ++j) {
          store(panel + (i + j) * kPanel + block, rows[j]);
        }
      }
    }
  }
}

// As pack_values_float32, with half as many lines.
template <typename T>
inline bool pack_values_pairs(const CacheRows<T>& v, int64_t padded, bool look, float* to) {
  static_assert(kPanel == 2 * kLanes, "one load of 32 elements fills a line of a panel");
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t key = 0; key < v.count; key += 2) {
    for (int64_t d = 0; d < padded; d += kPanel) {
      const Vec first = load_pairs(v, key, d), second = load_pairs(v, key + 1, d);
      if (sizeof(T) > 1 && look) {
        largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_castps_si512(first.v), magnitude));
        largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_castps_si512(second.v), magnitude));
      }
      Vec line[kTileVectors];
      interleave(first, second, line);
      float* at = to + d * (kKeyTile / 2) + key / 2 * kPanel;
      store(at, line[0]);
      store(at + kLanes, line[1]);
    }
  }
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;  // bits of infinity; NaN lies above
}
#endif

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL
