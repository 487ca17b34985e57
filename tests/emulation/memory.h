// Memory that a kernel cannot leave without a fault.
#pragma once

#include <cstddef>
#include <string>

namespace ferrum::emulation {

constexpr int kPoison = 0xff;  // a NaN in every floating type, -1 as an integer

// `bytes` of memory, all poison, between pages that may not be accessed.
class Guarded {
 public:
  enum Side { begin_at_guard, end_at_guard };

  // The end is at its guard up to the 16 bytes that `begin` is aligned to. `name` is for messages.
  Guarded(std::string name, size_t bytes, Side side = end_at_guard, bool is_tensor = false);
  ~Guarded();
  Guarded(const Guarded&) = delete;

  unsigned char *begin, *end;

  bool is_near(const void* address) const;
  // In the guard pages or the padding.
  bool is_beside(const void* address) const;
  // Makes the memory readable and writable, or neither. Not of kernels' own memory.
  void allow(bool allowed) const;
  bool is_tensor() const { return is_tensor_; }
  // "byte 252 of a tensor of 252 bytes"
  std::string place(const void* address) const;
  // The same for what was written beside the memory; empty if nothing was. Poisons it anew, so that it is found once.
  std::string find_overrun() const;

 private:
  std::string name_;
  bool is_tensor_;
  unsigned char *pages_, *pages_end_;
};

// Lets a kernel touch guarded tensors, or makes touching them a fault.
void allow_tensors(bool allowed);
// In the guard pages or the padding of guarded memory.
bool is_beside(const void* address);

// Where `address` is: in or near which guarded memory.
std::string describe_address(const void* address);
// The place where something was written beside guarded memory; empty if nothing was.
std::string find_overrun();

}  // namespace ferrum::emulation
