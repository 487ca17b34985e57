// Products in the Marlin layout on wgmma (marlin_wgmma.cuh).
#pragma once

#include "cuda/marlin_product.cuh"

namespace ferrum::cuda {

// One launch: every tile of 64 tokens and, of a grouped product, the rows that no tile writes.
template <typename T>
void launch_marlin_wgmma(const Stream& stream, const MarlinConfig& config, const MarlinProduct<T>& product,
                         int64_t bits);

// Whether ferrum_marlin_wgmma(1) has been called, and not ferrum_marlin_wgmma(0) after it.
bool marlin_wgmma_asked_for();

}  // namespace ferrum::cuda
