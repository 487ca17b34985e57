// Argument checks of the sampling family. Values of offsets and penalties are the CPU's to check: on a device the host
// cannot see them.
#pragma once

#include <optional>

#include "checks/rows.h"

namespace ferrum {

// Rows of `size` logits; strides are in elements. Null mask: every logit may be chosen.
struct LogitArguments {
  int64_t tokens, size, stride;
  const uint8_t* mask;
  int64_t mask_stride;
  Dtype dtype;
};

inline LogitArguments check_argmax(const Tensor& logits, const std::optional<Tensor>& mask) {
  const char* op = "argmax_rows";
  LogitArguments a{};
  a.dtype = activation_dtype(op, "logits", logits);
  FERRUM_CHECK(logits.dim() == 2 && logits.size(1) >= 1, op, "logits",
               "expected shape (tokens, vocabulary) with at least 1 column, got ", shape_string(logits));
  check_last_contiguous(op, "logits", logits);
  a.tokens = logits.size(0);
  a.size = logits.size(1);
  a.stride = logits.stride(0);
  if (!mask.has_value()) {
    return a;
  }
  check_dtype(op, "mask", *mask, ScalarType::Bool);
  const bool shared = mask->dim() == 1;
  const bool matches =
      shared ? mask->size(0) == a.size : mask->dim() == 2 && mask->size(0) == a.tokens && mask->size(1) == a.size;
  FERRUM_CHECK(matches, op, "mask", "expected shape (", a.size, ",) or ", shape_string(logits), ", got ",
               shape_string(*mask));
  check_last_contiguous(op, "mask", *mask);
  a.mask = data<uint8_t>(*mask);
  a.mask_stride = shared ? 0 : mask->stride(0);
  return a;
}

// A contiguous list of int32 or int64.
inline void check_integers(const char* op, const char* name, const Tensor& t) {
  FERRUM_CHECK(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, op, name,
               "expected int32 or int64, got ", torch::headeronly::toString(t.scalar_type()));
  FERRUM_CHECK(t.dim() == 1, op, name, "expected 1 dimension, got ", t.dim());
  check_contiguous(op, name, t);
}

inline LogitArguments check_penalty(const Tensor& logits, const Tensor& ids, const Tensor& offsets,
                                    const Tensor& penalty) {
  const char* op = "repetition_penalty_";
  LogitArguments a{};
  a.dtype = activation_dtype(op, "logits", logits);
  FERRUM_CHECK(logits.dim() == 2, op, "logits", "expected shape (tokens, vocabulary), got ", shape_string(logits));
  check_last_contiguous(op, "logits", logits);
  a.tokens = logits.size(0);
  a.size = logits.size(1);
  a.stride = logits.stride(0);
  check_rows_apart(op, "logits", logits, {logits.numel() == 0 ? 0 : a.tokens, a.size, a.stride});
  check_integers(op, "ids", ids);
  check_integers(op, "offsets", offsets);
  check_shape(op, "offsets", offsets, {a.tokens + 1});
  check_dtype(op, "penalty", penalty, ScalarType::Float);
  check_shape(op, "penalty", penalty, {a.tokens});
  check_contiguous(op, "penalty", penalty);
  return a;
}

}  // namespace ferrum
