// gather_columns. (The other ops of the family are a line of ATen.)
//
// Floor: x read and the output written once. Rows are staged in shared memory: a warp that reads 32 columns of device
// memory in any order moves 32 bytes for each of them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks/rows.h"
#include "cuda/heads.cuh"
#include "cuda/vec.cuh"

namespace ferrum::cuda {
namespace {

// A block takes `rows` rows, which read each entry of the permutation once, and one of `chunks` parts of their columns.
struct GatherConfig {
  int rows;
  unsigned chunks;
  bool staged;  // else the rows are too long for shared memory
};

constexpr int kGatherThreads = 256;
constexpr int kMostRows = 4;
constexpr int64_t kRowsBytes = 32 * 1024;  // of several rows, for two thirds of the threads an SM can have
constexpr int64_t kLongRowBytes = kMostSharedBytes;

// Rows are shared by a block where that leaves four blocks for each of 132 SMs; few rows are cut in columns.
constexpr GatherConfig pick_gather_config(int64_t rows, int64_t row_bytes, int64_t stores) {
  int64_t together = 1;
  while (together < kMostRows && rows >= together * 2 * 4 * 132 && together * 2 * row_bytes <= kRowsBytes) {
    together *= 2;
  }
  const int64_t blocks = (rows + together - 1) / together, parts = (stores + kGatherThreads - 1) / kGatherThreads;
  const int64_t wanted = blocks < 132 ? 132 / (blocks > 0 ? blocks : 1) : 1;
  return {static_cast<int>(together), static_cast<unsigned>(parts < wanted ? parts : wanted),
          row_bytes <= kLongRowBytes};
}
constexpr bool gathers(int64_t rows, int64_t row_bytes, int64_t stores, GatherConfig expected) {
  const GatherConfig config = pick_gather_config(rows, row_bytes, stores);
  return config.rows == expected.rows && config.chunks == expected.chunks && config.staged == expected.staged;
}
static_assert(gathers(1, 4096, 1024, {1, 4, true}), "one token, 2048 columns of bf16");
static_assert(gathers(4096, 4096, 1024, {4, 1, true}) && gathers(4096, 16384, 4096, {2, 1, true}));
static_assert(gathers(32, 98304, 1 << 15, {1, 4, true}) && gathers(32, 98312, 1 << 15, {1, 4, false}));

// T has the size of an element; what it is does not matter.
template <typename T>
struct GatherArguments {
  const T* x;     // [rows, columns]
  T* out;         // [rows, chosen]
  Integers perm;  // [chosen]
  int64_t rows, stride, columns, chosen;
  int64_t pitch;  // of a staged row: whole 16 bytes
  int block_rows;
  bool staged, vectors;  // rows of x can be read as vectors of 16 bytes
};

template <typename T>
__device__ __forceinline__ void stage_row(const T* from, T* to, int64_t columns, bool vectors) {
  constexpr int N = 16 / sizeof(T);
  if (vectors) {
    for (int64_t i = threadIdx.x; i < columns / N; i += blockDim.x) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
    for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) {
      to[i] = from[i];
    }
  }
}

// Each thread stores N neighbours at once.
template <typename T, int N>
__global__ void __launch_bounds__(kGatherThreads) gather(const GatherArguments<T> a) {
  FERRUM_DYNAMIC_SHARED(T, stage);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.block_rows;
  const int rows = static_cast<int>(min(a.rows - first, static_cast<int64_t>(a.block_rows)));
  const T* const x = a.x + first * a.stride;
  if (a.staged) {
    for (int row = 0; row < rows; ++row) {
      stage_row(x + row * a.stride, stage + row * a.pitch, a.columns, a.vectors);
    }
    __syncthreads();
  }
  const T* const source = a.staged ? stage : x;
  const int64_t stride = a.staged ? a.pitch : a.stride, step = static_cast<int64_t>(gridDim.y) * blockDim.x * N;
  for (int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N; column < a.chosen;
       column += step) {
    int64_t from[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      from[i] = integer_at(a.perm, column + i);
      if (from[i] < 0 || from[i] >= a.columns) {
        __trap();  // as ATen's assertion does: never a silent read
      }
    }
    for (int row = 0; row < rows; ++row) {
      Vec<T, N> values;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        values.values[i] = source[row * stride + from[i]];
      }
      *reinterpret_cast<Vec<T, N>*>(a.out + (first + row) * a.chosen + column) = values;
    }
  }
}

template <typename T>
void launch_gather(const char* op, const Tensor& x, const RowLayout& layout, const Integers& perm, const Tensor& out) {
  constexpr int N = sizeof(T) < 4 ? 4 / sizeof(T) : 1, kVector = 16 / sizeof(T);
  const int64_t chosen = out.size(out.dim() - 1), pitch = (layout.size + kVector - 1) / kVector * kVector;
  const bool pairs = chosen % N == 0;
  const GatherConfig config = pick_gather_config(layout.rows, pitch * sizeof(T), chosen / (pairs ? N : 1));
  GatherArguments<T> a{data<T>(x), mutable_data<T>(out), perm,          layout.rows, layout.stride, layout.size, chosen,
                       pitch,      config.rows,          config.staged, false};
  a.vectors = can_vectorize<kVector, T>(a.x, a.stride, a.columns);
  const int64_t blocks = (layout.rows + config.rows - 1) / config.rows;
  const Grid grid{dim3(narrow(op, "rows", blocks), config.chunks), dim3(kGatherThreads),
                  config.staged ? config.rows * pitch * sizeof(T) : 0};
  Stream(op, x).launch(pairs ? gather<T, N> : gather<T, 1>, grid, a);
}

Tensor gather_columns(const Tensor& given, const Tensor& order) {
  const char* op = "gather_columns";
  FERRUM_CHECK(given.dim() >= 1, op, "x", "expected at least 1 dimension, got 0");
  FERRUM_CHECK(order.dim() == 1, op, "perm", "expected shape (columns,), got ", shape_string(order));
  check_device(op, given, {{"perm", order}});
  // Models have rows with one stride; ATen's line takes any strides, so this does.
  const Tensor x = find_rows(given).has_value() ? given : torch::stable::contiguous(given);
  const Tensor perm = order.is_contiguous() ? order : torch::stable::contiguous(order);
  const Integers indices = check_integers(op, "perm", perm, perm.numel());
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = perm.numel();
  Tensor out = new_output(x, shape);
  if (out.numel() == 0) {
    return out;
  }
  const RowLayout layout = row_layout(op, "x", x);
  switch (x.element_size()) {
    case 1:
      launch_gather<uint8_t>(op, x, layout, indices, out);
      break;
    case 2:
      launch_gather<uint16_t>(op, x, layout, indices, out);
      break;
    case 4:
      launch_gather<uint32_t>(op, x, layout, indices, out);
      break;
    case 8:
      launch_gather<uint2>(op, x, layout, indices, out);
      break;
    default:
      launch_gather<uint4>(op, x, layout, indices, out);
  }
  return out;
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("gather_columns", TORCH_BOX(&ferrum::cuda::gather_columns));
}
