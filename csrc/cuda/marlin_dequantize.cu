// marlin_dequantize_out: weights of the Marlin layout as dense rows [K, N].
//
// Of 4-bit weights half a byte is read and two bytes are written for each. A warp walks down a column of units and asks
// for the next one before it writes this one's weights. 32 warps of a multiprocessor have 16 KB of reads under way,
// where an H200 wants a fifth of 26 KB, the share that is read; the writes need no waiting.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "checks/marlin.h"
#include "cuda/marlin_runs.cuh"
#include "cuda/vec.cuh"

namespace ferrum::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Row tiles that a warp walks over: a group of 128 rows, whose scales it then reads once.
constexpr int kSpanTiles = 8;

template <typename T>
struct Dense {
  const uint4* packed;
  int64_t packed_expert, packed_row;
  const void* scales;
  Dtype scales_dtype;
  int64_t scales_expert, scales_row;
  const int32_t* zeros;  // null: 2^(bits - 1)
  int64_t zeros_expert, zeros_row;
  const int32_t* perm;  // null: packed row j is row j
  int64_t perm_expert, perm_row;
  const int32_t* offsets;  // null: all experts; else those of whom offsets[e + 1] > offsets[e]
  T* out;
  int64_t out_expert, out_row;
  int in_features, columns;  // of out
  int row_tiles, units, spans;
  int group_tiles;  // of one group, all
  bool one_group, interleaved, vectors;
  int expert_blocks;
};

// Eight neighbouring columns of a group: w = (code - zero) * scale. Differences of a code and a zero point are exact,
// so a weight is rounded once, or twice where its scale is float32.
template <typename T, int Bits>
struct Columns {
  float scale[8];
  float zero[8];  // 2^23 + the zero point

  static constexpr uint32_t kTwoTo23 = 0x4b000000;  // as a float, whose last bits then count ones

  __device__ __forceinline__ void load(const Dense<T>& d, int expert, int group, int unit, int run) {
    const int64_t row = expert * d.scales_expert + group * d.scales_row + int64_t{unit} * kMarlinUnit;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // Several groups: in units, transposed 8 x 8. One: in runs of 32, column 8 b + 2 a + c lies at 8 a + 2 b + c.
      const int at = d.one_group ? run / 4 * 32 + i / 2 * 8 + run % 4 * 2 + i % 2 : 8 * i + run;
      scale[i] = load_scale(d, row + at);
    }
    const int64_t words = expert * d.zeros_expert + group * d.zeros_row + int64_t{unit} * 2 * Bits;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t code = 1u << (Bits - 1);
      if (d.zeros != nullptr) {  // transposed like the scales of several groups, and in words like codes
        const uint32_t word = static_cast<uint32_t>(d.zeros[words + (Bits == 4 ? i : 2 * i + run / 4)]);
        code = Bits == 4 ? word >> (run % 2 * 16 + run / 2 * 4) & 0xf : word >> (run % 2 * 16 + run / 2 % 2 * 8) & 0xff;
      }
      zero[i] = __uint_as_float(kTwoTo23 | code);
    }
  }

  // `words` of a row: Bits / 4 of them.
  __device__ __forceinline__ void weights(const uint32_t* words, float (&to)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t code = Bits == 4 ? words[0] >> 4 * i & 0xf : words[i / 4] >> 8 * (i % 4) & 0xff;
      to[i] = (__uint_as_float(kTwoTo23 | code) - zero[i]) * scale[i];
    }
  }

 private:
  __device__ static __forceinline__ float load_scale(const Dense<T>& d, int64_t at) {
    switch (d.scales_dtype) {
      case Dtype::float32:
        return static_cast<const float*>(d.scales)[at];
      case Dtype::float16:
        return to_float(static_cast<const __half*>(d.scales)[at]);
      default:
        return to_float(static_cast<const __nv_bfloat16*>(d.scales)[at]);
    }
  }
};

// Where eight columns go in a row of `out`, and how many of them there are.
struct Place {
  int column, count;

  template <typename T>
  __device__ __forceinline__ Place(const Dense<T>& d, int unit, int run) {
    const int all_runs = unit * (kMarlinUnit / 8) + run;
    if (d.interleaved) {  // runs of gate and of up in turns
      const int half = d.columns / 2, first = all_runs / 2 * 8;
      column = all_runs % 2 * half + first;
      count = min(half - first, 8);
    } else {
      column = all_runs * 8;
      count = min(d.columns - column, 8);
    }
  }
};

