// The compiler's checks of a kernel (-fsanitize=... in emulator.py), reported without the sanitizer's runtime library.
// What the compiler passes is fixed: compiler-rt/lib/ubsan/ubsan_handlers.h.
#include "simt.h"

namespace {

struct Place {
  const char* file;
  uint32_t line, column;
};

struct Type {
  uint16_t kind, info;
  char name[1];
};

struct Mismatch {
  Place place;
  const Type* type;
  unsigned char log_alignment, access;
};

[[noreturn]] void report(const Place& place, const std::string& message) {
  using namespace ferrum::emulation;
  fail(message + " " + to_string(Site{place.file, static_cast<int>(place.line)}));
}

}  // namespace

#define FERRUM_HANDLER extern "C" __attribute__((visibility("hidden"))) void

FERRUM_HANDLER __ubsan_handle_type_mismatch_v1_abort(Mismatch* data, uintptr_t address) {
  const uintptr_t alignment = uintptr_t{1} << data->log_alignment;
  report(data->place, std::string("misaligned access: ") + data->type->name + " needs " + std::to_string(alignment) +
                          " bytes, the address is " + std::to_string(address % alignment) + " past that");
}

FERRUM_HANDLER __ubsan_handle_out_of_bounds_abort(Place* place, uintptr_t index) {
  report(*place, "index " + std::to_string(static_cast<intptr_t>(index)) + " out of bounds of its array");
}

FERRUM_HANDLER __ubsan_handle_shift_out_of_bounds_abort(Place* place, uintptr_t, uintptr_t bits) {
  report(*place, "shift by " + std::to_string(static_cast<intptr_t>(bits)) + " bits");
}

FERRUM_HANDLER __ubsan_handle_divrem_overflow_abort(Place* place, uintptr_t, uintptr_t) {
  report(*place, "integer division by zero");
}

FERRUM_HANDLER __ubsan_handle_float_cast_overflow_abort(Place* place, uintptr_t) {
  report(*place, "a number that its integer type does not hold; __float2int_rn and its like saturate");
}
