// What a launch of a CUDA kernel needs beside the scheduler: the limits of the device, and where `__shared__` variables
// are.
#include "cuda_emulation.h"

#include <link.h>

#include <stdexcept>

namespace ferrum::emulation {
namespace {

constexpr size_t kSharedLimit = 227 * 1024;  // of a block: sm_90, sm_100

// `__shared__` makes thread-local variables and nothing else in the library does, so the TLS block of the library is
// the block's static shared memory. The variable brings the block into being.
thread_local volatile char anchor;

struct Region {
  void* begin = nullptr;
  size_t bytes = 0;
};

int find_tls_block(dl_phdr_info* info, size_t, void* result) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    auto* begin = static_cast<volatile char*>(info->dlpi_tls_data);
    if (segment.p_type == PT_TLS && begin != nullptr && &anchor >= begin && &anchor < begin + segment.p_memsz) {
      *static_cast<Region*>(result) = {info->dlpi_tls_data, segment.p_memsz};
      return 1;
    }
  }
  return 0;
}

void check_limits(const char* name, dim3 grid, size_t shared_bytes) {
  const auto expect = [&](bool condition, const std::string& expected, const std::string& got) {
    if (!condition) {
      throw std::runtime_error(std::string("[") + name + "] launch: expected " + expected + ", got " + got);
    }
  };
  expect(grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 0xffff && grid.z >= 1 && grid.z <= 0xffff,
         "a grid of 1 to (2^31 - 1, 65535, 65535) blocks",
         "(" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) + ")");
  expect(shared_bytes <= kSharedLimit, "at most " + std::to_string(kSharedLimit) + " bytes of shared memory",
         std::to_string(shared_bytes));
}

}  // namespace

void run_cuda(const char* name, dim3 grid, dim3 block, size_t shared_bytes, bool early, std::function<void()> kernel) {
  check_limits(name, grid, shared_bytes);
  anchor = 0;
  Region region;
  dl_iterate_phdr(find_tls_block, &region);
  if (region.begin == nullptr) {
    throw std::runtime_error("static shared memory not found");
  }
  run({name,
       {grid.x, grid.y, grid.z},
       {block.x, block.y, block.z},
       shared_bytes,
       32,
       region.begin,
       region.bytes,
       early,
       std::move(kernel)});
}

}  // namespace ferrum::emulation
