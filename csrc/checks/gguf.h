// Argument checks of the ops on GGUF blocks, for every device.
#pragma once

#include "checks/tensor.h"
#include "common/gguf.h"

namespace ferrum {

// A type as the ops take it: packed rows, or tiles of 16 rows.
struct GgufFormat {
  const gguf::Traits* traits;
  bool tiled;

  // Rows that stand together.
  int64_t line_rows() const { return tiled ? gguf::kTileRows : 1; }
};

inline GgufFormat check_gguf_type(const char* op, const char* name, int64_t type) {
  const bool tiled = type >= gguf::kTiled;
  const gguf::Traits* traits = gguf::find_traits(tiled ? type - gguf::kTiled : type);
  FERRUM_CHECK(traits != nullptr && (!tiled || traits->elements > 1), op, name,
               "expected a ggml type that ferrum_ops.formats.gguf.GGMLType lists, got ", type);
  return {traits, tiled};
}

// A type with packed blocks: products take no F32, F16 or BF16.
inline GgufFormat check_gguf_quantized(const char* op, const char* name, int64_t type) {
  const GgufFormat format = check_gguf_type(op, name, type);
  FERRUM_CHECK(format.traits->elements > 1, op, name, "expected a quantised ggml type, got ", format.traits->name);
  return format;
}

inline void check_gguf_bytes(const char* op, const char* name, const Tensor& t) {
  check_dtype(op, name, t, ScalarType::Byte);
  FERRUM_CHECK(t.dim() >= 1, op, name, "expected at least 1 dimension, got 0");
  check_contiguous(op, name, t);
}

// Bytes of a packed row of `in_features` weights, or of a tile; `argument` is where in_features comes from.
inline int64_t gguf_line_bytes(const char* op, const char* argument, const GgufFormat& format, int64_t in_features) {
  const gguf::Traits& traits = *format.traits;
  const int64_t elements = format.tiled ? gguf::kChunk : traits.elements;
  FERRUM_CHECK(in_features >= 1 && in_features % elements == 0, op, argument, "expected a multiple of ", elements,
               " input channels for ", format.tiled ? "tiles of " : "", traits.name, ", got ", in_features);
  return format.tiled ? in_features / elements * gguf::tiling_of(traits.type).chunk_bytes()
                      : in_features / elements * traits.bytes;
}

}  // namespace ferrum
