#include "cpu/isa.h"

#include <atomic>
#include <cstring>

namespace ferrum::cpu {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::generic;
#else
  return Isa::generic;
#endif
}

const char* const kNames[] = {"generic", "avx2", "avx512"};
std::atomic<int> override_level{-1};

}  // namespace

Isa active_isa() {
  static const Isa best = best_isa();
  const int level = override_level.load(std::memory_order_relaxed);
  return level < 0 ? best : static_cast<Isa>(level);
}

}  // namespace ferrum::cpu

// Called through ctypes by ferrum_ops (not ops: they take no tensors and are not part of a graph).
extern "C" __attribute__((visibility("default"))) const char* ferrum_cpu_isa() {
  return ferrum::cpu::kNames[static_cast<int>(ferrum::cpu::active_isa())];
}

// Sets the level by name, or back to the processor's best with nullptr. Returns 0, or -1 for a level that is unknown
// or that this processor lacks.
extern "C" __attribute__((visibility("default"))) int ferrum_set_cpu_isa(const char* name) {
  using namespace ferrum::cpu;
  if (name == nullptr) {
    override_level = -1;
    return 0;
  }
  for (int level = 0; level <= static_cast<int>(best_isa()); ++level) {
    if (std::strcmp(name, kNames[level]) == 0) {
      override_level = level;
      return 0;
    }
  }
  return -1;
}
