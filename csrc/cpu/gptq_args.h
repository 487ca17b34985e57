// Argument checks shared by the ops on GPTQ words.
#pragma once

#include <algorithm>
#include <optional>

#include "checks/tensor.h"
#include "common/gptq.h"

namespace ferrum::cpu {

// K, N, G and the bits of one projection.
struct GptqShape {
  int64_t rows;
  int64_t columns;
  int64_t groups;
  int64_t bits;
};

inline void check_g_idx(const char* op, const Tensor& g_idx, int64_t rows, int64_t groups) {
  check_dtype(op, "g_idx", g_idx, ScalarType::Int);
  check_shape(op, "g_idx", g_idx, {rows});
  check_contiguous(op, "g_idx", g_idx);
  const int32_t* values = data<int32_t>(g_idx);
  for (int64_t k = 0; k < rows; ++k) {
    FERRUM_CHECK(values[k] >= 0 && values[k] < groups, op, "g_idx", "expected values in [0, ", groups, "), got ",
                 values[k], " for row ", k);
  }
}

inline GptqShape check_gptq(const char* op, const Tensor& qweight, const Tensor& qzeros, const Tensor& scales,
                            const std::optional<Tensor>& g_idx, int64_t bits, int64_t zero_offset) {
  FERRUM_CHECK(gptq::bits_supported(bits), op, "bits", "expected 2, 3, 4 or 8, got ", bits);
  FERRUM_CHECK(zero_offset == 0 || zero_offset == 1, op, "zero_offset", "expected 0 or 1, got ", zero_offset);
  const int64_t codes = gptq::period_codes(bits), words = gptq::period_words(bits);
  check_dtype(op, "qweight", qweight, ScalarType::Int);
  check_shape(op, "qweight", qweight, {-1, -1});
  FERRUM_CHECK(qweight.size(0) % words == 0, op, "qweight", "expected rows in multiples of ", words, " for ", bits,
               " bits, got ", qweight.size(0));
  const int64_t rows = qweight.size(0) / words * codes, columns = qweight.size(1);
  check_activation(op, "scales", scales);
  check_shape(op, "scales", scales, {-1, columns});
  const int64_t groups = scales.size(0);
  FERRUM_CHECK(groups > 0 || rows == 0, op, "scales", "expected at least one group, got ", shape_string(scales));
  check_dtype(op, "qzeros", qzeros, ScalarType::Int);
  check_shape(op, "qzeros", qzeros, {groups, (columns + codes - 1) / codes * words});
  if (g_idx.has_value()) {
    check_g_idx(op, *g_idx, rows, groups);
  } else {
    FERRUM_CHECK(groups == 0 || rows % groups == 0, op, "g_idx", "expected int32 (", rows, ",), as ", groups,
                 " groups do not divide that, got None");
  }
  check_contiguous(op, "qweight", qweight);
  check_contiguous(op, "qzeros", qzeros);
  check_contiguous(op, "scales", scales);
  return {rows, columns, groups, bits};
}

}  // namespace ferrum::cpu
