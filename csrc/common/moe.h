// Limits and tiles of the routed experts, without torch.
#pragma once

#include <cstdint>

namespace ferrum {

constexpr int64_t kMaxExperts = 1024;  // of a router
// The tile of Metal's grouped product: one threadgroup per 32 rows and 64 output columns of an expert.
constexpr int32_t kDispatchRows = 32;
constexpr int64_t kDispatchColumns = 64;

}  // namespace ferrum
