// marlin_repack: GPTQ words to the Marlin layout, at load.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "checks/marlin.h"
#include "common/gptq.h"
#include "cuda/marlin_runs.cuh"

namespace ferrum::cuda {
namespace {

constexpr int kThreads = 256;

// A warp per unit. Of every row that it needs it reads the 64 words that hold one of the row's codes each: under a perm
// all but one code of a word is another unit's, which finds it in the L2 cache, as a matrix is smaller than that.
struct Repack {
  const int32_t* qweight;
  int64_t expert_stride, row_stride, column_stride;
  const int32_t* perm;  // null: rows stay where they are
  int64_t perm_expert, perm_row;
  uint4* packed;
  int64_t units;  // of all experts
  int unit_columns, row_tiles, in_features;
  bool vectors;  // eight words of a row are two aligned pieces of 16 bytes
};

__device__ __forceinline__ void load_words(const Repack& r, const int32_t* from, uint32_t (&words)[8]) {
  if (r.vectors) {
    const uint4 low = reinterpret_cast<const uint4*>(from)[0], high = reinterpret_cast<const uint4*>(from)[1];
    words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
    words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    words[i] = static_cast<uint32_t>(from[i * r.column_stride]);
  }
}

template <int Bits>
__global__ void __launch_bounds__(kThreads) repack(Repack r) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (unit >= r.units) {
    return;
  }
  const int64_t row_tile = unit / r.unit_columns, expert = row_tile / r.row_tiles;
  const int tile = static_cast<int>(row_tile % r.row_tiles), column = static_cast<int>(unit % r.unit_columns);
  const MarlinRuns<Bits> runs(threadIdx.x % 32);
  const int32_t* const columns =
      r.qweight + expert * r.expert_stride + (int64_t{column} * kMarlinUnit + runs.column_run * 8) * r.column_stride;
  constexpr uint32_t kMiddle = Bits == 4 ? 0x88888888u : 0x80808080u;  // codes of a padding row
  constexpr int kPerWord = 32 / Bits;
  uint32_t words[Bits];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    int row = tile * kMarlinStep + runs.row(s);
    if (r.perm != nullptr) {
      row = r.perm[expert * r.perm_expert + row * r.perm_row];
    }
    const bool inside = row >= 0 && row < r.in_features;
    uint32_t from[8] = {};
    if (inside) {
      load_words(r, columns + row / kPerWord * r.row_stride, from);
    }
    const int shift = inside ? row % kPerWord * Bits : 0;
#pragma unroll
    for (int w = 0; w < Bits / 4; ++w) {
      uint32_t codes = inside ? 0 : kMiddle;
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        codes |= (from[w * kPerWord + i] >> shift & ((1u << Bits) - 1)) << Bits * i;
      }
      words[s * (Bits / 4) + w] = codes;
    }
  }
  transpose_tiles<Bits>(words);
  transpose_columns<Bits>(words);
  store_unit<Bits>(r.packed + unit * (Bits * 8), words);
}

void check_arguments(const Tensor& qweight, const std::optional<Tensor>& perm, int64_t in_features,
                     int64_t out_features, int64_t bits) {
  const char* op = "marlin_repack";
  FERRUM_CHECK(bits == 4 || bits == 8, op, "bits", "expected one of (4, 8), got ", bits);
  const int64_t lead = qweight.dim() - 2,
                rows = perm.has_value() && perm->dim() > 0 ? perm->size(perm->dim() - 1) : in_features;
  FERRUM_CHECK(rows % kMarlinStep == 0, op, "in_features", "expected a multiple of ", kMarlinStep, " rows, got ", rows);
  FERRUM_CHECK(out_features % kMarlinUnit == 0, op, "out_features", "expected a multiple of ", kMarlinUnit, ", got ",
               out_features);
  FERRUM_CHECK(in_features >= 0 && in_features % (32 / bits) == 0, op, "in_features", "expected a multiple of ",
               32 / bits, ", got ", in_features);
  const int64_t words = in_features * bits / 32;
  const bool fits = qweight.scalar_type() == ScalarType::Int && (lead == 0 || lead == 1) &&
                    qweight.size(lead) == words && qweight.size(lead + 1) == out_features;
  FERRUM_CHECK(fits, op, "qweight", "expected int32 (", words, ", ", out_features, ") or (E, ", words, ", ",
               out_features, "), got ", described(qweight));
  if (perm.has_value()) {
    const bool same = perm->scalar_type() == ScalarType::Int && perm->dim() == lead + 1 &&
                      (lead == 0 || perm->size(0) == qweight.size(0));
    FERRUM_CHECK(same, op, "perm", "expected int32 (", lead == 1 ? lead_of(qweight.size(0)) : "", "rows), got ",
                 described(*perm));
    check_device(op, qweight, {{"perm", *perm}});
  }
}

Tensor marlin_repack(const Tensor& qweight, const std::optional<Tensor>& perm, int64_t in_features,
                     int64_t out_features, int64_t bits) {
  const char* op = "marlin_repack";
  check_arguments(qweight, perm, in_features, out_features, bits);
  const int64_t lead = qweight.dim() - 2, rows = perm.has_value() ? perm->size(lead) : in_features;
  std::vector<int64_t> shape(qweight.sizes().begin(), qweight.sizes().begin() + lead);
  shape.insert(shape.end(), {rows / kMarlinStep, out_features * bits / 2});
  Tensor packed = new_output(qweight, shape);
  if (packed.numel() == 0) {
    return packed;
  }
  Repack r{};
  r.qweight = data<int32_t>(qweight);
  r.expert_stride = lead == 1 ? qweight.stride(0) : 0;
  r.row_stride = qweight.stride(lead);
  r.column_stride = qweight.stride(lead + 1);
  if (perm.has_value()) {
    r.perm = data<int32_t>(*perm);
    r.perm_expert = lead == 1 ? perm->stride(0) : 0;
    r.perm_row = perm->stride(lead);
  }
  r.packed = reinterpret_cast<uint4*>(mutable_data<int32_t>(packed));
  r.units = packed.numel() / (bits * 32);
  r.unit_columns = static_cast<int>(narrow(op, "out_features", out_features / kMarlinUnit));
  r.row_tiles = static_cast<int>(narrow(op, "in_features", rows) / kMarlinStep);
  r.in_features = static_cast<int>(narrow(op, "in_features", in_features));
  r.vectors = r.column_stride == 1 && reinterpret_cast<uintptr_t>(r.qweight) % 16 == 0 && r.row_stride % 4 == 0 &&
              r.expert_stride % 4 == 0;
  const int64_t warps = kThreads / 32;
  const Grid grid{dim3(narrow(op, "qweight", (r.units + warps - 1) / warps)), dim3(kThreads)};
  const Stream stream(op, qweight);
  if (bits == 4) {
    stream.launch(repack<4>, grid, r);
  } else {
    stream.launch(repack<8>, grid, r);
  }
  return packed;
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("marlin_repack", TORCH_BOX(&ferrum::cuda::marlin_repack));
}
