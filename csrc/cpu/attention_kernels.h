// Attention of one work item: online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) over tiles of keys, the
// two products on register tiles as in a matrix multiplication (Dao 2023, arXiv:2307.08691).
#include "cpu/attention_pack.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// The scratch of an item, and what its rows carry from tile to tile.
struct State {
  int64_t rows, padded;
  float *q, *out, *scores, *weights, *keys, *values;
  float *largest, *sum, *correction;  // per row
  int32_t *begin, *end;               // per row, the visible keys of the tile at hand
  int64_t next_rows[kKeyTile];        // of the caches, where the tile after it lies
  Ahead ahead;

  State(const Attention& a, int64_t rows, float* scratch) : rows(rows), padded(padded_head_dim(a)) {
    const int64_t lines = (rows + kLanes - 1) / kLanes * kLanes;
    const auto take = [&](int64_t floats) {
      float* taken = scratch;
      scratch += floats;
      return taken;
    };
    q = take(lines * padded);
    out = take(lines * padded);
    scores = take(lines * kKeyTile);
    weights = take(lines * kKeyTile);
    keys = take(kKeyTile * padded);
    values = take(kKeyTile * padded);
    largest = take(lines);
    sum = take(lines);
    correction = take(lines);
    begin = reinterpret_cast<int32_t*>(take(lines));
    end = reinterpret_cast<int32_t*>(take(lines));
  }
};

// How the products read their operands: one float32 after the other. See the bfloat16 form for the other way.
struct Float32Product {
  static constexpr int64_t kPerElement = 1;  // values in one float of an operand
  static Vec multiply_add(float a, Vec b, Vec sum) { return fma(broadcast(a), b, sum); }

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
  // The weights of the rows [row, row + rows) as the left operand of the product with the values.
  static const float* weights(const State& s, int64_t row, int64_t) { return s.scores + row * kKeyTile; }
};

#if defined(FERRUM_ATTENTION_PAIRS)
// Pairs of bfloat16 in every float of the operands: products exact, sums in float32. The weights are rounded to
// bfloat16, as is the result in the end.
struct Bf16PairProduct {
  static constexpr int64_t kPerElement = 2;
  static Vec multiply_add(float a, Vec b, Vec sum) {
    const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_ps(a));
    return {_mm512_dpbf16_ps(sum.v, pair, reinterpret_cast<__m512bh>(b.v))};
  }

  static void load_query(Dtype, const void* q, int64_t offset, int64_t head_dim, float* to) {
    __builtin_memcpy(to, static_cast<const BFloat16*>(q) + offset, static_cast<size_t>(head_dim) * sizeof(BFloat16));
  }
  static void pack_keys(const CacheRows<BFloat16>& k, int64_t depth, float* to) { pack_keys_pairs(k, depth, to); }
  static bool pack_values(const CacheRows<BFloat16>& v, int64_t padded, bool look, float* to) {
    return pack_values_pairs(v, padded, look, to);
  }
  static const float* weights(const State& s, int64_t row, int64_t rows) {
    for (int64_t r = row; r < row + rows; ++r) {
      BFloat16* to = reinterpret_cast<BFloat16*>(s.weights + r * kKeyTile);
      for (int64_t i = 0; i < kKeyTile; i += kLanes) {
        const __m512 weight = _mm512_loadu_ps(s.scores + r * kKeyTile + i);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weight)));
      }
    }
    return s.weights + row * kKeyTile;
  }
};
#endif

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
        sum[r][v] = Product::multiply_add(p.a[r * p.a_stride + i], b[v], sum[r][v]);
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

template <typename Product>
void start_rows(const Attention& a, const AttentionItem& item, State& s) {
  __builtin_memset(s.q, 0, static_cast<size_t>(s.rows * s.padded) * sizeof(float));
  __builtin_memset(s.out, 0, static_cast<size_t>(s.rows * s.padded) * sizeof(float));
  for (int64_t r = 0; r < s.rows; ++r) {
    const int64_t row = item.row_begin + r;
    const int64_t head = item.kv_head * a.group + row % a.group;
    const int64_t offset = item.sequence->q_offset + row / a.group * a.q_token_stride + head * a.q_head_stride;
    Product::load_query(a.dtype, a.q, offset, a.head_dim, s.q + r * s.padded);
    s.largest[r] = -__builtin_inff();
    s.sum[r] = 0.0f;
  }
}

