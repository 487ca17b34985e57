// Attention of one work item: online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) over tiles of keys, the
// two products on register tiles as in a matrix multiplication (Dao 2023, arXiv:2307.08691).
#include "cpu/attention_decode.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// The scratch of an item, and what its rows carry from tile to tile.
struct State {
  int64_t rows, padded;
  float *q, *out, *scores, *weights, *keys, *values;
  float *largest, *sum, *correction;           // per row
  int32_t *begin, *end;                        // per row, the visible keys of the tile at hand
  float k_scale[kKeyTile], v_scale[kKeyTile];  // of int8 caches, per key of the tile
  bool scaled;
  Run next_runs[4 * kKeyTile];  // of the caches, where the tile after it lies
  Ahead ahead;

  State(const Attention& a, int64_t rows, float* scratch)
      : rows(rows), padded(padded_head_dim(a)), scaled(a.k_scale != nullptr) {
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
      x[i] *= s.scaled ? scale * s.k_scale[i] : scale;
    }
    for (int64_t i = 0; i < begin; ++i) {
      x[i] = -__builtin_inff();
    }
    for (int64_t i = end; i < kKeyTile; ++i) {
      x[i] = -__builtin_inff();
    }
  }
  const bool cut = begin > 0 || end < kKeyTile;  // and scaled above
  constexpr int64_t kVectors = kKeyTile / kLanes;
  Vec score[kVectors];
  Vec most = broadcast(-__builtin_inff());
  for (int64_t i = 0; i < kVectors; ++i) {
    score[i] = load(static_cast<const float*>(x + i * kLanes));
    if (!cut) {
      const Vec factor = broadcast(scale);
      score[i] = score[i] * (s.scaled ? factor * load(static_cast<const float*>(s.k_scale + i * kLanes)) : factor);
    }
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
    store(x + i * kLanes, s.scaled ? weight * load(static_cast<const float*>(s.v_scale + i * kLanes)) : weight);
  }
  if (cut && s.scaled) {  // an invisible key's scale may be NaN
    for (int64_t i = 0; i < begin; ++i) {
      x[i] = 0.0f;
    }
    for (int64_t i = end; i < kKeyTile; ++i) {
      x[i] = 0.0f;
    }
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
  const int64_t step = Product::kPerElement;
  const float* weights = s.scores + row * kKeyTile;
  if (step > 1) {
    for (int64_t i = 0; i < rows * kKeyTile; i += kLanes) {
      Product::store_weights(s.weights + row * kKeyTile + i / step, load(weights + i));
    }
    weights = s.weights + row * kKeyTile;
  }
  for (int64_t d = 0; d < s.padded; d += kPanel) {
    const PanelProduct p{weights,
                         s.values + d * (kKeyTile / step),
                         s.out + row * s.padded + d,
                         s.correction + row,
                         kKeyTile / step,
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
  for (int64_t i = 0; s.scaled && i < kKeyTile; ++i) {
    const int64_t row = offsets[smaller(i, seen.end - 1)] / a.head_dim;
    s.k_scale[i] = a.k_scale[row];
    s.v_scale[i] = a.v_scale[row];
  }
  const CacheRows<T> k{static_cast<const T*>(a.k), offsets, seen.end, a.head_dim};
  const CacheRows<T> v{static_cast<const T*>(a.v), offsets, seen.end, a.head_dim};
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

template <typename Product, typename T>
void attend_item(const Attention& a, const AttentionTask& task, const AttentionTask* next, float* scratch) {
  const AttentionItem& item = *task.items;
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
      s.ahead = fetch_ahead<T>(a, task, begin + kKeyTile, next, kKeyTile, s.next_runs);
      attend_tile<Product, T>(a, item, s, begin, seen);
    }
  }
  for (int64_t r = 0; r < s.rows; ++r) {
    finish_row(a, item, r, s.out + r * s.padded, s.largest[r], s.sum[r]);
  }
}

template <typename Product, typename T>
void attend_task(const Attention& a, const AttentionTask& task, const AttentionTask* next, float* scratch) {
  if (task.items->sequence->tokens == 1) {
    attend_token<Product, T>(a, task, next, scratch);
  } else {
    attend_item<Product, T>(a, task, next, scratch);
  }
}

}  // namespace

#if defined(FERRUM_ATTENTION_PAIRS)
void attend_bf16_pairs(const Attention& a, const AttentionTask& task, const AttentionTask* next, float* scratch) {
  if (a.k_scale == nullptr) {
    attend_task<Bf16PairProduct, BFloat16>(a, task, next, scratch);
  } else if (task.items->sequence->tokens == 1 && a.head_dim <= Int16PairProduct::kMaxHeadDim) {
    attend_token<Int16PairProduct, int8_t>(a, task, next, scratch);
  } else {
    attend_task<Bf16PairProduct, int8_t>(a, task, next, scratch);
  }
}
#else
void attend(const Attention& a, const AttentionTask& task, const AttentionTask* next, float* scratch) {
  if (a.k_scale != nullptr) {
    attend_task<Float32Product, int8_t>(a, task, next, scratch);
    return;
  }
  with_type(a.dtype, [&](auto t) { attend_task<Float32Product, decltype(t)>(a, task, next, scratch); });
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
