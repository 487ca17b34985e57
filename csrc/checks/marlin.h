// Argument checks of the products in the Marlin layout: marlin_gemm and marlin_moe_gemm.
#pragma once

#include <optional>

#include "checks/rows.h"
#include "common/marlin.h"

namespace ferrum {

struct MarlinArguments {
  Dtype dtype;  // of x and the result
  RowLayout x;
  int64_t packed_rows, columns;  // of a matrix
  int64_t groups, group_size;    // group_size in rows, of one group all of them
  MarlinReduction reduction;
};

inline bool is_float(const Tensor& t) { return is_activation_dtype(t.scalar_type()); }

inline Dtype float_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float  ? Dtype::float32
         : t.scalar_type() == ScalarType::Half ? Dtype::float16
                                               : Dtype::bfloat16;
}

inline std::string described(const Tensor& t) {
  return std::string(torch::headeronly::toString(t.scalar_type())) + " " + shape_string(t);
}

// E and a comma where there are experts.
inline std::string lead_of(int64_t experts) { return experts >= 0 ? std::to_string(experts) + ", " : ""; }

// A shape with E in front where there are experts.
inline bool has_marlin_shape(const Tensor& t, int64_t experts, int64_t rows, int64_t columns) {
  const int64_t lead = experts >= 0 ? 1 : 0;
  return t.dim() == lead + 2 && (lead == 0 || t.size(0) == experts) && t.size(lead) == rows &&
         t.size(lead + 1) == columns;
}

// Rows are copied 16 bytes at a time.
inline void check_marlin_rows(const char* op, const char* name, const Tensor& t, int64_t element_bytes) {
  check_last_contiguous(op, name, t);
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) {
    aligned = aligned && (t.size(i) == 1 || t.stride(i) * element_bytes % 16 == 0);
  }
  FERRUM_CHECK(t.numel() == 0 || aligned, op, name, "expected rows aligned to 16 bytes, got ", stride_string(t));
}

inline MarlinReduction marlin_reduction(const char* op, const std::string& reduction) {
  FERRUM_CHECK(reduction == "fp32" || reduction == "rounded" || reduction == "atomic", op, "reduction",
               "expected one of ('fp32', 'rounded', 'atomic'), got '", reduction, "'");
  return reduction == "fp32"      ? MarlinReduction::fp32
         : reduction == "rounded" ? MarlinReduction::rounded
                                  : MarlinReduction::atomic;
}

// The matrices: `experts` is their number in a stack, -1 for one alone; `used` columns of each are.
inline void check_marlin_weights(const char* op, const Tensor& packed, const Tensor& scales,
                                 const std::optional<Tensor>& zeros, int64_t experts, int64_t used, int64_t group_size,
                                 int64_t bits, MarlinArguments& a) {
  FERRUM_CHECK(bits == 4 || bits == 8, op, "bits", "expected one of (4, 8), got ", bits);
  const int64_t lead = experts >= 0 ? 1 : 0;
  const std::string lead_size = lead_of(experts);
  FERRUM_CHECK(packed.scalar_type() == ScalarType::Int && packed.dim() == lead + 2, op, "packed", "expected int32 (",
               lead_size, "R/16, N*", bits, "/2), got ", described(packed));
  a.packed_rows = packed.size(lead) * kMarlinStep;
  a.columns = packed.size(lead + 1) * 2 / bits;
  FERRUM_CHECK(a.columns % kMarlinUnit == 0, op, "out_features", "expected a multiple of ", kMarlinUnit, ", got ",
               a.columns);
  FERRUM_CHECK(used >= 0 && used <= a.columns, op, "out_features", "expected at most ", a.columns,
               " columns of packed, got ", used);
  check_marlin_rows(op, "packed", packed, 4);
  FERRUM_CHECK(group_size == -1 || (group_size > 0 && group_size % kMarlinStep == 0), op, "group_size",
               "expected -1 or a multiple of ", kMarlinStep, ", got ", group_size);
  a.group_size = group_size == -1 ? a.packed_rows : group_size;
  a.groups = a.group_size == 0 ? 0 : (a.packed_rows + a.group_size - 1) / a.group_size;
  FERRUM_CHECK(is_float(scales) && has_marlin_shape(scales, experts, a.groups, a.columns), op, "scales",
               "expected floating (", lead_size, a.groups, ", ", a.columns, "), got ", described(scales));
  check_marlin_rows(op, "scales", scales, scales.scalar_type() == ScalarType::Float ? 4 : 2);
  if (zeros.has_value()) {
    const int64_t words = a.columns * bits / 32;
    FERRUM_CHECK(zeros->scalar_type() == ScalarType::Int && has_marlin_shape(*zeros, experts, a.groups, words), op,
                 "zeros", "expected int32 (", lead_size, a.groups, ", ", words, "), got ", described(*zeros));
    check_marlin_rows(op, "zeros", *zeros, 4);
  }
}