// The rows of the caches that hold the keys [begin, end), one after the other, times `size`.
inline void find_rows(const Attention& a, const AttentionItem& item, Keys keys, int64_t size, int64_t* rows) {
  int64_t block = keys.begin / a.block_size, position = keys.begin % a.block_size;
  for (int64_t key = keys.begin; key < keys.end; ++key) {
    const int64_t row = item.sequence->table[block] * a.block_rows + position * a.key_rows;
    *rows++ = (row + item.kv_head * a.head_rows) * size;
    if (++position == a.block_size) {
      position = 0;
      ++block;
    }
  }
}

inline float exp_one(float x) { return reduce_max(exp(broadcast(x))); }

// Turns the scores of a tile into weights and updates the largest score, the sum and the correction of what was summed
// before. Invisible keys get weight 0.
inline void weigh_row(State& s, int64_t r, float scale) {
  float* x = s.scores + r * kKeyTile;
  const int64_t begin = s.begin[r], end = s.end[r];
  if (begin >= end) {
    for (int64_t i = 0; i < kKeyTile; i += kLanes) {
      store(x + i, broadcast(0.0f));
    }
    s.correction[r] = 1.0f;
    return;
  }
  if (begin > 0 || end < kKeyTile) {
    for (int64_t i = begin; i < end; ++i) {
      x[i] *= scale;
    }
    for (int64_t i = 0; i < begin; ++i) {
      x[i] = -__builtin_inff();
    }
    for (int64_t i = end; i < kKeyTile; ++i) {
      x[i] = -__builtin_inff();
    }
    scale = 1.0f;
  }
  constexpr int64_t kVectors = kKeyTile / kLanes;
  Vec score[kVectors];
  Vec most = broadcast(-__builtin_inff());
  for (int64_t i = 0; i < kVectors; ++i) {
    score[i] = load(static_cast<const float*>(x + i * kLanes)) * broadcast(scale);
    most = max(most, score[i]);
  }
  const float before = s.largest[r], tile = reduce_max(most);
  const float largest = tile > before ? tile : before;
  // With nothing but -inf so far, any finite reference gives the weights 0 that they should have.
  const float reference = largest == -__builtin_inff() ? 0.0f : largest;
  Vec total = broadcast(0.0f);
  for (int64_t i = 0; i < kVectors; ++i) {
    const Vec weight = exp(score[i] - broadcast(reference));
    total = total + weight;
    store(x + i * kLanes, weight);
  }
  s.largest[r] = largest;
  s.correction[r] = before == reference ? 1.0f : exp_one(before - reference);
  s.sum[r] = s.sum[r] * s.correction[r] + reduce_add(total);
}

// The keys of the tile that any of the rows [begin, end) sees.
inline Keys any_visible(const State& s, int64_t begin, int64_t end) {
  Keys keys{kKeyTile, 0};
  for (int64_t r = begin; r < end; ++r) {
    if (s.begin[r] < s.end[r]) {
      keys.begin = smaller(keys.begin, s.begin[r]);
      keys.end = s.end[r] > keys.end ? s.end[r] : keys.end;
    }
  }
  return keys;
}

// Whether every row sees all of these keys of the tile.
inline bool all_see(const State& s, Keys keys) {
  for (int64_t r = 0; r < s.rows; ++r) {
    if (s.begin[r] != keys.begin || s.end[r] != keys.end) {
      return false;
    }
  }
  return true;
}

template <typename Product>
inline void score_rows(State& s, int64_t row, int64_t rows, Keys keys, int64_t depth) {
  for (int64_t key = keys.begin / kPanel * kPanel; key < keys.end; key += kPanel) {
    const PanelProduct p{s.q + row * s.padded,
                         s.keys + key * depth,
                         s.scores + row * kKeyTile + key,
                         nullptr,
                         s.padded,
                         kKeyTile,
                         0,
                         depth};
    multiply_panel<Product, kTileRows>(p, rows, s.ahead);
  }
}

