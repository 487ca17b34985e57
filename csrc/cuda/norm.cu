// rms_norm and its fusion with the residual addition: every byte is read once (what does not fit in registers a second
// time, from L1) and written once.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "checks/norm.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace ferrum::cuda {
namespace {

constexpr int kMaxWarps = 32;

// Element strides. Without a residual both of its pointers are null. An output may be the input of the same name: each
// thread writes only what it alone has read.
template <typename T>
struct Rows {
  const T* x;
  const T* residual;
  const void* weight;
  T* out;
  T* residual_out;
  int64_t x_stride, residual_stride, out_stride, residual_out_stride;
  int64_t count;
  int size;
  float eps;
};

template <int N, typename T>
__device__ __forceinline__ void load_sum(const Rows<T>& rows, int64_t row, int column, float (&sum)[N]) {
  load<N>(rows.x + row * rows.x_stride + column, sum);
  if (rows.residual != nullptr) {
    float residual[N];
    load<N>(rows.residual + row * rows.residual_stride + column, residual);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[i] += residual[i];
    }
  }
}

template <int N>
__device__ __forceinline__ float sum_of_squares(const float (&x)[N]) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    squares += x[i] * x[i];
  }
  return squares;
}

template <typename T, typename W, int N>
__global__ void __launch_bounds__(1024) norm_rows(Rows<T> rows) {
  __shared__ float scratch[kMaxWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool inside = row < rows.count;  // no early return: every thread reaches the barrier
  const int first = threadIdx.x * N, step = blockDim.x * N;
  const W* const weights = static_cast<const W*>(rows.weight);
  // The first vector of a thread stays in registers: all it has of a row of up to 1024 vectors. Its weights are asked
  // for together with it, so that nothing but the sum lies between one trip to memory and the result.
  Vec<W, N> weight;
  float sum[N];
  float squares = 0.0f;
  if (inside && first < rows.size) {
    weight = *reinterpret_cast<const Vec<W, N>*>(weights + first);
    load_sum(rows, row, first, sum);
    squares = sum_of_squares(sum);
#pragma unroll 1
    for (int column = first + step; column < rows.size; column += step) {
      float more[N];
      load_sum(rows, row, column, more);
      squares += sum_of_squares(more);
    }
  }
  const float inverse = rsqrtf(row_sum(squares, scratch) / static_cast<float>(rows.size) + rows.eps);
  if (!inside) {
    return;
  }
#pragma unroll 1
  for (int column = first; column < rows.size; column += step) {
    if (column != first) {
      weight = *reinterpret_cast<const Vec<W, N>*>(weights + column);
      load_sum(rows, row, column, sum);
    }
    if (rows.residual != nullptr) {
      store(rows.residual_out + row * rows.residual_out_stride + column, sum);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[i] = sum[i] * inverse * to_float(weight.values[i]);
    }
    store(rows.out + row * rows.out_stride + column, sum);
  }
}

// Threads for one row, a multiple of a warp, and as many rows in a block as make 128 threads of short ones.
struct NormConfig {
  unsigned threads, rows;
};

constexpr NormConfig pick_norm_config(int64_t vectors) {
  const unsigned warps = vectors >= 32 * kMaxWarps ? kMaxWarps : static_cast<unsigned>((vectors + 31) / 32);
  const unsigned threads = 32 * (warps == 0 ? 1 : warps);
  return {threads, threads >= 128 ? 1 : 128 / threads};
}
static_assert(pick_norm_config(1).threads == 32 && pick_norm_config(1).rows == 4);
static_assert(pick_norm_config(256).threads == 256 && pick_norm_config(256).rows == 1);
static_assert(pick_norm_config(1 << 20).threads == 1024);

template <int N, typename T, typename W>
bool all_vectorize(const Rows<T>& r) {
  return can_vectorize<N, T>(r.x, r.x_stride, r.size) && can_vectorize<N, T>(r.out, r.out_stride, r.size) &&
         can_vectorize<N, W>(r.weight, 0, r.size) && can_vectorize<N, T>(r.residual, r.residual_stride, r.size) &&
         can_vectorize<N, T>(r.residual_out, r.residual_out_stride, r.size);
}

template <typename T, typename W>
void launch_rows(const char* op, const Tensor& on, const Rows<T>& rows) {
  constexpr int N = 16 / sizeof(T);
  const bool vectors = all_vectorize<N, T, W>(rows);
  const NormConfig config = pick_norm_config(vectors ? rows.size / N : rows.size);
  const Grid grid{dim3(narrow(op, "x", (rows.count + config.rows - 1) / config.rows)),
                  dim3(config.threads, config.rows)};
  Stream(op, on).launch(vectors ? norm_rows<T, W, N> : norm_rows<T, W, 1>, grid, rows);
}

void run(const char* op, const NormArguments& a, const Tensor& out, int64_t out_stride, const Tensor* residual_out,
         int64_t residual_out_stride) {
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    Rows<T> rows{};
    rows.x = data<T>(a.x);
    rows.x_stride = a.x_rows.stride;
    rows.weight = a.weight.const_data_ptr();
    rows.out = mutable_data<T>(out);
    rows.out_stride = out_stride;
    if (a.residual != nullptr) {
      rows.residual = data<T>(*a.residual);
      rows.residual_stride = a.residual_rows.stride;
      rows.residual_out = mutable_data<T>(*residual_out);
      rows.residual_out_stride = residual_out_stride;
    }
    rows.count = a.x_rows.rows;
    rows.size = static_cast<int>(narrow(op, "x", a.x_rows.size));
    rows.eps = a.eps;
    a.float_weight ? launch_rows<T, float>(op, a.x, rows) : launch_rows<T, T>(op, a.x, rows);
  });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const char* op = "rms_norm";
  const NormArguments a = check_norm(op, x, nullptr, weight, eps);
  check_device(op, x, {{"weight", weight}});
  Tensor out = new_output(x, x.sizes());
  run(op, a, out, a.x_rows.size, nullptr, 0);
  return out;
}

std::tuple<Tensor, Tensor> fused_add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                              double eps) {
  const char* op = "fused_add_rms_norm";
  const NormArguments a = check_norm(op, x, &residual, weight, eps);
  check_device(op, x, {{"residual", residual}, {"weight", weight}});
  Tensor out = new_output(x, x.sizes());
  Tensor sum = new_output(x, x.sizes());
  run(op, a, out, a.x_rows.size, &sum, a.x_rows.size);
  return {out, sum};
}

void fused_add_rms_norm_(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const char* op = "fused_add_rms_norm_";
  const NormArguments a = check_norm(op, x, &residual, weight, eps);
  check_norm_in_place(op, a);
  check_device(op, x, {{"residual", residual}, {"weight", weight}});
  run(op, a, x, a.x_rows.stride, &residual, a.residual_rows.stride);
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("fused_add_rms_norm", TORCH_BOX(&ferrum::cuda::fused_add_rms_norm));
  m.impl("fused_add_rms_norm_", TORCH_BOX(&ferrum::cuda::fused_add_rms_norm_));
  m.impl("rms_norm", TORCH_BOX(&ferrum::cuda::rms_norm));
}
