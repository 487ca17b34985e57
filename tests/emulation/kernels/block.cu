// Small kernels in the ways a block works together. Correct as they stand: test_mutations.py breaks them.
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"

namespace ferrum::cuda {
namespace {

// ---- sum of each row: a tree in dynamic shared memory

__global__ void tree_sum(const float* x, float* out, int64_t size) {
  FERRUM_DYNAMIC_SHARED(float, sums);
  const unsigned thread = threadIdx.x;
  float sum = 0.0f;
  for (int64_t i = thread; i < size; i += blockDim.x) {
    sum += x[blockIdx.x * size + i];
  }
  sums[thread] = sum;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (thread < half) {
      sums[thread] += sums[thread + half];
    }
    __syncthreads();
  }
  if (thread == 0) {
    out[blockIdx.x] = sums[0];
  }
}

Tensor row_sums(const Tensor& x) {
  Tensor out = new_output(x, {x.size(0)});
  const unsigned threads = 128;
  const Grid grid{dim3(static_cast<unsigned>(x.size(0))), dim3(threads), threads * sizeof(float)};
  Stream("row_sums", x).launch(tree_sum, grid, data<float>(x), mutable_data<float>(out), x.size(1));
  return out;
}

// ---- transpose through a tile of static shared memory

constexpr int kTile = 32, kRowsAtOnce = 8;

__global__ void transpose_tile(const float* x, float* out, int64_t rows, int64_t columns) {
  __shared__ float tile[kTile][kTile + 1];
  const int64_t row = blockIdx.y * kTile, column = blockIdx.x * kTile;
  for (int i = threadIdx.y; i < kTile; i += kRowsAtOnce) {
    if (row + i < rows && column + threadIdx.x < columns) {
      tile[i][threadIdx.x] = x[(row + i) * columns + column + threadIdx.x];
    }
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTile; i += kRowsAtOnce) {
    if (column + i < columns && row + threadIdx.x < rows) {
      out[(column + i) * rows + row + threadIdx.x] = tile[threadIdx.x][i];
    }
  }
}

Tensor transpose(const Tensor& x) {
  Tensor out = new_output(x, {x.size(1), x.size(0)});
  const Grid grid{dim3(static_cast<unsigned>((x.size(1) + kTile - 1) / kTile),
                       static_cast<unsigned>((x.size(0) + kTile - 1) / kTile)),
                  dim3(kTile, kRowsAtOnce)};
  Stream("transpose", x).launch(transpose_tile, grid, data<float>(x), mutable_data<float>(out), x.size(0), x.size(1));
  return out;
}

// ---- how often each of `bins` values occurs: atomics in shared memory, then in global memory

__global__ void count_values(const int* x, int* out, int64_t size, int bins) {
  FERRUM_DYNAMIC_SHARED(int, counts);
  for (int i = threadIdx.x; i < bins; i += blockDim.x) {
    counts[i] = 0;
  }
  __syncthreads();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size && x[i] >= 0 && x[i] < bins) {
    atomicAdd(&counts[x[i]], 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += blockDim.x) {
    atomicAdd(&out[i], counts[i]);
  }
}

void histogram_(const Tensor& x, const Tensor& out) {
  const int bins = static_cast<int>(out.size(0));
  const Grid grid{dim3(static_cast<unsigned>((x.size(0) + 63) / 64)), dim3(64), bins * sizeof(int)};
  Stream("histogram_", x).launch(count_values, grid, data<int>(x), mutable_data<int>(out), x.size(0), bins);
}

// ---- running sum of one row: warps scan, then the block; the warp turns its numbers round through shared memory first

__global__ void reversed_running_sum(const int* x, int* out) {
  __shared__ int turned[4][32];
  __shared__ int scratch[4];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  turned[warp][lane] = x[threadIdx.x];
  __syncwarp();
  const int value = turned[warp][31 - lane];
  const RunningSum<int> sum = block_running_sum(value, scratch);
  out[threadIdx.x] = sum.exclusive + value;
}

Tensor reversed_sums(const Tensor& x) {
  Tensor out = new_output(x, x.sizes());
  Stream("reversed_sums", x)
      .launch(reversed_running_sum, Grid{dim3(1), dim3(128)}, data<int>(x), mutable_data<int>(out));
  return out;
}

// ---- sum of everything, blocks in a fixed order: the block that arrives last adds the others' sums

__global__ void sum_by_last_block(const float* x, float* partial, int* arrived, float* out, int64_t size) {
  __shared__ float scratch[2];
  __shared__ bool last;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const float sum = row_sum(i < size ? x[i] : 0.0f, scratch);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(arrived, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned b = 0; b < gridDim.x; ++b) {
      total += partial[b];
    }
    *out = total;
    *arrived = 0;
  }
}

Tensor total(const Tensor& x, const Tensor& workspace) {
  Tensor out = new_output(x, {1});
  const unsigned blocks = static_cast<unsigned>((x.size(0) + 63) / 64);
  Tensor partial = new_output(x, {blocks});
  Stream("total", x)
      .launch(sum_by_last_block, Grid{dim3(blocks), dim3(64)}, data<float>(x), mutable_data<float>(partial),
              mutable_data<int>(workspace), mutable_data<float>(out), x.size(0));
  return out;
}

// ---- the same in whatever order the threads come: what no shipped kernel does

__global__ void add_each(const float* x, float* out, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) {
    atomicAdd(out, x[i]);
  }
}

void unordered_total_(const Tensor& x, const Tensor& out) {
  const Grid grid{dim3(static_cast<unsigned>((x.size(0) + 63) / 64)), dim3(64)};
  Stream("unordered_total_", x).launch(add_each, grid, data<float>(x), mutable_data<float>(out), x.size(0));
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(FERRUM_NAMESPACE, m) {
  m.def("histogram_(Tensor x, Tensor(a!) out) -> ()");
  m.def("reversed_sums(Tensor x) -> Tensor");
  m.def("row_sums(Tensor x) -> Tensor");
  m.def("total(Tensor x, Tensor(a!) workspace) -> Tensor");
  m.def("transpose(Tensor x) -> Tensor");
  m.def("unordered_total_(Tensor x, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("histogram_", TORCH_BOX(&ferrum::cuda::histogram_));
  m.impl("reversed_sums", TORCH_BOX(&ferrum::cuda::reversed_sums));
  m.impl("row_sums", TORCH_BOX(&ferrum::cuda::row_sums));
  m.impl("total", TORCH_BOX(&ferrum::cuda::total));
  m.impl("transpose", TORCH_BOX(&ferrum::cuda::transpose));
  m.impl("unordered_total_", TORCH_BOX(&ferrum::cuda::unordered_total_));
}