template <typename T>
__device__ __forceinline__ void store_weights(T* to, const float (&weights)[8], int count, bool vectors) {
  constexpr int kPiece = 16 / sizeof(T);
  if (vectors) {
#pragma unroll
    for (int i = 0; i < 8; i += kPiece) {
      float piece[kPiece];
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        piece[j] = weights[i + j];
      }
      store(to + i, piece);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) {
      to[i] = from_float<T>(weights[i]);
    }
  }
}

template <typename T, int Bits>
__global__ void __launch_bounds__(kThreads, Bits == 4 ? 4 : 3) dequantize(Dense<T> d) {
  const int expert = blockIdx.x / d.expert_blocks;
  if (d.offsets != nullptr && d.offsets[expert + 1] <= d.offsets[expert]) {
    return;
  }
  const int warp = blockIdx.x % d.expert_blocks * kWarps + threadIdx.x / 32, unit = warp % d.units;
  const int first = warp / d.units * kSpanTiles, last = min(first + kSpanTiles, d.row_tiles);
  if (first >= d.row_tiles) {
    return;
  }
  const MarlinRuns<Bits> runs(threadIdx.x % 32);
  const Place place(d, unit, runs.column_run);
  const bool vectors = d.vectors && place.count == 8 && place.column % 8 == 0;
  T* const out = d.out + expert * d.out_expert + place.column;
  const uint4* const packed = d.packed + expert * d.packed_expert + int64_t{unit} * (Bits * 8);
  Columns<T, Bits> columns;
  uint32_t next[Bits];
  load_unit<Bits>(packed + first * d.packed_row, next);
#pragma unroll 1
  for (int tile = first; tile < last; ++tile) {
    uint32_t words[Bits];
#pragma unroll
    for (int i = 0; i < Bits; ++i) {
      words[i] = next[i];
    }
    if (tile + 1 < last) {
      load_unit<Bits>(packed + (tile + 1) * d.packed_row, next);
    }
    if (tile == first || tile % d.group_tiles == 0) {
      columns.load(d, expert, tile / d.group_tiles, unit, runs.column_run);
    }
    transpose_columns<Bits>(words);
    transpose_tiles<Bits>(words);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      int row = tile * kMarlinStep + runs.row(s);
      if (d.perm != nullptr) {
        row = d.perm[expert * d.perm_expert + row * d.perm_row];
      }
      if (row >= 0 && row < d.in_features && place.count > 0) {
        float weights[8];
        columns.weights(words + s * (Bits / 4), weights);
        store_weights(out + row * d.out_row, weights, place.count, vectors);
      }
    }
  }
}

template <typename T>
void run(const char* op, const Dense<T>& d, int64_t bits, int64_t experts, const Tensor& out) {
  const Grid grid{dim3(narrow(op, "packed", experts * d.expert_blocks)), dim3(kThreads)};
  const Stream stream(op, out);
  if (bits == 4) {
    stream.launch(dequantize<T, 4>, grid, d);
  } else {
    stream.launch(dequantize<T, 8>, grid, d);
  }
}

// [K, N] or [E, K, N], whose rows are contiguous and do not overlap.
void check_out(const char* op, const Tensor& out, int64_t experts, int64_t packed_rows, int64_t columns, bool with_perm,
               bool interleaved) {
  check_activation(op, "out", out);
  const int64_t lead = experts >= 0 ? 1 : 0;
  const bool fits = out.dim() == lead + 2 && (lead == 0 || out.size(0) == experts) &&
                    (with_perm || out.size(lead) <= packed_rows) && out.size(lead + 1) <= columns &&
                    !(interleaved && out.size(lead + 1) % 2 != 0);
  FERRUM_CHECK(fits, op, "out", "expected (", lead_of(experts), "K, N), K up to ", packed_rows, ", N up to ", columns,
               interleaved ? " and even" : "", ", got ", shape_string(out));
  check_last_contiguous(op, "out", out);
  bool apart = out.size(lead) <= 1 || out.stride(lead) >= out.size(lead + 1);
  apart = apart && (lead == 0 || experts <= 1 || out.stride(0) >= out.size(1) * out.stride(1));
  FERRUM_CHECK(out.numel() == 0 || apart, op, "out", "expected rows that do not overlap, got ", stride_string(out));
}

void check_perm_and_offsets(const char* op, const Tensor& out, const std::optional<Tensor>& perm,
                            const std::optional<Tensor>& offsets, int64_t experts, int64_t packed_rows) {
  const int64_t lead = experts >= 0 ? 1 : 0;
  if (perm.has_value()) {
    const bool fits = perm->scalar_type() == ScalarType::Int && perm->dim() == lead + 1 &&
                      perm->size(lead) == packed_rows && (lead == 0 || perm->size(0) == experts);
    FERRUM_CHECK(fits, op, "perm", "expected int32 (", lead_of(experts), packed_rows, "), got ", described(*perm));
    check_device(op, out, {{"perm", *perm}});
  }
  if (offsets.has_value()) {
    const bool fits = offsets->scalar_type() == ScalarType::Int && offsets->dim() == 1 && offsets->is_contiguous() &&
                      experts >= 0 && offsets->size(0) == experts + 1;
    FERRUM_CHECK(fits, op, "expert_offsets", "expected contiguous int32 (E + 1,) for a stack of E matrices, got ",
                 described(*offsets));
    check_device(op, out, {{"expert_offsets", *offsets}});
  }
}

