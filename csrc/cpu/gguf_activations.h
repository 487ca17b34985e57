// Activations prepared for products with GGUF blocks.
#pragma once

#include <algorithm>
#include <string>

#include "checks/gguf.h"
#include "cpu/gguf.h"
#include "cpu/int4_args.h"

namespace ferrum::cpu {

// How the rows of one product are prepared: kept in fp32, or int8 with one scale for each block of the weights.
struct GgufLayout {
  bool int8;
  int64_t in_features;
  int64_t block;  // 32 or 256

  GgufLayout(bool int8, const gguf::Traits& traits, int64_t in_features)
      : int8(int8), in_features(in_features), block(traits.elements) {}

  int64_t chunks() const { return gguf::chunks(in_features); }
  int64_t width() const { return chunks() * gguf::kChunk; }
  int64_t scales() const { return width() / block; }
  // Rows prepared the one way serve the other.
  bool same_as(const GgufLayout& other) const { return !int8 || block == other.block; }
};

class GgufRows {
 public:
  GgufRows(const GgufLayout& layout, int64_t rows)
      : layout_(layout),
        codes_(layout.int8 ? rows * layout.width() : 0),
        scales_(layout.int8 ? rows * layout.scales() : 0),
        sums_(layout.int8 ? rows * layout.width() / 16 : 0),
        run_sums_(layout.int8 ? rows * layout.width() / 32 : 0),
        peaks_(layout.int8 ? rows : 0),
        values_(layout.int8 ? 0 : rows * layout.width()) {}

  // Floats of scratch that `fill` wants: the row, and the sums that quantize_row also computes.
  int64_t staging() const { return layout_.width() + layout_.scales(); }

  // Prepares row `row` from its in_features values of any float type.
  void fill(const Int4Kernels& kernels, int64_t row, const void* in, FloatType type, float* staging) const {
    const int64_t width = layout_.width();
    float* values = layout_.int8 ? staging : values_.get() + row * width;
    kernels.to_float(in, type, layout_.in_features, values);
    std::fill(values + layout_.in_features, values + width, 0.0f);
    if (!layout_.int8) {
      return;
    }
    int8_t* codes = codes_.get() + row * width;
    kernels.quantize_row(values, width, layout_.block, codes, scales_.get() + row * layout_.scales(),
                         reinterpret_cast<int32_t*>(staging + width));
    peaks_.get()[row] =
        FERRUM_FOR_LEVEL(gguf_sums)(codes, width, sums_.get() + row * width / 16, run_sums_.get() + row * width / 32);
  }

  GgufActivations view() const {
    return {codes_.get(), scales_.get(), sums_.get(), run_sums_.get(), peaks_.get(), values_.get(), layout_.chunks()};
  }

 private:
  GgufLayout layout_;
  Scratch<int8_t> codes_;
  Scratch<float> scales_;
  Scratch<int16_t> sums_, run_sums_;
  Scratch<GgufPeaks> peaks_;
  Scratch<float> values_;
};

using GgufKernel = void (*)(const GgufProduct& product);

inline GgufKernel gguf_kernel(bool int8) {
  return int8 ? FERRUM_FOR_LEVEL(gguf_int8_columns) : FERRUM_FOR_LEVEL(gguf_full_columns);
}

}  // namespace ferrum::cpu