template <typename Product>
inline void add_values(State& s, int64_t row, int64_t rows, Keys keys) {
  const float* weights = Product::weights(s, row, rows);
  const int64_t step = Product::kPerElement;
  for (int64_t d = 0; d < s.padded; d += kPanel) {
    const PanelProduct p{weights,
                         s.values + d * (kKeyTile / step),
                         s.out + row * s.padded + d,
                         s.correction + row,
                         kKeyTile,
                         s.padded,
                         keys.begin / step,
                         (keys.end + step - 1) / step};
    multiply_panel<Product, kTileRows>(p, rows, s.ahead);
  }
}

// The same one visible key at a time: an invisible key that holds NaN or infinity must not touch the row, not even with
// weight 0.
template <typename T>
void add_values_exactly(State& s, int64_t row, const CacheRows<T>& v) {
  float* out = s.out + row * s.padded;
  const float* weights = s.scores + row * kKeyTile;
  for (int64_t d = 0; d < v.head_dim; d += kLanes) {
    Vec sum = load(static_cast<const float*>(out + d)) * broadcast(s.correction[row]);
    for (int64_t key = s.begin[row]; key < s.end[row]; ++key) {
      sum = fma(broadcast(weights[key]), v.load(key, d), sum);
    }
    store(out + d, sum);
  }
}

// One tile of keys, of which any row sees [first + seen.begin, first + seen.end).
template <typename Product, typename T>
void attend_tile(const Attention& a, const AttentionItem& item, State& s, int64_t first, Keys seen) {
  int64_t offsets[kKeyTile];
  find_rows(a, item, {first + seen.begin, first + seen.end}, a.head_dim, offsets + seen.begin);
  for (int64_t i = 0; i < seen.begin; ++i) {
    offsets[i] = offsets[seen.begin];  // nobody sees them, and they may have no block
  }
  float k_scale[kKeyTile], v_scale[kKeyTile];
  for (int64_t i = 0; a.k_scale != nullptr && i < seen.end; ++i) {
    const int64_t row = offsets[i] / a.head_dim;
    k_scale[i] = a.k_scale[row];
    v_scale[i] = a.v_scale[row];
  }
  const CacheRows<T> k{static_cast<const T*>(a.k), offsets, k_scale, seen.end, a.head_dim};
  const CacheRows<T> v{static_cast<const T*>(a.v), offsets, v_scale, seen.end, a.head_dim};
  const int64_t depth = (a.head_dim + Product::kPerElement - 1) / Product::kPerElement;
  Product::pack_keys(k, depth, s.keys);
  const bool finite = Product::pack_values(v, s.padded, !all_see(s, seen), s.values);
  for (int64_t row = 0; row < s.rows; row += kTileRows) {
    const int64_t some = smaller(kTileRows, s.rows - row);
    const Keys keys = any_visible(s, row, row + some);
    if (keys.begin >= keys.end) {
      continue;
    }
    score_rows<Product>(s, row, some, keys, depth);
    for (int64_t r = row; r < row + some; ++r) {
      weigh_row(s, r, a.scale);
    }
    if (finite) {
      add_values<Product>(s, row, some, keys);
    } else {
      for (int64_t r = row; r < row + some; ++r) {
        add_values_exactly(s, r, v);
      }
    }
  }
}

// Rounds the rows divided by their sums to the output. A row that sees no key is 0.
inline void write_row(const Attention& a, const AttentionItem& item, int64_t row, const float* from, float sum) {
  const AttentionSequence& sequence = *item.sequence;
  const int64_t token = row / a.group, head = item.kv_head * a.group + row % a.group;
  const int64_t at = ((sequence.out_token + token) * a.kv_heads * a.group + head) * a.head_dim;
  const Keys keys = visible_keys(a, sequence, token);
  const Vec factor = broadcast(keys.begin < keys.end ? 1.0f / sum : 0.0f);
  with_type(a.dtype, [&](auto t) {
    auto* to = static_cast<decltype(t)*>(a.out) + at;
    for_vectors(a.head_dim,
                [&](int64_t i, int64_t count) { store_some(to + i, load_some(from + i, count) * factor, count); });
  });
}

// Has the products fetch the keys of the item from `begin` on, as many as a tile holds.
template <typename T>
void fetch_ahead(const Attention& a, const AttentionItem& item, int64_t begin, State& s) {
  const Keys keys{begin, smaller(begin + kKeyTile, item.keys.end)};
  s.ahead = Ahead{};
  if (keys.begin < keys.end) {
    const int64_t row_bytes = a.head_dim * static_cast<int64_t>(sizeof(T));
    find_rows(a, item, keys, row_bytes, s.next_rows);
    s.ahead = {static_cast<const char*>(a.k),
               static_cast<const char*>(a.v),
               s.next_rows,
               s.next_rows + (keys.end - keys.begin),
               row_bytes,
               0};
  }
}

