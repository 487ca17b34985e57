// Kernels that go wrong, each in its own way: test_faults.py has their names.
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "cuda/ptx.cuh"

namespace ferrum::cuda {
namespace {

int overflow_the_stack(volatile int* x, int depth) {
  volatile int locals[256];
  locals[depth % 256] = x[0];
  return depth == 0 ? 0 : overflow_the_stack(x, depth - 1) + locals[depth % 256];
}

__global__ void misbehave(int* x, int64_t size, int kind, int zero) {
  const unsigned thread = threadIdx.x;
  switch (kind) {
    case 0:  // deadlock
      if (thread == 0) {
        __syncwarp(3);
      }
      __syncthreads();
      break;
    case 1:  // barrier with lanes that have exited
      if (thread % 32 < 5) {
        return;
      }
      __syncthreads();
      break;
    case 2:  // livelock
      while (atomicCAS(x, 1, 2) != 1) {
      }
      break;
    case 3:
      x[1] = overflow_the_stack(x, 1000);
      break;
    case 4:
      throw std::runtime_error("thrown in a kernel");
    case 5:  // into the padding behind the tensor
      x[size] = 1;
      break;
    case 6:
      x[size + 4096] = 1;
      break;
    case 7:
      *reinterpret_cast<int*>(static_cast<intptr_t>(zero)) = 1;
      break;
    case 8:
      x[0] = x[1] << (32 + zero);
      break;
    case 9:
      x[0] = x[1] / zero;
      break;
    case 10:
      x[0] = static_cast<int>(3e9f + static_cast<float>(zero));
      break;
    case 11:
      x[0] = reinterpret_cast<const int2*>(x + 1)->y;
      break;
    case 12: {
      FERRUM_DYNAMIC_SHARED(int, shared);
      shared[8 + zero] = 1;
      break;
    }
    default:
      x[thread] = static_cast<int>(thread);
  }
}

__global__ void start_early(int* x, int kind) {
  const unsigned thread = threadIdx.x;
  const int guess = load_guess(x);
  prefetch_to_l2(x, kind == 1 ? 4096 : 16);
  const int early = kind == 2 ? x[0] : 0;
  if (kind == 3 && thread >= 32) {
    return;
  }
  wait_for_previous_kernel();
  start_next_kernel();
  x[thread] = static_cast<int>(thread) + early + (guess == INT32_MAX / 3 ? 1 : 0);
}

void start_early_(const Tensor& x, int64_t kind) {
  Stream("start_early_", x)
      .launch_early(start_early, Grid{dim3(2), dim3(64)}, mutable_data<int>(x), static_cast<int>(kind));
}

void misbehave_(const Tensor& x, int64_t kind, int64_t blocks_y, int64_t threads, int64_t shared_bytes) {
  const Grid grid{dim3(1, static_cast<unsigned>(blocks_y)), dim3(static_cast<unsigned>(threads)),
                  static_cast<size_t>(shared_bytes)};
  Stream("misbehave_", x).launch(misbehave, grid, mutable_data<int>(x), x.size(0), static_cast<int>(kind), 0);
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(FERRUM_NAMESPACE, m) {
  m.def("start_early_(Tensor(a!) x, int kind) -> ()");
  m.def("misbehave_(Tensor(a!) x, int kind, int blocks_y, int threads, int shared_bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("start_early_", TORCH_BOX(&ferrum::cuda::start_early_));
  m.impl("misbehave_", TORCH_BOX(&ferrum::cuda::misbehave_));
}