inline MarlinArguments check_marlin(const char* op, const Tensor& x, const Tensor& packed, const Tensor& scales,
                                    const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                                    const Tensor& workspace, int64_t experts, int64_t used, int64_t group_size,
                                    int64_t bits, const std::string& reduction, int64_t max_sms) {
  MarlinArguments a{};
  check_marlin_weights(op, packed, scales, zeros, experts, used, group_size, bits, a);
  FERRUM_CHECK(is_float(x) && x.scalar_type() != ScalarType::Float && x.dim() > 0, op, "x",
               "expected float16 or bfloat16 (..., K), got ", described(x));
  a.dtype = float_dtype(x);
  const std::string lead_size = lead_of(experts);
  const int64_t in_features = x.size(x.dim() - 1);
  if (perm.has_value()) {
    const bool fits = perm->scalar_type() == ScalarType::Int && perm->dim() == (experts >= 0 ? 2 : 1) &&
                      perm->size(perm->dim() - 1) == a.packed_rows && (experts < 0 || perm->size(0) == experts);
    FERRUM_CHECK(fits, op, "perm", "expected int32 (", lead_size, a.packed_rows, "), got ", described(*perm));
    check_last_contiguous(op, "perm", *perm);
  } else {
    FERRUM_CHECK(in_features <= a.packed_rows && in_features >= a.packed_rows - kMarlinMaxPadding, op, "x",
                 "expected floating (..., K), K from ",
                 a.packed_rows < kMarlinMaxPadding ? 0 : a.packed_rows - kMarlinMaxPadding, " to ", a.packed_rows,
                 ", got ", described(x));
  }
  check_last_contiguous(op, "x", x);
  a.x = row_layout(op, "x", x);
  FERRUM_CHECK(workspace.scalar_type() == ScalarType::Int && workspace.dim() == 1 && workspace.is_contiguous(), op,
               "workspace", "expected int32 (W,), got ", described(workspace));
  a.reduction = marlin_reduction(op, reduction);
  FERRUM_CHECK(max_sms >= 0, op, "max_sms", "expected 0 or more, got ", max_sms);
  return a;
}

inline void check_marlin_bias(const char* op, const std::optional<Tensor>& bias, int64_t experts, int64_t columns) {
  if (bias.has_value()) {
    const bool fits = is_float(*bias) && bias->is_contiguous() && bias->dim() == (experts >= 0 ? 2 : 1) &&
                      bias->size(bias->dim() - 1) == columns && (experts < 0 || bias->size(0) == experts);
    const std::string lead_size = lead_of(experts);
    FERRUM_CHECK(fits, op, "bias", "expected contiguous floating (", lead_size, columns, experts >= 0 ? ")" : ",)",
                 ", got ", described(*bias));
  }
}

// The blocks of a grouped product over `rows` rows of the result.
inline void check_marlin_blocks(const char* op, const Tensor& sorted_token_ids, const Tensor& block_ids,
                                const Tensor& total_post_pad, const std::optional<Tensor>& topk_weights, int64_t rows,
                                int64_t block_size) {
  const bool known = block_size == 8 || block_size == 16 || block_size == 32 || block_size == 48 || block_size == 64 ||
                     block_size == 128;
  FERRUM_CHECK(known, op, "block_size", "expected one of (8, 16, 32, 48, 64, 128), got ", block_size);
  const auto check_ids = [op](const char* name, const Tensor& ids, int64_t size) {
    const bool fits =
        ids.scalar_type() == ScalarType::Int && ids.dim() == 1 && ids.size(0) == size && ids.is_contiguous();
    FERRUM_CHECK(fits, op, name, "expected contiguous int32 (", size, ",), got ", described(ids));
  };
  check_ids("sorted_token_ids", sorted_token_ids, sorted_token_ids.numel());
  check_ids("block_ids", block_ids, (sorted_token_ids.numel() + block_size - 1) / block_size);
  check_ids("total_post_pad", total_post_pad, 1);
  if (topk_weights.has_value()) {
    const bool fits = topk_weights->scalar_type() == ScalarType::Float && topk_weights->numel() == rows &&
                      topk_weights->is_contiguous();
    FERRUM_CHECK(fits, op, "topk_weights", "expected contiguous float32 with ", rows, " elements, got ",
                 described(*topk_weights));
  }
}

}  // namespace ferrum
