// From the arguments of an op to the launches of a product in the Marlin layout.
#pragma once

#include <optional>
#include <vector>

#include "checks/marlin.h"
#include "cuda/marlin_product.cuh"

namespace ferrum::cuda {

// out[row][j] = x[row of x][perm[j]], 0 where perm[j] is no column; without a perm, j itself. Rows of 16-bit numbers.
// By entry, a row of `out` for each entry that names a row of the result, with its expert's perm.
struct MarlinGather {
  const uint16_t* x;
  int64_t x_stride;
  int in_features;
  const int32_t* perm;
  int64_t perm_expert;
  MarlinRows rows;
  uint16_t* out;
  int64_t count;  // rows of out
  int packed_rows;
};

void launch_marlin_gather(const Stream& stream, const MarlinGather& gather);

struct MarlinCall {
  const char* op;
  const Tensor& x;
  const Tensor& packed;
  const Tensor& scales;
  const std::optional<Tensor>& zeros;
  const std::optional<Tensor>& perm;
  const std::optional<Tensor>& bias;
  const Tensor& workspace;
  int64_t bits, max_sms;
  MarlinArguments arguments;
  MarlinRows rows;
  int64_t product_columns;
  bool silu_mul;
  const float* topk_weights;
  int64_t slots;
};

void run_marlin(const MarlinCall& call, const Tensor& out);

}  // namespace ferrum::cuda
