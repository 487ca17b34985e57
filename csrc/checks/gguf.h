// Argument checks of the ops on GGUF blocks, for every device.
#pragma once

#include "checks/tensor.h"
#include "common/gguf.h"

namespace ferrum {

inline const gguf::Traits& check_gguf_type(const char* op, const char* name, int64_t type) {
  const gguf::Traits* traits = gguf::find_traits(type);
  FERRUM_CHECK(traits != nullptr, op, name, "expected a ggml type that ferrum_ops.formats.gguf.GGMLType lists, got ",
               type);
  return *traits;
}

// A type with packed blocks: products take no F32, F16 or BF16.
inline const gguf::Traits& check_gguf_quantized(const char* op, const char* name, int64_t type) {
  const gguf::Traits& traits = check_gguf_type(op, name, type);
  FERRUM_CHECK(traits.elements > 1, op, name, "expected a quantised ggml type, got ", traits.name);
  return traits;
}

inline void check_gguf_bytes(const char* op, const char* name, const Tensor& t) {
  check_dtype(op, name, t, ScalarType::Byte);
  FERRUM_CHECK(t.dim() >= 1, op, name, "expected at least 1 dimension, got 0");
  check_contiguous(op, name, t);
}

// Bytes of a packed row of `in_features` weights; `argument` is where in_features comes from.
inline int64_t gguf_row_bytes(const char* op, const char* argument, const gguf::Traits& traits, int64_t in_features) {
  FERRUM_CHECK(in_features >= 1 && in_features % traits.elements == 0, op, argument, "expected a multiple of ",
               traits.elements, " input channels for ", traits.name, ", got ", in_features);
  return in_features / traits.elements * traits.bytes;
}

}  // namespace ferrum
