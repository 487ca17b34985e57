#include <atomic>

#include "cuda/marlin_wgmma.cuh"

namespace ferrum::cuda {
namespace {

std::atomic<bool> asked_for{false};

}  // namespace

bool marlin_wgmma_asked_for() { return asked_for; }

template <typename T>
void launch_marlin_wgmma(const Stream& stream, const MarlinConfig& config, const MarlinProduct<T>& product,
                         int64_t bits) {
  if (bits == 4) {
    launch_wgmma_tiles<T, 4>(stream, config, product);
  } else {
    launch_wgmma_tiles<T, 8>(stream, config, product);
  }
}

template void launch_marlin_wgmma(const Stream&, const MarlinConfig&, const MarlinProduct<__half>&, int64_t);
template void launch_marlin_wgmma(const Stream&, const MarlinConfig&, const MarlinProduct<__nv_bfloat16>&, int64_t);

}  // namespace ferrum::cuda

// For tests and benchmarks (ferrum_ops.testing.gpu.wgmma): all products of this process that pick_marlin_config lets
// take wgmma do, until told otherwise.
extern "C" __attribute__((visibility("default"))) void ferrum_marlin_wgmma(int on) {
  ferrum::cuda::asked_for = on != 0;
}
