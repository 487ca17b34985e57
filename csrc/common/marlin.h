// Sizes and choices of the products in the Marlin layout, without torch. The layout is that of
// ferrum_ops/formats/marlin.py.
#pragma once

#include <cstdint>

namespace ferrum {

constexpr int kMarlinStep = 16;             // rows of a tile, and of one step over K
constexpr int kMarlinUnit = 64;             // columns of a unit
constexpr int kMarlinGateRun = 8;           // columns of gate before the same columns of up
constexpr int64_t kMarlinMaxPadding = 127;  // rows a matrix may have beyond K without a perm that says so

enum class MarlinReduction : int { fp32, rounded, atomic };

}  // namespace ferrum
