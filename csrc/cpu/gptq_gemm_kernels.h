// Blocks of x @ w for weights in GPTQ words. A weight is built from its code
// without a conversion: the code in the low mantissa bits of 2^23 is the float
// 2^23 + code, and 2^23 + zero comes off exactly.
#include "common/gptq.h"
#include "cpu/gptq_gemm.h"
#include "cpu/gptq_words.h"

namespace ferrum::cpu::FERRUM_LEVEL {
namespace {

constexpr int64_t kColumns = kGptqBlockColumns;
constexpr int64_t kTileRows = 64;  // a multiple of every period; sums run over this many in-features
constexpr int64_t kPrefetchRows = 8;
constexpr float kTwoTo23 = 8388608.0f;

// Accumulators, weights and one broadcast activation fit the registers of the
// level: AVX512 has 32 of 16 lanes, AVX2 16 of 8, any other at least 16 of 4.
#if defined(FERRUM_LEVEL_AVX512)
constexpr int64_t kTileVectors = 4, kTileBatch = 6;
constexpr int64_t kDirectVectors = 4, kDirectBatch = 2;
#elif defined(FERRUM_LEVEL_AVX2)
constexpr int64_t kTileVectors = 1, kTileBatch = 6;
constexpr int64_t kDirectVectors = 2, kDirectBatch = 1;
#else
constexpr int64_t kTileVectors = 1, kTileBatch = 2;
constexpr int64_t kDirectVectors = 1, kDirectBatch = 1;
#endif

// What every task over one block of columns needs.
struct Block {
  const GptqGemm& gemm;
  int64_t column, width;
  float* zeros;   // [groups][kColumns], 2^23 + zero
  float* scales;  // [groups][kColumns]
};

template <int64_t kBits>
void decode_zeros(const int32_t* words, int64_t columns, bool less_one, float* zeros) {
  constexpr int64_t kCodes = gptq::period_codes(kBits);
  constexpr uint32_t kMask = gptq::code_mask(kBits);
  const uint32_t word_offset = less_one ? gptq::v1_word_offset(kBits) : 0;
  const uint32_t field_offset = less_one && kBits == 3 ? 1 : 0;
  for (int64_t n = 0; n < columns; n += kCodes, words += gptq::period_words(kBits)) {
    const int64_t count = smaller(kCodes, columns - n);
    if constexpr (kBits == 3) {
      // The first 16 codes begin in the first 64 bits, the others end in the
      // last 64.
      const uint64_t middle = static_cast<uint32_t>(words[1]);
      const uint64_t low = static_cast<uint32_t>(words[0]) | middle << 32;
      const uint64_t high = middle | static_cast<uint64_t>(static_cast<uint32_t>(words[2])) << 32;
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t code = (i < 16 ? low >> 3 * i : high >> (3 * i - 32)) + field_offset;
        zeros[n + i] = kTwoTo23 + static_cast<float>(static_cast<int32_t>(code & kMask));
      }
    } else {
      const uint32_t word = static_cast<uint32_t>(words[0]) + word_offset;
      for (int64_t i = 0; i < count; ++i) {
        zeros[n + i] = kTwoTo23 + static_cast<float>(static_cast<int32_t>(word >> (kBits * i) & kMask));
      }
    }
  }
}

void decode_groups(const Block& block) {
  const GptqGemm& gemm = block.gemm;
  const int64_t first_word = block.column / gptq::period_codes(gemm.bits) * gptq::period_words(gemm.bits);
  for (int64_t g = 0; g < gemm.groups; ++g) {
    const int32_t* words = gemm.qzeros + g * gemm.zero_words + first_word;
    float* zeros = block.zeros + g * kColumns;
    switch (gemm.bits) {
      case 2:
        decode_zeros<2>(words, block.width, gemm.zeros_less_one, zeros);
        break;
      case 3:
        decode_zeros<3>(words, block.width, gemm.zeros_less_one, zeros);
        break;
      case 4:
        decode_zeros<4>(words, block.width, gemm.zeros_less_one, zeros);
        break;
      default:
        decode_zeros<8>(words, block.width, gemm.zeros_less_one, zeros);
    }
  }
  with_type(gemm.scale_dtype, [&](auto t) {
    for (int64_t g = 0; g < gemm.groups; ++g) {
      const auto* scales = static_cast<const decltype(t)*>(gemm.scales) + g * gemm.out_features + block.column;
      for_vectors(block.width, [&](int64_t i, int64_t count) {
        store(block.scales + g * kColumns + i, load_some(scales + i, count));
      });
    }
  });
}

// Calls use(k, weights) for the in-features [begin, end), the weights being
// those of kVector vectors of columns from `first` (inside the block) on. Both
// ends lie on whole periods.
template <int64_t kVector, typename Use>
inline void for_weights(const Block& block, int64_t begin, int64_t end, int64_t first, Use use) {
  const GptqGemm& gemm = block.gemm;
  const int64_t bits = gemm.bits, stride = gemm.out_features;
  const int64_t codes = gptq::period_codes(bits);
  const int32_t* words = gemm.qweight + begin / codes * gptq::period_words(bits) * stride + block.column + first;
  const Words mask = broadcast_words(gptq::code_mask(bits));
  int64_t counts[kVector];
  for (int64_t v = 0; v < kVector; ++v) {
    counts[v] = block.width - first - v * kLanes;
  }
  int32_t group = -1;
  Vec zeros[kVector], scales[kVector];
  for (int64_t period = begin; period < end; period += codes) {
    // A block's rows of words are a matrix row apart, which the processor does not foresee.
    for (int64_t v = 0; v < kVector; ++v) {
      __builtin_prefetch(words + kPrefetchRows * stride + v * kLanes);
    }
    Words low[kVector];
    for (int64_t v = 0; v < kVector; ++v) {
      low[v] = load_words(words + v * kLanes, counts[v]);
    }
    words += stride;
    for (int64_t i = 0; i < codes; ++i) {
      if (gemm.g_idx[period + i] != group) {
        group = gemm.g_idx[period + i];
        for (int64_t v = 0; v < kVector; ++v) {
          zeros[v] = load(block.zeros + group * kColumns + first + v * kLanes);
          scales[v] = load(block.scales + group * kColumns + first + v * kLanes);
        }
      }
      const gptq::Field field = gptq::field_at(i, bits);
      Vec weights[kVector];
      if (field.crosses) {
        for (int64_t v = 0; v < kVector; ++v) {
          const Words high = load_words(words + v * kLanes, counts[v]);
          weights[v] = plus_two_to_23(shift_pair(low[v], high, field.shift), mask);
          low[v] = high;
        }
        words += stride;
      } else {
        for (int64_t v = 0; v < kVector; ++v) {
          weights[v] = plus_two_to_23(shift_right(low[v], field.shift), mask);
        }
      }
      for (int64_t v = 0; v < kVector; ++v) {
        weights[v] = (weights[v] - zeros[v]) * scales[v];
      }
      use(period + i, weights);
    }
  }
}

inline const float* tile_of_x(const GptqGemm& gemm, int64_t begin, int64_t row) {
  return gemm.x + begin * gemm.rows + row * kTileRows;
}

// A few rows: each weight is used while it is in a register.
template <int64_t kBatch>
void multiply_directly(const Block& block, int64_t begin, int64_t end, int64_t row, float* sums) {
  const float* x = tile_of_x(block.gemm, begin, row);
  for (int64_t first = 0; first < block.width; first += kDirectVectors * kLanes) {
    Vec sum[kBatch][kDirectVectors];
    for (int64_t m = 0; m < kBatch; ++m) {
      for (int64_t v = 0; v < kDirectVectors; ++v) {
        sum[m][v] = broadcast(0.0f);
      }
    }
    for_weights<kDirectVectors>(block, begin, end, first, [&](int64_t k, const Vec* weights) {
      for (int64_t m = 0; m < kBatch; ++m) {
        const Vec activation = broadcast(x[m * kTileRows + k - begin]);
        for (int64_t v = 0; v < kDirectVectors; ++v) {
          sum[m][v] = fma(activation, weights[v], sum[m][v]);
        }
      }
    });
    for (int64_t m = 0; m < kBatch; ++m) {
      for (int64_t v = 0; v < kDirectVectors; ++v) {
        float* total = sums + m * kColumns + first + v * kLanes;
        store(total, load(total) + sum[m][v]);
      }
    }
  }
}

void dequantize_tile(const Block& block, int64_t begin, int64_t end, float* tile) {
  for (int64_t first = 0; first < block.width; first += kDirectVectors * kLanes) {
    for_weights<kDirectVectors>(block, begin, end, first, [&](int64_t k, const Vec* weights) {
      for (int64_t v = 0; v < kDirectVectors; ++v) {
        store(tile + (k - begin) * kColumns + first + v * kLanes, weights[v]);
      }
    });
  }
}

template <int64_t kBatch>
inline void multiply_tile(const float* x, const float* tile, int64_t depth, float* sums) {
  for (int64_t first = 0; first < kColumns; first += kTileVectors * kLanes) {
    Vec sum[kBatch][kTileVectors];
    for (int64_t m = 0; m < kBatch; ++m) {
      for (int64_t v = 0; v < kTileVectors; ++v) {
        sum[m][v] = broadcast(0.0f);
      }
    }
    for (int64_t k = 0; k < depth; ++k) {
      Vec weights[kTileVectors];
      for (int64_t v = 0; v < kTileVectors; ++v) {
        weights[v] = load(tile + k * kColumns + first + v * kLanes);
      }
      for (int64_t m = 0; m < kBatch; ++m) {
        const Vec activation = broadcast(x[m * kTileRows + k]);
        for (int64_t v = 0; v < kTileVectors; ++v) {
          sum[m][v] = fma(activation, weights[v], sum[m][v]);
        }
      }
    }
    for (int64_t m = 0; m < kBatch; ++m) {
      for (int64_t v = 0; v < kTileVectors; ++v) {
        float* total = sums + m * kColumns + first + v * kLanes;
        store(total, load(total) + sum[m][v]);
      }
    }
  }
}

// A batch of `count` rows, at most kBatch.
template <int64_t kBatch>
inline void multiply_batch(int64_t count, const float* x, const float* tile, int64_t depth, float* sums) {
  if (count == kBatch) {
    multiply_tile<kBatch>(x, tile, depth, sums);
  } else if constexpr (kBatch > 1) {
    multiply_batch<kBatch - 1>(count, x, tile, depth, sums);
  }
}

void multiply_rows(const GptqGemm& gemm, int64_t begin, int64_t end, int64_t row, int64_t rows, const float* tile,
                   float* sums) {
  for (int64_t m = 0, batch; m < rows; m += batch) {
    // The last two batches share what is left: a batch of one or two rows waits for its sums.
    const int64_t left = rows - m;
    batch = left > kTileBatch && left < 2 * kTileBatch ? left / 2 : smaller(left, kTileBatch);
    multiply_batch<kTileBatch>(batch, tile_of_x(gemm, begin, row + m), tile, end - begin, sums + m * kColumns);
  }
}

void write_rows(const Block& block, int64_t row, int64_t rows, const float* sums) {
  const GptqGemm& gemm = block.gemm;
  with_type(gemm.out_dtype, [&](auto t) {
    with_type(gemm.bias_dtype, [&](auto b) {
      const auto* bias = static_cast<const decltype(b)*>(gemm.bias);
      for (int64_t m = 0; m < rows; ++m) {
        auto* out = static_cast<decltype(t)*>(gemm.out) + (row + m) * gemm.out_features + block.column;
        for_vectors(block.width, [&](int64_t i, int64_t count) {
          Vec sum = load(sums + m * kColumns + i);
          if (bias != nullptr) {
            sum = sum + load_some(bias + block.column + i, count);
          }
          store_some(out + i, sum, count);
        });
      }
    });
  });
}

}  // namespace

