// Weighted sums of the rows of each token, in float32 and ascending slot order, whatever the launch.
//
// Floor: T*K rows read (those of skipped pairs are not), T rows written; a residual adds one read, its norm one write.
#include <torch/csrc/stable/library.h>

#include "checks/moe_combine.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace ferrum::cuda {
namespace {

constexpr int kNormThreads = 512;  // what the registers of a thread allow without spills

// Element strides. `residual` is null where the sums themselves are the output.
template <typename T>
struct Sums {
  const T* rows;
  const int32_t* pairs;  // row of each pair, skipped outside [0, num_rows); null: rows are those of the token's slots
  const float* weights;  // [tokens, top_k]
  const T* residual;
  T* out;
  int64_t token_stride, row_stride;  // a row is a slot where there are no pairs
  int64_t out_stride;                // of residual as well
  int64_t tokens, num_rows, size;
  int top_k;
};

// Columns [column, column + N) of a token's sum, with the loads of kAhead slots in flight at once.
template <int kAhead, int N, typename T>
__device__ __forceinline__ void sum_slots(const Sums<T>& sums, int64_t token, int64_t column, float (&total)[N]) {
  const T* const rows = sums.rows + (sums.pairs == nullptr ? token * sums.token_stride : 0) + column;
  const int32_t* const pairs = sums.pairs == nullptr ? nullptr : sums.pairs + token * sums.top_k;
  const float* const slot_weights = sums.weights + token * sums.top_k;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    total[i] = 0.0f;
  }
  for (int first = 0; first < sums.top_k; first += kAhead) {
    Vec<T, N> values[kAhead];
    float weights[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      // A slot without a row adds 0 * 0, which leaves every total as it is (but makes 0 of a -0).
      values[j] = {};
      weights[j] = 0.0f;
      const int slot = first + j;
      if (slot < sums.top_k) {
        const int row = pairs == nullptr ? slot : pairs[slot];
        if (row >= 0 && row < sums.num_rows) {
          values[j] = *reinterpret_cast<const Vec<T, N>*>(rows + row * sums.row_stride);
          weights[j] = slot_weights[slot];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total[i] = fmaf(weights[j], to_float(values[j].values[i]), total[i]);
      }
    }
  }
  if (sums.residual != nullptr) {
    float residual[N];
    load<N>(sums.residual + token * sums.out_stride + column, residual);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      total[i] = residual[i] + total[i];
    }
  }
}

// One thread per N columns of a token; `tiles` blocks per token.
template <typename T, int N>
__global__ void __launch_bounds__(128) sum_rows(Sums<T> sums, unsigned tiles) {
  const int64_t token = blockIdx.x / tiles;
  const int64_t column = (static_cast<int64_t>(blockIdx.x % tiles) * blockDim.x + threadIdx.x) * N;
  if (column < sums.size) {
    float total[N];
    sum_slots<8>(sums, token, column, total);
    store(sums.out + token * sums.out_stride + column, total);
  }
}

// One block per token. The unrounded sums of a thread's first columns stay in its registers between the two passes; of
// rows longer than 512 vectors the rest is summed again, from the caches.
template <typename T, typename W, int N>
__global__ void __launch_bounds__(kNormThreads) sum_norm_rows(Sums<T> sums, const W* weight, T* normed, float eps) {
  __shared__ float scratch[kNormThreads / 32];
  const int64_t token = blockIdx.x, first = threadIdx.x * N, step = blockDim.x * N;
  float kept[N];
  float squares = 0.0f;
  for (int64_t column = first; column < sums.size; column += step) {
    float total[N];
    sum_slots<4>(sums, token, column, total);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      squares += total[i] * total[i];
      kept[i] = column == first ? total[i] : kept[i];
    }
  }
  const float inverse = rsqrtf(row_sum(squares, scratch) / static_cast<float>(sums.size) + eps);
  for (int64_t column = first; column < sums.size; column += step) {
    float total[N], scale[N];
    if (column == first) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total[i] = kept[i];
      }
    } else {
      sum_slots<4>(sums, token, column, total);
    }
    store(sums.out + token * sums.out_stride + column, total);
    load<N>(weight + column, scale);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      total[i] = total[i] * inverse * scale[i];
    }
    store(normed + token * sums.size + column, total);
  }
}

template <typename T>
Sums<T> sums_of(const SumArguments& a, const Tensor& rows, const Tensor& weights) {
  Sums<T> sums{};  // over slots
  sums.token_stride = a.token_stride;
  sums.row_stride = a.slot_stride;
  sums.num_rows = a.top_k;
  sums.rows = data<T>(rows);
  sums.weights = data<float>(weights);
  sums.out_stride = a.size;
  sums.tokens = a.tokens;
  sums.top_k = static_cast<int>(a.top_k);
  sums.size = a.size;
  return sums;
}

template <int N, typename T>
bool all_vectorize(const Sums<T>& s) {
  return can_vectorize<N, T>(s.rows, s.row_stride, s.size) && s.token_stride % N == 0 &&
         can_vectorize<N, T>(s.out, s.out_stride, s.size);
}

// Threads of a block, at most 128, so that a single token of 2048 columns is spread over several multiprocessors.
constexpr unsigned pick_sum_threads(int64_t vectors) {
  return vectors >= 128 ? 128 : 32 * static_cast<unsigned>(vectors / 32 + (vectors % 32 != 0));
}
static_assert(pick_sum_threads(1) == 32 && pick_sum_threads(33) == 64 && pick_sum_threads(256) == 128);

