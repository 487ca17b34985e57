// A stack of its own for each GPU thread, and the switch between stacks.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

namespace ferrum::emulation {

// The code that runs on a stack, while another one runs. A new stack is entered through ucontext, which makes a system
// call, and from then on left and resumed through setjmp and longjmp, which make none. (-U_FORTIFY_SOURCE: the checked
// longjmp takes another stack for an error.)
struct Fiber {
  jmp_buf registers;
  ucontext_t entry;
  bool entered = true;  // false: `entry` is where it starts

  // `main` never returns.
  void start_on(void* stack, size_t bytes, void (*main)()) {
    getcontext(&entry);
    entry.uc_stack.ss_sp = stack;
    entry.uc_stack.ss_size = bytes;
    entry.uc_link = nullptr;
    makecontext(&entry, main, 0);
    entered = false;
  }
};

inline void switch_fibers(Fiber& from, Fiber& to) {
  if (_setjmp(from.registers) != 0) {
    return;
  }
  if (!to.entered) {
    to.entered = true;
    setcontext(&to.entry);
  }
  _longjmp(to.registers, 1);
}

}  // namespace ferrum::emulation