void gptq_gemm_block(const GptqGemm& gemm, int64_t column, int64_t begin, int64_t end, float* scratch) {
  float* zeros = scratch;
  float* scales = zeros + gemm.groups * kColumns;
  float* tile = scales + gemm.groups * kColumns;
  float* sums = tile + kTileRows * kColumns;
  const Block block = {gemm, column, smaller(kColumns, gemm.out_features - column), zeros, scales};
  const int64_t rows = end - begin;
  decode_groups(block);
  for (int64_t i = 0; i < rows * kColumns; ++i) {
    sums[i] = 0.0f;
  }
  for (int64_t k = 0; k < gemm.in_features; k += kTileRows) {
    const int64_t k_end = smaller(k + kTileRows, gemm.in_features);
    if (rows == 1) {
      multiply_directly<1>(block, k, k_end, begin, sums);
    } else if (rows == kDirectBatch) {
      multiply_directly<kDirectBatch>(block, k, k_end, begin, sums);
    } else {
      dequantize_tile(block, k, k_end, tile);
      multiply_rows(gemm, k, k_end, begin, rows, tile, sums);
    }
  }
  write_rows(block, begin, rows, sums);
}

void gptq_pack_x(const void* x, Dtype dtype, int64_t in_features, int64_t row, int64_t rows, float* packed) {
  with_type(dtype, [&](auto t) {
    const auto* values = static_cast<const decltype(t)*>(x);
    for_vectors(in_features, [&](int64_t k, int64_t count) {
      const int64_t tile = k / kTileRows;
      store_some(packed + (tile * rows + row) * kTileRows + k % kTileRows, load_some(values + k, count), count);
    });
  });
}

}  // namespace ferrum::cpu::FERRUM_LEVEL
