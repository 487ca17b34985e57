// How an op starts a CUDA kernel: on the device of its inputs and on the stream that is current there.
//
// The emulated build (tests/emulation) compiles these sources as plain C++ and runs the kernels on the CPU, so no file
// in this folder writes <<<>>>, inline PTX outside ptx.cuh, mma.cuh and wgmma.cuh, or `extern __shared__`.
#pragma once

#include <initializer_list>

#include "checks/tensor.h"
#include "common/dtype.h"
#include "common/library.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
// Absent from a torch without CUDA, in which the library must load all the same. Found through libtorch.so (setup.py).
#pragma weak aoti_torch_get_current_cuda_stream
#else
#include "cuda_emulation.h"
#endif

// The block's dynamic shared memory as an array of `type`, aligned as the largest vector (eight floats) is.
#ifdef __CUDACC__
#define FERRUM_DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(32) unsigned char ferrum_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(ferrum_shared_bytes)
#else
#define FERRUM_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::ferrum::emulation::dynamic_shared())
#endif

namespace ferrum::cuda {

// Dynamic shared memory of a block, at most: sm_89, which has least, leaves 3 KB beside it for static.
constexpr size_t kMostSharedBytes = 96 * 1024;

struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes = 0;  // dynamic
};

// A count that a kernel or the grid holds in 32 bits.
inline unsigned narrow(const char* op, const char* name, int64_t count) {
  FERRUM_CHECK(count >= 0 && count <= INT32_MAX, op, name, "expected at most ", INT32_MAX, ", got ", count);
  return static_cast<unsigned>(count);
}

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

// Raises unless all tensors lie on the device of `on`.
inline void check_device(const char* op, const Tensor& on, std::initializer_list<NamedTensor> others) {
  for (const NamedTensor& other : others) {
    const bool same = other.tensor.is_cuda() == on.is_cuda() && other.tensor.is_cpu() == on.is_cpu() &&
                      other.tensor.get_device_index() == on.get_device_index();
    FERRUM_CHECK(same, op, other.name, "expected a tensor on the device of the other tensors (index ",
                 on.get_device_index(), "), got one on ", other.tensor.is_cpu() ? "the CPU" : "another device");
  }
}

inline Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return new_output(like, shape, like.scalar_type());
}

#ifdef __CUDACC__

// Makes the device of `on` current while it lives, and launches on the stream that is current there.
class Stream {
 public:
  Stream(const char* op, const Tensor& on) : op_(op), guard_(on.get_device_index()) {
    void* stream = nullptr;
    FERRUM_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, "device", "this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Starts `kernel` over `grid`; does nothing for an empty grid. Never waits, so it can be captured in a graph.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) const {
    if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) {
      return;
    }
    allow_shared_bytes(reinterpret_cast<const void*>(kernel), grid);
    kernel<<<grid.blocks, grid.threads, grid.shared_bytes, stream_>>>(static_cast<Parameters>(arguments)...);
    check(cudaGetLastError());
  }

  // The same, but where hardware can (sm_90), blocks start while the kernel before this one on the stream still runs:
  // every thread calls wait_for_previous_kernel (ptx.cuh) before it touches memory. A capture makes it an edge of the
  // graph; behind anything but a kernel it is an ordinary launch.
  template <typename... Parameters, typename... Arguments>
  void launch_early(void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) const {
    if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) {
      return;
    }
    allow_shared_bytes(reinterpret_cast<const void*>(kernel), grid);
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = stream_;
    config.attrs = &early;
    config.numAttrs = can_wait(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  }

  // Raises where the code of `kernel` for this device is empty (wgmma.cuh): that alone has no static shared memory.
  template <typename... Parameters>
  void require_code(void (*kernel)(Parameters...), const char* device) const {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
    FERRUM_CHECK(attributes.sharedSizeBytes > 0, op_, "device", "expected ", device, ", got another");
  }

  int multiprocessors() const {
    int device = 0, count = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  }

 private:
  void allow_shared_bytes(const void* kernel, const Grid& grid) const {
    if (grid.shared_bytes > 48 * 1024) {
      // The same limit for every launch: another thread may be about to make a larger one.
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(kMostSharedBytes)));
    }
  }

  // Whether the code that runs on this device has the wait in it: not what was compiled for an older one.
  bool can_wait(const void* kernel) const {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.ptxVersion >= 90;
  }

  void check(cudaError_t error) const {
    if (error != cudaSuccess) {
      cudaGetLastError();  // forgets it: the next launch would be blamed for it
      fail(op_, "CUDA", cudaGetErrorString(error));
    }
  }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

#else

class Stream {
 public:
  Stream(const char* op, const Tensor&) : op_(op) {}

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) const {
    if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) {
      return;
    }
    emulation::launch(op_, kernel, grid.blocks, grid.threads, grid.shared_bytes, false,
                      static_cast<Parameters>(arguments)...);
  }

  template <typename... Parameters, typename... Arguments>
  void launch_early(void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) const {
    if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) {
      return;
    }
    emulation::launch(op_, kernel, grid.blocks, grid.threads, grid.shared_bytes, true,
                      static_cast<Parameters>(arguments)...);
  }

  template <typename... Parameters>
  void require_code(void (*)(Parameters...), const char*) const {}

  int multiprocessors() const { return 4; }

 private:
  const char* op_;
};

#endif

}  // namespace ferrum::cuda
