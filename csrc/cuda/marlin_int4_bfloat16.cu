#include "cuda/marlin_kernel.cuh"

namespace ferrum::cuda {
template void launch_marlin<__nv_bfloat16, 4>(const Stream&, const MarlinConfig&, const MarlinProduct<__nv_bfloat16>&);
}
