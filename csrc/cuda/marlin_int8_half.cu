#include "cuda/marlin_kernel.cuh"

namespace ferrum::cuda {
template void launch_marlin<__half, 8>(const Stream&, const MarlinConfig&, const MarlinProduct<__half>&);
}
