// Products of int8 activations with GGUF blocks without instructions for bytes: codes and activations become 16-bit
// words, whose dot products every processor has and compilers find in plain loops. Included by gguf_kernels.h.
#pragma once

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

// Columns that a row of words meets while it is in registers.
constexpr int64_t kWordColumns = 4;

// A chunk of a few columns: codes less their zero points, those of blocks of 256 times their scales, at most 32 * 128.
// A sum of 256 products with codes of 127 stays below 2^31.
struct WordChunk {
  alignas(64) int16_t codes[kWordColumns][gguf::kChunk];
  int16_t mins[kWordColumns][16];
  float d[kWordColumns][8], m[kWordColumns][8];

  void fill(const gguf::Traits& traits, const Chunk& chunk, int64_t column) {
    const bool small = traits.elements == gguf::kSmallBlock;
    const int16_t zero = static_cast<int16_t>(traits.zero);
    for (int64_t j = 0; j < 16; ++j) {
      const int16_t scale = small ? int16_t{1} : chunk.scales[j];
      for (int64_t i = 16 * j; i < 16 * j + 16; ++i) {
        codes[column][i] = static_cast<int16_t>(static_cast<int16_t>(chunk.codes[i] - zero) * scale);
      }
    }
    __builtin_memcpy(mins[column], chunk.mins, sizeof(chunk.mins));
    __builtin_memcpy(d[column], chunk.d, sizeof(chunk.d));
    __builtin_memcpy(m[column], chunk.m, sizeof(chunk.m));
  }
};

inline int32_t dot(const int16_t* a, const int16_t* b, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += static_cast<int32_t>(a[i]) * b[i];
  }
  return sum;
}

// dots[c] of a row and all columns.
inline void dot_columns(const int16_t* x, const int16_t (*w)[gguf::kChunk], int32_t* dots) {
  static_assert(kWordColumns == 4);
  int32_t a = 0, b = 0, c = 0, d = 0;
  for (int64_t i = 0; i < gguf::kChunk; ++i) {
    a += static_cast<int32_t>(x[i]) * w[0][i];
    b += static_cast<int32_t>(x[i]) * w[1][i];
    c += static_cast<int32_t>(x[i]) * w[2][i];
    d += static_cast<int32_t>(x[i]) * w[3][i];
  }
  dots[0] = a;
  dots[1] = b;
  dots[2] = c;
  dots[3] = d;
}

inline void large_terms(const gguf::Traits& traits, const WordChunk& w, const int16_t* words, const ChunkRow& x,
                        float* terms) {
  int32_t dots[kWordColumns];
  dot_columns(words, w.codes, dots);
  for (int64_t c = 0; c < kWordColumns; ++c) {
    terms[c] = static_cast<float>(dots[c]) * (w.d[c][0] * x.scales[0]);
    if (traits.mins) {
      terms[c] = terms[c] - static_cast<float>(dot(w.mins[c], x.sums, 16)) * (w.m[c][0] * x.scales[0]);
    }
  }
}

inline void small_terms(const gguf::Traits& traits, const WordChunk& w, const int16_t* words, const ChunkRow& x,
                        float* terms) {
  for (int64_t c = 0; c < kWordColumns; ++c) {
    int32_t dots[8];
    for (int64_t j = 0; j < 8; ++j) {
      dots[j] = dot(w.codes[c] + gguf::kSmallBlock * j, words + gguf::kSmallBlock * j, gguf::kSmallBlock);
    }
    float t[8];
    for (int64_t j = 0; j < 8; ++j) {
      t[j] = static_cast<float>(dots[j]) * (w.d[c][j] * x.scales[j]);
      if (traits.mins) {
        t[j] = t[j] - w.m[c][j] * (x.scales[j] * static_cast<float>(x.sums[2 * j] + x.sums[2 * j + 1]));
      }
    }
    terms[c] = ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
  }
}

void int8_columns(const GgufProduct& p) {
  const gguf::Traits& traits = *p.weights.traits;
  const bool small = traits.elements == gguf::kSmallBlock;
  alignas(64) int16_t words[kGgufRowBlock][gguf::kChunk];
  Chunk chunk;
  WordChunk w{};
  for (int64_t k = 0; k < p.activations.chunks; ++k) {
    ChunkRow rows[kGgufRowBlock];
    for (int64_t r = 0; r < p.rows; ++r) {
      rows[r] = chunk_row(p.activations, p.row_ids[r], k, small ? 8 : 1);
      for (int64_t i = 0; i < gguf::kChunk; ++i) {
        words[r][i] = rows[r].codes[i];
      }
    }
    for (int64_t first = 0; first < p.columns; first += kWordColumns) {
      const int64_t columns = smaller(kWordColumns, p.columns - first);
      for (int64_t c = 0; c < columns; ++c) {
        decode_column(p, first + c, k, chunk);
        w.fill(traits, chunk, c);
      }
      float* out = out_of(p, first);
      for (int64_t r = 0; r < p.rows; ++r, out += kGgufPanel) {
        float terms[kWordColumns];
        (small ? small_terms : large_terms)(traits, w, words[r], rows[r], terms);
        for (int64_t c = 0; c < columns; ++c) {
          out[c] = (k == 0 ? 0.0f : out[c]) + terms[c];
        }
      }
    }
  }
}

}  // namespace
}  // namespace ferrum::cpu::FERRUM_LEVEL