template <typename T>
void launch_sums(const Stream& stream, const Sums<T>& sums) {
  constexpr int N = 16 / sizeof(T);
  if (sums.size == 0) {
    return;
  }
  const bool vectors = all_vectorize<N>(sums);
  const int64_t count = vectors ? sums.size / N : sums.size;
  const unsigned threads = pick_sum_threads(count);
  const unsigned tiles = static_cast<unsigned>((count + threads - 1) / threads);
  stream.launch(vectors ? sum_rows<T, N> : sum_rows<T, 1>,
                Grid{dim3(static_cast<unsigned>(sums.tokens * tiles)), dim3(threads)}, sums, tiles);
}

// A whole row for one block: its sum of squares is needed before anything can be written.
constexpr unsigned pick_norm_threads(int64_t vectors) {
  return vectors >= kNormThreads ? kNormThreads : 32 * static_cast<unsigned>(vectors / 32 + (vectors % 32 != 0));
}
static_assert(pick_norm_threads(1) == 32 && pick_norm_threads(256) == 256 && pick_norm_threads(5000) == kNormThreads);

template <typename T, typename W>
void launch_norms(const Stream& stream, const Sums<T>& sums, const Tensor& weight, const Tensor& out, double eps) {
  constexpr int N = 16 / sizeof(T);
  if (sums.size == 0) {
    return;
  }
  const bool vectors = all_vectorize<N>(sums) && can_vectorize<N, W>(weight.const_data_ptr(), 0, sums.size) &&
                       can_vectorize<N, T>(out.const_data_ptr(), sums.size, sums.size);
  const Grid grid{dim3(static_cast<unsigned>(sums.tokens)),
                  dim3(pick_norm_threads(vectors ? sums.size / N : sums.size))};
  stream.launch(vectors ? sum_norm_rows<T, W, N> : sum_norm_rows<T, W, 1>, grid, sums, data<W>(weight),
                mutable_data<T>(out), static_cast<float>(eps));
}

Tensor moe_combine(const Tensor& packed, const Tensor& pairs_by_token, const Tensor& topk_weights) {
  const char* op = "moe_combine";
  const SumArguments a = check_combine(packed, pairs_by_token, topk_weights);
  check_device(op, packed, {{"pairs_by_token", pairs_by_token}, {"topk_weights", topk_weights}});
  Tensor out = new_output(packed, {a.tokens, a.size});
  const Stream stream(op, packed);
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    Sums<T> sums = sums_of<T>(a, packed, topk_weights);
    sums.pairs = data<int32_t>(pairs_by_token);
    sums.num_rows = a.num_rows;
    sums.row_stride = a.row_stride;
    sums.out = mutable_data<T>(out);
    launch_sums(stream, sums);
  });
  return out;
}

Tensor weighted_sum(const Tensor& slots, const Tensor& weights) {
  const char* op = "weighted_sum";
  const SumArguments a = check_slots(op, slots, weights);
  check_device(op, slots, {{"weights", weights}});
  Tensor out = new_output(slots, {a.tokens, a.size});
  const Stream stream(op, slots);
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    Sums<T> sums = sums_of<T>(a, slots, weights);
    sums.out = mutable_data<T>(out);
    launch_sums(stream, sums);
  });
  return out;
}

template <typename T>
Sums<T> sums_into(const Tensor& residual, const SumArguments& a, const Tensor& slots, const Tensor& weights) {
  Sums<T> sums = sums_of<T>(a, slots, weights);
  sums.out = mutable_data<T>(residual);
  sums.residual = sums.out;
  sums.out_stride = residual.stride(0);
  return sums;
}

void weighted_sum_residual_(const Tensor& residual, const Tensor& slots, const Tensor& weights) {
  const char* op = "weighted_sum_residual_";
  const SumArguments a = check_slots(op, slots, weights);
  check_sum_residual(op, residual, slots, a);
  check_device(op, residual, {{"slots", slots}, {"weights", weights}});
  const Stream stream(op, residual);
  for_dtype(a.dtype, [&](auto type) { launch_sums(stream, sums_into<decltype(type)>(residual, a, slots, weights)); });
}

void weighted_sum_residual_norm_(const Tensor& residual, const Tensor& slots, const Tensor& weights,
                                 const Tensor& norm_weight, const Tensor& out, double eps) {
  const char* op = "weighted_sum_residual_norm_";
  const SumArguments a = check_slots(op, slots, weights);
  check_sum_residual(op, residual, slots, a);
  const bool float_weight = check_sum_norm(op, residual, slots, norm_weight, out, a);
  check_device(op, residual, {{"slots", slots}, {"weights", weights}, {"norm_weight", norm_weight}, {"out", out}});
  const Stream stream(op, residual);
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Sums<T> sums = sums_into<T>(residual, a, slots, weights);
    float_weight ? launch_norms<T, float>(stream, sums, norm_weight, out, eps)
                 : launch_norms<T, T>(stream, sums, norm_weight, out, eps);
  });
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("moe_combine", TORCH_BOX(&ferrum::cuda::moe_combine));
  m.impl("weighted_sum", TORCH_BOX(&ferrum::cuda::weighted_sum));
  m.impl("weighted_sum_residual_", TORCH_BOX(&ferrum::cuda::weighted_sum_residual_));
  m.impl("weighted_sum_residual_norm_", TORCH_BOX(&ferrum::cuda::weighted_sum_residual_norm_));
}
