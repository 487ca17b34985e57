// gguf_dequantize and gguf_pack on the CPU.
#include "cpu/gguf.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks/gguf.h"
#include "cpu/allocate.h"
#include "cpu/int4_args.h"

namespace ferrum::cpu {
namespace {

constexpr const char* kDequantize = "gguf_dequantize";
constexpr const char* kPack = "gguf_pack";

FloatType float_type(ScalarType dtype) {
  return dtype == ScalarType::Float ? FloatType::f32 : dtype == ScalarType::Half ? FloatType::f16 : FloatType::bf16;
}

// One row to fp32, whatever its type.
void row_to_float(const gguf::Traits& traits, const uint8_t* blocks, int64_t elements, float* out) {
  if (traits.elements > 1) {
    FERRUM_FOR_LEVEL(gguf_dequantize_row)(traits, blocks, elements, out);
    return;
  }
  const FloatType type = traits.type == gguf::Type::F32   ? FloatType::f32
                         : traits.type == gguf::Type::F16 ? FloatType::f16
                                                          : FloatType::bf16;
  int4_kernels().to_float(blocks, type, elements, out);
}

// A packed row, or the 16 of a tile one after the other.
void line_to_float(const GgufFormat& format, const uint8_t* line, int64_t elements, float* out) {
  if (format.tiled) {
    FERRUM_FOR_LEVEL(gguf_dequantize_tile)(*format.traits, line, elements / gguf::kTileRows, out);
  } else {
    row_to_float(*format.traits, line, elements, out);
  }
}

Tensor gguf_dequantize(const Tensor& blocks, int64_t type, ScalarType dtype) {
  const GgufFormat format = check_gguf_type(kDequantize, "type", type);
  const gguf::Traits& traits = *format.traits;
  check_gguf_bytes(kDequantize, "blocks", blocks);
  FERRUM_CHECK(is_activation_dtype(dtype), kDequantize, "dtype", "expected float32, float16 or bfloat16, got ",
               torch::headeronly::toString(dtype));
  std::vector<int64_t> shape(blocks.sizes().begin(), blocks.sizes().end());
  const int64_t row_bytes = shape.back();
  const int64_t unit = format.tiled ? gguf::tiling_of(traits.type).chunk_bytes() : traits.bytes;
  FERRUM_CHECK(row_bytes % unit == 0, kDequantize, "blocks", "expected rows of a multiple of ", unit, " bytes for ",
               format.tiled ? "tiles of " : "", traits.name, ", got shape ", shape_string(blocks));
  FERRUM_CHECK(!format.tiled || blocks.dim() >= 2, kDequantize, "blocks",
               "expected at least 2 dimensions for tiles, got shape ", shape_string(blocks));
  int64_t elements = row_bytes / unit * (format.tiled ? gguf::kChunk : traits.elements);
  shape.back() = elements;
  if (format.tiled) {
    shape[shape.size() - 2] *= gguf::kTileRows;
    elements *= gguf::kTileRows;  // of a tile
  }
  Tensor out = allocate(blocks, shape, dtype);
  if (out.numel() == 0) {
    return out;
  }
  const uint8_t* bytes = data<uint8_t>(blocks);
  char* result = mutable_data<char>(out);
  const FloatType out_type = float_type(dtype);
  const int64_t out_bytes = elements * float_bytes(out_type);
  const auto from_float = int4_kernels().from_float;
  torch::stable::parallel_for(0, out.numel() / elements, rows_per_task(elements), [&](int64_t begin, int64_t end) {
    const Scratch<float> row(out_type == FloatType::f32 ? 0 : elements);
    for (int64_t r = begin; r < end; ++r) {
      if (out_type == FloatType::f32) {
        line_to_float(format, bytes + r * row_bytes, elements, reinterpret_cast<float*>(result + r * out_bytes));
      } else {
        line_to_float(format, bytes + r * row_bytes, elements, row.get());
        from_float(row.get(), elements, out_type, result + r * out_bytes);
      }
    }
  });
  return out;
}

Tensor gguf_pack(const Tensor& blocks, int64_t type) {
  const GgufFormat format = check_gguf_quantized(kPack, "type", type);
  FERRUM_CHECK(!format.tiled, kPack, "type", "expected packed rows, got tiles");
  const gguf::Traits& traits = *format.traits;
  check_gguf_bytes(kPack, "blocks", blocks);
  std::vector<int64_t> shape(blocks.sizes().begin(), blocks.sizes().end());
  const int64_t row_bytes = shape.back(), chunk_bytes = gguf::kChunk / traits.elements * traits.bytes;
  FERRUM_CHECK(shape.size() >= 2 && shape[shape.size() - 2] % gguf::kTileRows == 0 && row_bytes % chunk_bytes == 0,
               kPack, "blocks", "expected a multiple of ", gguf::kTileRows, " rows of a multiple of ", chunk_bytes,
               " bytes (", gguf::kChunk, " weights) for ", traits.name, ", got shape ", shape_string(blocks));
  const int64_t elements = row_bytes / traits.bytes * traits.elements;
  const int64_t tile_bytes = elements / gguf::kChunk * gguf::tiling_of(traits.type).chunk_bytes();
  shape[shape.size() - 2] /= gguf::kTileRows;
  shape.back() = tile_bytes;
  Tensor out = allocate(blocks, shape);
  if (out.numel() == 0) {
    return out;
  }
  const uint8_t* bytes = data<uint8_t>(blocks);
  uint8_t* result = mutable_data<uint8_t>(out);
  const auto pack_tile = FERRUM_FOR_LEVEL(gguf_pack_tile);
  const int64_t grain = rows_per_task(gguf::kTileRows * elements);
  torch::stable::parallel_for(0, out.numel() / tile_bytes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      pack_tile(traits, bytes + tile * gguf::kTileRows * row_bytes, elements, result + tile * tile_bytes);
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("gguf_dequantize", TORCH_BOX(&gguf_dequantize));
  m.impl("gguf_pack", TORCH_BOX(&gguf_pack));
}

}  // namespace
}  // namespace ferrum::cpu
