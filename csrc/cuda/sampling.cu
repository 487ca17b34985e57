// Greedy choice and repetition penalty on rows of logits.
//
// Floor of argmax_rows: T*n logits (and n or T*n mask bytes) read once; at T = 1, two launches. Of repetition_penalty_:
// L ids read once for each 16384 columns, a sector of 32 bytes read and written for each distinct id.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>

#include "checks/sampling.h"
#include "cuda/order.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace ferrum::cuda {
namespace {

// ---- argmax_rows
//
// A column stands as one number, larger the better: its value's rank above, the complement of its index below. So the
// largest of any set, in any order, is the lowest index of its largest value.

constexpr uint32_t kNotFinite = 1;  // allowed, and below every finite value; 0 is for columns that are not allowed
constexpr int kArgmaxThreads = 256;

using Packed = unsigned long long;
constexpr Packed kNone = 0;  // packed from no column

template <typename T>
struct Logits {
  const T* logits;
  const uint8_t* mask;  // null: all are allowed
  int64_t stride, mask_stride;
  uint32_t size, span;  // columns of a row and of one block
};

__device__ __forceinline__ int64_t index_of(Packed best) {
  return best == kNone ? -1 : static_cast<int64_t>(~static_cast<uint32_t>(best));
}

// Block (span, row). One span writes the index, more of them their candidates [rows, spans].
template <typename T, int N>
__global__ void __launch_bounds__(kArgmaxThreads)
    argmax_spans(Logits<T> rows, uint32_t spans, Packed* candidates, int64_t* indices) {
  __shared__ Packed scratch[kArgmaxThreads / 32];
  const int64_t row = blockIdx.x / spans;
  const uint32_t begin = blockIdx.x % spans * rows.span;
  const uint32_t end = rows.size - begin < rows.span ? rows.size : begin + rows.span;
  const T* const logits = rows.logits + row * rows.stride;
  const uint8_t* const mask = rows.mask == nullptr ? nullptr : rows.mask + row * rows.mask_stride;
  uint32_t best = 0, index = 0;
#pragma unroll 4
  for (uint64_t i = begin + threadIdx.x * N; i < end; i += kArgmaxThreads * N) {
    float values[N];
    load<N>(logits + i, values);
    Vec<uint8_t, N> allowed;
    if (mask != nullptr) {
      allowed = *reinterpret_cast<const Vec<uint8_t, N>*>(mask + i);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const bool finite = fabsf(values[k]) <= kLargestFloat;
      const uint32_t key = mask != nullptr && allowed.values[k] == 0 ? 0 : finite ? ordered(values[k]) : kNotFinite;
      if (key > best) {  // columns come in ascending order
        best = key;
        index = static_cast<uint32_t>(i + k);
      }
    }
  }
  const Packed own = best == 0 ? kNone : static_cast<Packed>(best) << 32 | static_cast<uint32_t>(~index);
  const Packed largest = row_max(own, scratch);
  if (threadIdx.x == 0 && spans == 1) {
    indices[row] = index_of(largest);
  } else if (threadIdx.x == 0) {
    candidates[blockIdx.x] = largest;
  }
}

// One warp per row.
__global__ void __launch_bounds__(32) argmax_candidates(const Packed* candidates, uint32_t spans, int64_t* indices) {
  const Packed* const row = candidates + static_cast<int64_t>(blockIdx.x) * spans;
  Packed largest = kNone;
  for (uint32_t i = threadIdx.x; i < spans; i += 32) {
    largest = max(largest, row[i]);
  }
  largest = warp_max(largest);
  if (threadIdx.x == 0) {
    indices[blockIdx.x] = index_of(largest);
  }
}

// Columns of one block. A row is cut where the rows alone would leave multiprocessors idle: into pieces of at least
// 2048 columns (one 16-byte load per thread, in flight all at once), about two blocks for each of 132.
constexpr int64_t pick_argmax_span(int64_t rows, int64_t size) {
  constexpr int64_t kSmallest = 2048, kBlocks = 264;
  const int64_t spans = rows >= kBlocks ? 1 : kBlocks / (rows < 1 ? 1 : rows);
  const int64_t columns = (size + spans - 1) / spans;
  return (columns + kSmallest - 1) / kSmallest * kSmallest;
}
static_assert(pick_argmax_span(1, 151936) == 2048);  // 75 blocks
static_assert(pick_argmax_span(32, 151936) == 20480);
static_assert(pick_argmax_span(264, 151936) >= 151936 && pick_argmax_span(1, 1) == 2048);

Tensor argmax_rows(const Tensor& logits, const std::optional<Tensor>& mask) {
  const char* op = "argmax_rows";
  const LogitArguments a = check_argmax(logits, mask);
  // Packed indices have 32 bits; one less keeps a sum of a span below the limit.
  constexpr int64_t kMaxColumns = std::numeric_limits<int32_t>::max();
  FERRUM_CHECK(a.size <= kMaxColumns, op, "logits", "expected at most ", kMaxColumns, " columns, got ", a.size);
  if (mask.has_value()) {
    check_device(op, logits, {{"mask", *mask}});
  }
  Tensor out = new_output(logits, {a.tokens}, ScalarType::Long);
  const int64_t span = pick_argmax_span(a.tokens, a.size);
  const int64_t spans = (a.size + span - 1) / span;
  Tensor candidates = new_output(logits, {spans > 1 ? a.tokens * spans : 0}, ScalarType::Long);
  Packed* const found = reinterpret_cast<Packed*>(mutable_data<int64_t>(candidates));
  int64_t* const indices = mutable_data<int64_t>(out);
  const Stream stream(op, logits);
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = 16 / sizeof(T);
    const bool vectors = can_vectorize<N, T>(logits.const_data_ptr(), a.stride, a.size) &&
                         can_vectorize<N, uint8_t>(a.mask, a.mask_stride, a.size);
    const Logits<T> rows{
        data<T>(logits), a.mask, a.stride, a.mask_stride, static_cast<uint32_t>(a.size), static_cast<uint32_t>(span)};
    const Grid grid{dim3(static_cast<unsigned>(a.tokens * spans)), dim3(kArgmaxThreads)};
    stream.launch(vectors ? argmax_spans<T, N> : argmax_spans<T, 1>, grid, rows, spans, found, indices);
  });
  if (spans > 1) {
    stream.launch(argmax_candidates, Grid{dim3(static_cast<unsigned>(a.tokens)), dim3(32)}, found, spans, indices);
  }
  return out;
}