template <typename T>
Dense<T> dense_of(const char* op, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                  const std::optional<Tensor>& perm, const std::optional<Tensor>& offsets, const MarlinArguments& a,
                  bool interleaved, const Tensor& out) {
  const int64_t lead = packed.dim() - 2;
  const auto expert_stride = [lead](const Tensor& t) { return lead == 1 ? t.stride(0) : 0; };
  Dense<T> d{};
  d.packed = reinterpret_cast<const uint4*>(data<int32_t>(packed));
  d.packed_expert = expert_stride(packed) / 4;
  d.packed_row = packed.stride(lead) / 4;
  d.scales = scales.const_data_ptr();
  d.scales_dtype = float_dtype(scales);
  d.scales_expert = expert_stride(scales);
  d.scales_row = scales.stride(lead);
  if (zeros.has_value()) {
    d.zeros = data<int32_t>(*zeros);
    d.zeros_expert = expert_stride(*zeros);
    d.zeros_row = zeros->stride(lead);
  }
  if (perm.has_value()) {
    d.perm = data<int32_t>(*perm);
    d.perm_expert = expert_stride(*perm);
    d.perm_row = perm->stride(lead);
  }
  d.offsets = offsets.has_value() ? data<int32_t>(*offsets) : nullptr;
  d.out = mutable_data<T>(out);
  d.out_expert = expert_stride(out);
  d.out_row = out.stride(lead);
  d.in_features = static_cast<int>(narrow(op, "out", out.size(lead)));
  d.columns = static_cast<int>(narrow(op, "out", out.size(lead + 1)));
  d.row_tiles = static_cast<int>(narrow(op, "packed", a.packed_rows) / kMarlinStep);
  // Without a perm, what lies behind K is not even read.
  d.row_tiles = perm.has_value() ? d.row_tiles : (d.in_features + kMarlinStep - 1) / kMarlinStep;
  const int64_t used =
      interleaved ? 2 * ((d.columns / 2 + kMarlinGateRun - 1) / kMarlinGateRun * kMarlinGateRun) : int64_t{d.columns};
  d.units = static_cast<int>((used + kMarlinUnit - 1) / kMarlinUnit);
  d.spans = (d.row_tiles + kSpanTiles - 1) / kSpanTiles;
  d.group_tiles = a.groups > 1 ? static_cast<int>(a.group_size / kMarlinStep) : INT32_MAX;
  d.one_group = a.groups <= 1;
  d.interleaved = interleaved;
  const int64_t piece = 16 / sizeof(T);
  d.vectors = reinterpret_cast<uintptr_t>(d.out) % 16 == 0 && d.out_row % piece == 0 && d.out_expert % piece == 0;
  d.expert_blocks = static_cast<int>(narrow(op, "packed", (int64_t{d.units} * d.spans + kWarps - 1) / kWarps));
  return d;
}

void marlin_dequantize_out(const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                           const std::optional<Tensor>& perm, const std::optional<Tensor>& expert_offsets,
                           int64_t group_size, int64_t bits, bool interleaved, const Tensor& out) {
  const char* op = "marlin_dequantize_out";
  const int64_t experts = packed.dim() == 3 ? packed.size(0) : -1;
  MarlinArguments a{};
  check_marlin_weights(op, packed, scales, zeros, experts, 0, group_size, bits, a);
  check_out(op, out, experts, a.packed_rows, a.columns, perm.has_value(), interleaved);
  check_perm_and_offsets(op, out, perm, expert_offsets, experts, a.packed_rows);
  check_device(op, out, {{"packed", packed}, {"scales", scales}});
  if (zeros.has_value()) {
    check_device(op, out, {{"zeros", *zeros}});
  }
  if (out.numel() == 0 || a.packed_rows == 0) {
    return;
  }
  for_dtype(activation_dtype(op, "out", out), [&](auto type) {
    using T = decltype(type);
    run(op, dense_of<T>(op, packed, scales, zeros, perm, expert_offsets, a, interleaved, out), bits,
        std::max<int64_t>(experts, 1), out);
  });
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("marlin_dequantize_out", TORCH_BOX(&ferrum::cuda::marlin_dequantize_out));
}
