// Argument checks without torch: every message reads "[op] argument: expected ..., got ...".
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace ferrum {

template <typename... Parts>
[[noreturn]] inline void fail(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream message;
  message << '[' << op << "] " << argument << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace ferrum

// FERRUM_CHECK(x.dim() == 2, "rms_norm", "x", "expected 2 dimensions, got ", x.dim());
#define FERRUM_CHECK(condition, op, argument, ...)   \
  do {                                               \
    if (!(condition)) {                              \
      ::ferrum::fail((op), (argument), __VA_ARGS__); \
    }                                                \
  } while (false)
