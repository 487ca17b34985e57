// Attention of single tokens. A key meets only the query heads of its group, too few rows to pay for packing tiles as
// attention_kernels.h does: both products read the caches where they lie.
//
// Rows (query heads) go in groups of eight. In the product with the keys, a key's row is broadcast four floats of an
// operand at a time and meets two vectors: the even rows and the odd ones, lane 4i + j for float j of row 2i or 2i + 1.
// In the scores, lane 2r + j belongs to row r and key j of a pair.
#pragma once

#include "cpu/attention_rows.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

constexpr int64_t kGroupRows = kLanes / 2;
constexpr float kLargest = 3.40282347e38f;  // of all that are finite
#if defined(FERRUM_LEVEL_AVX512)
constexpr int kScoreKeys = 8;  // keys at a time: their sums, a step of the query and a broadcast fit the registers
#else
constexpr int kScoreKeys = 2;
#endif
static_assert(kDecodeTile % kScoreKeys == 0 && kScoreKeys % 2 == 0, "a tile is whole steps of pairs of keys");

// broadcast_pair(from), broadcast_four(from): the floats at any address, in every two or four lanes.
// broadcast_one(from): a float, or what its bits stand for.
// add_pairs(a, b): of every four lanes, a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3].
// swap_pairs(a): lanes 2i and 2i + 1 exchanged.
// exp_to_one(x): e^x where x is not above 0. Weights of keys, most of them far below 1, need fewer steps than exp.
#if defined(FERRUM_LEVEL_AVX512)
inline Vec broadcast_pair(const float* from) {
  int64_t pair;  // Zen 4 loads a broadcast of integers faster than one of floats
  __builtin_memcpy(&pair, from, sizeof(pair));
  return {_mm512_castsi512_ps(_mm512_set1_epi64(pair))};
}
inline Vec broadcast_four(const char* from) {
  return {_mm512_castsi512_ps(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
}
inline Vec broadcast_one(const float* from) {
  int32_t one;
  __builtin_memcpy(&one, from, sizeof(one));
  return {_mm512_castsi512_ps(_mm512_set1_epi32(one))};
}
inline Vec add_pairs(Vec a, Vec b) {
  return {_mm512_add_ps(_mm512_shuffle_ps(a.v, b.v, 0x88), _mm512_shuffle_ps(a.v, b.v, 0xdd))};
}
inline Vec swap_pairs(Vec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
inline Vec exp_to_one(Vec x) {
  const __m512 power = _mm512_mul_ps(x.v, _mm512_set1_ps(1.44269504f));
  const __m512 r = _mm512_reduce_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // 2^r - 1 over r for |r| <= 1/2, fitted to a relative error of 2^r below 2e-7.
  __m512 sum = _mm512_set1_ps(0.00132647273f);
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.00967151299f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.0555073358f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.240222424f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.693147004f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  return {_mm512_scalef_ps(sum, _mm512_sub_ps(power, r))};
}
#elif defined(FERRUM_LEVEL_AVX2)
inline Vec broadcast_pair(const float* from) {
  double pair;
  __builtin_memcpy(&pair, from, sizeof(pair));
  const __m256 both = _mm256_castpd_ps(_mm256_set1_pd(pair));
  return {both, both};
}
inline Vec broadcast_four(const char* from) {
  const __m128 four = _mm_loadu_ps(reinterpret_cast<const float*>(from));
  const __m256 both = _mm256_set_m128(four, four);
  return {both, both};
}
inline Vec add_pairs(Vec a, Vec b) { return {_mm256_hadd_ps(a.low, b.low), _mm256_hadd_ps(a.high, b.high)}; }
inline Vec broadcast_one(const float* from) { return broadcast(*from); }
inline Vec swap_pairs(Vec a) { return {_mm256_permute_ps(a.low, 0xb1), _mm256_permute_ps(a.high, 0xb1)}; }
inline Vec exp_to_one(Vec x) { return exp(x); }
#else
inline Vec broadcast_pair(const float* from) {
  return per_part([&](int) { return Floats{from[0], from[1], from[0], from[1]}; });
}
inline Vec broadcast_four(const char* from) {
  return per_part([&](int) { return load_vector<Floats>(from); });
}
inline Vec add_pairs(Vec a, Vec b) {
  return per_part([&](int i) { return shuffle<0, 2, 4, 6>(a.v[i], b.v[i]) + shuffle<1, 3, 5, 7>(a.v[i], b.v[i]); });
}
inline Vec broadcast_one(const float* from) { return broadcast(*from); }
inline Vec swap_pairs(Vec a) {
  return per_part([&](int i) { return shuffle<1, 0, 3, 2>(a.v[i], a.v[i]); });
}
inline Vec exp_to_one(Vec x) { return exp(x); }
#endif

// What up to eight rows of one KV head carry from tile to tile.
struct DecodeRows {
  float* q;                      // [ceil(depth / 4)][even rows, odd rows][16]
  float* out;                    // [8][padded]
  float *largest, *sum, *scale;  // [16], both lanes of a row alike; scale: of the scores
};

// The scratch of a task, and the tile at hand.
struct DecodeState {
  int64_t padded, chunks;  // chunks of eight rows per KV head
  float *rows, *keys, *scores, *weights;
  int64_t cache_rows[kDecodeTile];  // of the keys
  int64_t offsets[kDecodeTile];     // of cache_rows, in elements
  Run next_runs[4 * kDecodeTile];
  const char* key_rows[kDecodeTile];
  float k_scale[kDecodeTile], v_scale[kDecodeTile];
  Ahead ahead;

  DecodeState(const Attention& a, const AttentionItem& item, int64_t heads, float* scratch)
      : padded(padded_head_dim(a)), chunks((item.row_end - item.row_begin + kGroupRows - 1) / kGroupRows) {
    rows = scratch;
    keys = rows + heads * chunks * decode_row_floats(a);
    scores = keys + kDecodeTile * padded;
    weights = scores + kDecodeTile * kGroupRows;
  }
  DecodeRows chunk(const Attention& a, int64_t head, int64_t i) const {
    float* const first = rows + (head * chunks + i) * decode_row_floats(a);
    float* const q = first + kGroupRows * padded;
    float* const numbers = q + kGroupRows * padded;
    return {q, first, numbers, numbers + kLanes, numbers + 2 * kLanes};
  }
};

template <typename Product>
void start_decode_rows(const Attention& a, const AttentionItem& item, int64_t first, float* row, DecodeRows to) {
  const int64_t padded = padded_head_dim(a);
  const size_t bytes = static_cast<size_t>(padded) * sizeof(float);
  __builtin_memset(to.out, 0, kGroupRows * bytes);
  __builtin_memset(to.q, 0, kGroupRows * bytes);
  store(to.largest, broadcast(-__builtin_inff()));
  store(to.sum, broadcast(0.0f));
  store(to.scale, broadcast(0.0f));
  for (int64_t r = 0; r < smaller(kGroupRows, item.row_end - first); ++r) {
    const int64_t head = item.kv_head * a.group + first + r;
    __builtin_memset(row, 0, bytes);
    const float step =
        Product::load_query(a.dtype, a.q, item.sequence->q_offset + head * a.q_head_stride, a.head_dim, row);
    to.scale[2 * r] = to.scale[2 * r + 1] = a.scale * step;
    for (int64_t i = 0; i < padded; i += 4) {
      __builtin_memcpy(to.q + (i / 2 + r % 2) * kLanes + r / 2 * 4, row + i, 4 * sizeof(float));
    }
  }
}

// How many lines of the caches hold what `count` lines of operands do.
template <typename Product, typename T>
constexpr int64_t lines_of(int64_t count) {
  return (count * Product::kPerElement * static_cast<int64_t>(sizeof(T)) + 3) / static_cast<int64_t>(sizeof(float));
}

// Fills scores [pairs of keys][16] of one chunk, not yet scaled. The two products are functions of their own so that
// their inner loops have all registers.
template <typename Product, typename T>
[[gnu::noinline]] void score_keys(const DecodeRows& rows, DecodeState& s, int64_t count, int64_t steps) {
  constexpr int64_t kAskSteps = kScoreKeys < 4 ? 4 / kScoreKeys : 1;  // in which whole lines of keys are read
  Ahead ahead = s.ahead;
  for (int64_t key = 0; key < count; key += kScoreKeys) {
    const char* from[kScoreKeys];
    Vec even[kScoreKeys], odd[kScoreKeys];
    for (int i = 0; i < kScoreKeys; ++i) {
      from[i] = s.key_rows[key + i];
      even[i] = odd[i] = broadcast(0.0f);
    }
    for (int64_t byte = 0; byte < steps * 16; byte += 16) {  // of the keys
      if (byte / 16 % kAskSteps == 0) {
        ahead.lines(lines_of<Product, T>(kScoreKeys * kAskSteps / 4));
      }
      const float* const q = rows.q + 2 * byte;  // two vectors for 16 bytes
      const Vec q_even = load(q), q_odd = load(q + kLanes);
      for (int i = 0; i < kScoreKeys; ++i) {
        const Vec four = broadcast_four(from[i] + byte);
        even[i] = Product::multiply_add(four, q_even, even[i]);
        odd[i] = Product::multiply_add(four, q_odd, odd[i]);
      }
    }
    for (int i = 0; i < kScoreKeys; i += 2) {
      const Vec even_sums = add_pairs(Product::to_float(even[i]), Product::to_float(even[i + 1]));
      const Vec odd_sums = add_pairs(Product::to_float(odd[i]), Product::to_float(odd[i + 1]));
      store(s.scores + (key + i) * kGroupRows, add_pairs(even_sums, odd_sums));
    }
  }
  s.ahead = ahead;
}

// Both lanes of each row.
struct Factors {
  float before[kLanes];   // of the results so far
  float product[kLanes];  // of the product of the tile's weights and values
};

// Turns the scores of `count` keys into weights and updates the largest score and the sum of each row.
template <typename Product>
inline void weigh_keys(const Attention& a, DecodeRows& rows, DecodeState& s, int64_t count, Factors& factors) {
  const Vec scale = load(static_cast<const float*>(rows.scale));
  if (count % 2 != 0) {
    for (int64_t lane = 1; lane < kLanes; lane += 2) {
      s.scores[(count - 1) * kGroupRows + lane] = -__builtin_inff();
    }
    s.k_scale[count] = s.v_scale[count] = 1.0f;
  }
  Vec most = broadcast(-__builtin_inff());
  for (int64_t key = 0; key < count; key += 2) {
    Vec score = load(static_cast<const float*>(s.scores + key * kGroupRows)) * scale;
    score = a.k_scale != nullptr ? score * broadcast_pair(s.k_scale + key) : score;
    store(s.scores + key * kGroupRows, score);
    most = max(most, score);
  }
  most = max(most, swap_pairs(most));
  const Vec before = load(static_cast<const float*>(rows.largest)), largest = max(most, before);
  // With nothing but -inf so far, any finite reference gives the weights 0 that they should have.
  const Vec reference = max(largest, broadcast(-kLargest));
  Ahead ahead = s.ahead;
  Vec total = broadcast(0.0f), scaled = broadcast(0.0f), not_finite = broadcast(0.0f);
  for (int64_t key = 0; key < count; key += 2) {
    ahead.lines(1);
    Vec weight = exp_to_one(load(static_cast<const float*>(s.scores + key * kGroupRows)) - reference);
    total = total + weight;
    weight = a.v_scale != nullptr ? weight * broadcast_pair(s.v_scale + key) : weight;
    if constexpr (Product::kIntegers) {
      store(s.scores + key * kGroupRows, weight);
      scaled = max(max(weight, broadcast(0.0f) - weight), scaled);
      not_finite = fma(weight, broadcast(0.0f), not_finite);
    } else {
      Product::store_weights(s.weights + key * kGroupRows / Product::kPerElement, weight);
    }
  }
  if constexpr (Product::kIntegers) {
    scaled = max(scaled, swap_pairs(scaled)) + not_finite + swap_pairs(not_finite);
    const IntegerSteps steps(scaled);
    for (int64_t key = 0; key < count; key += 2) {
      const Vec weight = load(static_cast<const float*>(s.scores + key * kGroupRows)) * steps.inverse;
      Product::store_weights(s.weights + key * kGroupRows / Product::kPerElement, weight);
    }
    store(factors.product, steps.step);
  }
  s.ahead = ahead;
  const Vec correction = exp(before - reference);
  store(rows.largest, largest);
  store(rows.sum, load(static_cast<const float*>(rows.sum)) * correction + (total + swap_pairs(total)));
  store(factors.before, correction);
}

template <bool Value>
struct Constant {
  static constexpr bool value = Value;
};

// out = before * out + weights * values, for `Rows` rows from `row` on.
template <typename Product, typename T, int Rows>
[[gnu::noinline]] void add_decode_values(const DecodeRows& rows, DecodeState& s, CacheRows<T> v, int64_t row,
                                         const Factors& factors) {
  constexpr int64_t kPerElement = Product::kPerElement;
  const int64_t lines = (v.count + kPerElement - 1) / kPerElement;
  const float* const all_weights = s.weights;
  Ahead ahead = s.ahead;
  for (int64_t d = 0; d < s.padded; d += kPanel) {
    float* const out = rows.out + row * s.padded + d;
    const auto so_far = [&](int r, int i) {
      return load(static_cast<const float*>(out + r * s.padded + i * kLanes)) *
             broadcast(factors.before[2 * (row + r)]);
    };
    Vec sum[Rows][kTileVectors];
    for (int r = 0; r < Rows; ++r) {
      for (int i = 0; i < kTileVectors; ++i) {
        sum[r][i] = Product::kIntegers ? broadcast(0.0f) : so_far(r, i);
      }
    }
    const CacheRows<T> panel{v.data + d, v.offsets, v.count, v.head_dim - d};
    const auto add = [&](auto whole, int64_t line) {
      ahead.lines(lines_of<Product, T>(kTileVectors));
      Vec b[kTileVectors];
      Product::template load_values<decltype(whole)::value>(panel, line, 0, b);
      // Both keys of a pair in one float, or one after the other: [pair][row] or [pair][row][key].
      const float* weights = kPerElement == 2 ? all_weights + line * kGroupRows + row
                                              : all_weights + line / 2 * kLanes + line % 2 + 2 * row;
      for (int r = 0; r < Rows; ++r) {
        const Vec weight = broadcast_one(weights + r * (kPerElement == 2 ? 1 : 2));
        for (int i = 0; i < kTileVectors; ++i) {
          sum[r][i] = Product::multiply_add(weight, b[i], sum[r][i]);
        }
      }
    };
    const int64_t whole_lines = panel.head_dim >= kPanel ? v.count / kPerElement : 0;
    for (int64_t line = 0; line < whole_lines; ++line) {
      add(Constant<true>{}, line);
    }
    for (int64_t line = whole_lines; line < lines; ++line) {
      add(Constant<false>{}, line);
    }
    for (int r = 0; r < Rows; ++r) {
      for (int i = 0; i < kTileVectors; ++i) {
        if constexpr (Product::kIntegers) {
          sum[r][i] = fma(Product::to_float(sum[r][i]), broadcast(factors.product[2 * (row + r)]), so_far(r, i));
        }
        store(out + r * s.padded + i * kLanes, sum[r][i]);
      }
    }
  }
  s.ahead = ahead;
}

template <typename Product, typename T, int Rows>
inline void add_some_values(const DecodeRows& rows, DecodeState& s, const CacheRows<T>& v, int64_t row, int64_t count,
                            const Factors& factors) {
  if (count == Rows) {
    add_decode_values<Product, T, Rows>(rows, s, v, row, factors);
  } else if constexpr (Rows > 1) {
    add_some_values<Product, T, Rows - 1>(rows, s, v, row, count, factors);
  }
}

// The keys whose rows are s.cache_rows, of one KV head.
template <typename Product, typename T>
void attend_keys(const Attention& a, const AttentionItem& item, int64_t head, DecodeState& s, int64_t count) {
  const int64_t element = head * a.head_rows * a.head_dim;
  const CacheRows<T> k{static_cast<const T*>(a.k) + element, s.offsets, count, a.head_dim};
  const CacheRows<T> v{static_cast<const T*>(a.v) + element, s.offsets, count, a.head_dim};
  const int64_t depth = (a.head_dim + Product::kPerElement - 1) / Product::kPerElement;
  // In place if the cache holds operands, and broadcasts of four floats end where the row does.
  const bool in_place =
      Product::kPerElement * sizeof(T) == sizeof(float) && a.head_dim % (4 * Product::kPerElement) == 0;
  if (in_place) {
    for (int64_t key = 0; key < count; ++key) {
      s.key_rows[key] = reinterpret_cast<const char*>(k.data + s.offsets[key]);
    }
  } else {
    for (int64_t key = 0; key < count; ++key) {
      float* const widened = s.keys + key * (s.padded / Product::kPerElement);
      Product::widen_key(k, key, s.padded, widened);
      s.key_rows[key] = reinterpret_cast<const char*>(widened);
    }
  }
  for (int64_t key = count; key % kScoreKeys != 0; ++key) {
    s.key_rows[key] = s.key_rows[count - 1];
  }
  for (int64_t i = 0; a.k_scale != nullptr && i < count; ++i) {
    const int64_t row = s.cache_rows[i] + head * a.head_rows;
    s.k_scale[i] = a.k_scale[row];
    s.v_scale[i] = a.v_scale[row];
  }
  for (int64_t c = 0; c < s.chunks; ++c) {
    DecodeRows rows = s.chunk(a, head, c);
    score_keys<Product, T>(rows, s, count, (depth + 3) / 4);
    Factors factors;
    weigh_keys<Product>(a, rows, s, count, factors);
    const int64_t some = smaller(kGroupRows, item.row_end - item.row_begin - c * kGroupRows);
    for (int64_t row = 0; row < some; row += kTileRows) {
      add_some_values<Product, T, kTileRows>(rows, s, v, row, smaller(kTileRows, some - row), factors);
    }
  }
}

template <typename Product, typename T>
void attend_token(const Attention& a, const AttentionTask& task, const AttentionTask* next, float* scratch) {
  const AttentionItem* const items = task.items;
  const AttentionItem& first = items[0];
  const int64_t heads = task.heads;
  DecodeState s(a, first, heads, scratch);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t c = 0; c < s.chunks; ++c) {
      start_decode_rows<Product>(a, items[h], first.row_begin + c * kGroupRows, s.keys, s.chunk(a, h, c));
    }
  }
  for (int64_t begin = first.keys.begin; begin < first.keys.end; begin += kDecodeTile) {
    const int64_t end = smaller(begin + kDecodeTile, first.keys.end);
    find_rows(a, first, {begin, end}, 1, s.cache_rows);
    for (int64_t i = 0; i < end - begin; ++i) {
      s.offsets[i] = s.cache_rows[i] * a.head_dim;
    }
    s.ahead = fetch_ahead<T>(a, task, end, next, kDecodeTile, s.next_runs);
    for (int64_t h = 0; h < heads; ++h) {
      attend_keys<Product, T>(a, items[h], h, s, end - begin);
    }
    s.ahead.rest();
  }
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t r = 0; r < first.row_end - first.row_begin; ++r) {
      const DecodeRows rows = s.chunk(a, h, r / kGroupRows);
      const int64_t i = r % kGroupRows;
      finish_row(a, items[h], r, rows.out + i * s.padded, rows.largest[2 * i], rows.sum[2 * i]);
    }
  }
}

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL
