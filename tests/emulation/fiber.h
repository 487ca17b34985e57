// A stack of its own for each GPU thread, and the switch between stacks.
#pragma once

#include <cstddef>

namespace ferrum::emulation {

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)) && !defined(FERRUM_UCONTEXT)

// Several times faster than swapcontext, which makes a system call. The registers that a called function must keep lie
// on the stack that waits; a Context is its stack pointer.
using Context = void*;

extern "C" __attribute__((visibility("hidden"))) void ferrum_switch_stack(void** from, void* to);

asm(".text\n.hidden ferrum_switch_stack\n.globl ferrum_switch_stack\nferrum_switch_stack:\n"
#ifdef __x86_64__
    "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
    "movq %rsp, (%rdi); movq %rsi, %rsp\n"
    "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret\n"
#else
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp, #0]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]; stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]\n"
    "stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]; mov x2, sp; str x2, [x0]; mov sp, x1\n"
    "ldp x19, x20, [sp, #0]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]; ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]\n"
    "ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]; add sp, sp, #160; ret\n"
#endif
);

inline void switch_context(Context& from, const Context& to) { ferrum_switch_stack(&from, to); }

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
#ifdef __x86_64__
  *--top = nullptr;  // stands for entry's return address
  *--top = reinterpret_cast<void*>(entry);
  context = top - 6;
#else
  top -= 20;
  top[11] = reinterpret_cast<void*>(entry);  // x30, the return address
  context = top;
#endif
}

#else

}  // namespace ferrum::emulation
#include <ucontext.h>
namespace ferrum::emulation {

using Context = ucontext_t;

inline void switch_context(Context& from, const Context& to) { swapcontext(&from, &to); }

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  ::makecontext(&context, entry, 0);
}

#endif

}  // namespace ferrum::emulation