// ---- repetition_penalty_
//
// A block marks the listed ids of its columns as bits in shared memory, then changes every marked column once: however
// often an id is listed, and whatever the offsets are, each element has one thread that reads and writes it.

constexpr int kPenaltyColumns = 16384, kPenaltyThreads = 256;

struct Integers {
  const void* values;
  bool wide;  // int64, else int32

  __device__ __forceinline__ int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
  }
};

template <typename T>
struct Penalties {
  T* logits;
  const float* penalties;
  Integers ids, offsets;
  int64_t listed;        // length of ids
  int64_t size, stride;  // of a row
  int64_t windows;       // blocks of a row
};

template <typename T>
__global__ void __launch_bounds__(kPenaltyThreads) penalize(Penalties<T> p) {
  __shared__ uint32_t marks[kPenaltyColumns / 32];
  const int64_t row = blockIdx.x / p.windows, first = blockIdx.x % p.windows * kPenaltyColumns;
  const float penalty = p.penalties[row];
  if (!(penalty > 0.0f) || penalty == 1.0f || !(penalty <= kLargestFloat)) {
    return;  // the whole block
  }
  for (int word = static_cast<int>(threadIdx.x); word < kPenaltyColumns / 32; word += kPenaltyThreads) {
    marks[word] = 0;
  }
  __syncthreads();
  const int64_t last = min(first + kPenaltyColumns, p.size);
  const int64_t begin = max(p.offsets.at(row), int64_t{0}), end = min(p.offsets.at(row + 1), p.listed);
  for (int64_t i = begin + threadIdx.x; i < end; i += kPenaltyThreads) {
    const int64_t id = p.ids.at(i);
    if (id >= first && id < last) {
      const uint32_t column = static_cast<uint32_t>(id - first);
      atomicOr(&marks[column / 32], 1u << column % 32);
    }
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int word = static_cast<int>(threadIdx.x / 32); word < kPenaltyColumns / 32; word += kPenaltyThreads / 32) {
    if ((marks[word] >> lane & 1u) == 0) {
      continue;
    }
    T* const at = p.logits + row * p.stride + first + word * 32 + lane;
    const float value = to_float(*at);
    if (fabsf(value) <= kLargestFloat) {
      *at = from_float<T>(value > 0.0f ? value / penalty : value * penalty);
    }
  }
}

void repetition_penalty_(const Tensor& logits, const Tensor& ids, const Tensor& offsets, const Tensor& penalty) {
  const char* op = "repetition_penalty_";
  const LogitArguments a = check_penalty(logits, ids, offsets, penalty);
  check_device(op, logits, {{"ids", ids}, {"offsets", offsets}, {"penalty", penalty}});
  const auto integers = [](const Tensor& t) {
    return Integers{t.const_data_ptr(), t.scalar_type() == ScalarType::Long};
  };
  const int64_t windows = (a.size + kPenaltyColumns - 1) / kPenaltyColumns;
  const Stream stream(op, logits);
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Penalties<T> p{mutable_data<T>(logits),
                         data<float>(penalty),
                         integers(ids),
                         integers(offsets),
                         ids.numel(),
                         a.size,
                         a.stride,
                         windows};
    stream.launch(penalize<T>, Grid{dim3(static_cast<unsigned>(a.tokens * windows)), dim3(kPenaltyThreads)}, p);
  });
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("argmax_rows", TORCH_BOX(&ferrum::cuda::argmax_rows));
  m.impl("repetition_penalty_", TORCH_BOX(&ferrum::cuda::repetition_penalty_));
}