template <typename Product, typename T>
void attend_item(const Attention& a, const AttentionItem& item, const AttentionItem* next, float* scratch) {
  State s(a, item.row_end - item.row_begin, scratch);
  start_rows<Product>(a, item, s);
  // Tiles begin at multiples of kKeyTile, so that a row's result does not depend on the rows it shares the item with.
  for (int64_t begin = item.keys.begin / kKeyTile * kKeyTile; begin < item.keys.end; begin += kKeyTile) {
    for (int64_t r = 0; r < s.rows; ++r) {
      Keys keys = visible_keys(a, *item.sequence, (item.row_begin + r) / a.group);
      keys.begin = keys.begin > begin ? smaller(keys.begin - begin, kKeyTile) : 0;
      keys.end = smaller(smaller(keys.end, item.keys.end) - begin, kKeyTile);
      s.begin[r] = static_cast<int32_t>(keys.begin);
      s.end[r] = static_cast<int32_t>(keys.end > 0 ? keys.end : 0);
    }
    const Keys seen = any_visible(s, 0, s.rows);
    if (seen.begin < seen.end) {
      if (begin + kKeyTile < item.keys.end) {
        fetch_ahead<T>(a, item, begin + kKeyTile, s);
      } else if (next != nullptr) {
        fetch_ahead<T>(a, *next, next->keys.begin, s);
      }
      attend_tile<Product, T>(a, item, s, begin, seen);
    }
  }
  if (item.partial < 0) {
    for (int64_t r = 0; r < s.rows; ++r) {
      write_row(a, item, item.row_begin + r, s.out + r * s.padded, s.sum[r]);
    }
    return;
  }
  const size_t bytes = static_cast<size_t>(s.rows) * sizeof(float);
  float* partial = a.partial + item.partial;
  __builtin_memcpy(partial, s.out, bytes * static_cast<size_t>(s.padded));
  __builtin_memcpy(partial + s.rows * s.padded, s.largest, bytes);
  __builtin_memcpy(partial + s.rows * (s.padded + 1), s.sum, bytes);
}

}  // namespace

#if defined(FERRUM_ATTENTION_PAIRS)
void attend_bf16_pairs(const Attention& a, const AttentionItem& item, const AttentionItem* next, float* scratch) {
  attend_item<Bf16PairProduct, BFloat16>(a, item, next, scratch);
}
#else
void attend(const Attention& a, const AttentionItem& item, const AttentionItem* next, float* scratch) {
  if (a.k_scale != nullptr) {
    attend_item<Float32Product, int8_t>(a, item, next, scratch);
    return;
  }
  with_type(a.dtype, [&](auto t) { attend_item<Float32Product, decltype(t)>(a, item, next, scratch); });
}

void merge_splits(const Attention& a, const AttentionItem& item, int64_t splits) {
  const int64_t rows = item.row_end - item.row_begin, padded = padded_head_dim(a);
  const int64_t stride = partial_floats(a, rows);
  float* first = a.partial + item.partial;
  const float* largest = first + rows * padded;
  const float* sums = largest + rows;
  for (int64_t r = 0; r < rows; ++r) {
    float most = -__builtin_inff(), sum = 0.0f;
    for (int64_t i = 0; i < splits; ++i) {
      most = largest[i * stride + r] > most ? largest[i * stride + r] : most;
    }
    most = most == -__builtin_inff() ? 0.0f : most;
    float* out = first + r * padded;
    for (int64_t i = 0; i < splits; ++i) {
      const float* part = out + i * stride;
      const float factor = exp_one(largest[i * stride + r] - most);
      sum += factor * sums[i * stride + r];
      for (int64_t d = 0; d < padded; d += kLanes) {
        const Vec before = i == 0 ? broadcast(0.0f) : load(static_cast<const float*>(out + d));
        store(out + d, fma(load(part + d), broadcast(factor), before));
      }
    }
    write_row(a, item, item.row_begin + r, out, sum);
  }
}
#endif

}  // namespace ferrum::cpu::FERRUM_LEVEL
