// Which instruction level the kernels use. Chosen once from the processor; tests override it.
#pragma once

namespace ferrum::cpu {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };

// The level in force: the override if one is set, else the best this processor has.
Isa active_isa();

}  // namespace ferrum::cpu
