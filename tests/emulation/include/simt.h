// Runs a GPU kernel on one CPU thread: one fiber per GPU thread, one block at a time. Nothing here belongs to CUDA or
// to Metal; cuda_emulation.h puts CUDA's names on top. README.md says what is modelled and what is not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace ferrum::emulation {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// The order in which warps and lanes run between two collectives. A race that one order hides shows under another.
enum class Schedule { forward, reverse, random };

// Where in the source a thread stands. As a default argument, `here()` is the place of the call.
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const;
};

struct AsyncCopy {
  void* to;
  const void* from;
  size_t size, from_size;  // bytes beyond from_size are zeroed
};

struct Collective;

struct Thread {
  void* stack_pointer = nullptr;
  Index index;          // within the block
  unsigned number = 0;  // the same, linear
  bool done = false;
  const Collective* waits_in = nullptr;
  void* operand = nullptr;  // of the collective it waits in
  std::vector<std::vector<AsyncCopy>> committed_copies;
  std::vector<AsyncCopy> open_copies;
};

// A barrier or a warp instruction that some of its threads have reached.
struct Collective {
  const char* name = nullptr;  // null while nobody waits in it
  Site site{};
  uint64_t mask = 0;  // lanes; unused by a block's
  unsigned arrived = 0;
  const void* function = nullptr;
  void (*combine)(const void* function, void* const* operands) = nullptr;
};

struct Launch {
  const char* name;
  Index grid, block;
  size_t shared_bytes;  // dynamic
  unsigned warp_size;   // at most 64
  size_t shared_limit;  // of the device, bytes
  void* static_shared;  // poisoned before every block
  size_t static_shared_bytes;
  std::function<void()> kernel;
};

// Runs every thread of every block. Raises std::runtime_error for whatever goes wrong in the kernel.
void run(const Launch& launch);

Thread& this_thread();
unsigned this_lane();
const Index& this_block();
const Launch& this_launch();
void* dynamic_shared();
bool is_shared(const void* address);
Schedule schedule();
bool coin();  // from the schedule's seed

// Ends the launch with this error, from inside a kernel. Never unwinds the kernel's frames.
[[noreturn]] void fail(const std::string& message);

// Lets other threads run: a spinning thread must call it.
void yield();

void reach_block_collective(const char* name, Site site, void* operand, const void* function,
                            void (*combine)(const void*, void* const*));
void reach_warp_collective(const char* name, Site site, uint64_t mask, void* operand, const void* function,
                           void (*combine)(const void*, void* const*));

// Waits until every live thread of the block, or every live lane of `mask`, is here. Then `function(Operand* const*)`
// runs once for all of them: it reads and writes their operands in place. A null pointer stands for a thread that has
// exited, and for a lane outside the mask.
template <class Operand, class Function>
void block_collective(const char* name, Site site, Operand& operand, const Function& function) {
  reach_block_collective(name, site, &operand, &function, [](const void* f, void* const* operands) {
    (*static_cast<const Function*>(f))(reinterpret_cast<Operand* const*>(operands));
  });
}

template <class Operand, class Function>
void warp_collective(const char* name, Site site, uint64_t mask, Operand& operand, const Function& function) {
  reach_warp_collective(name, site, mask, &operand, &function, [](const void* f, void* const* operands) {
    (*static_cast<const Function*>(f))(reinterpret_cast<Operand* const*>(operands));
  });
}

// Copies to shared memory that may land at any time between issue and wait: at the issue (reverse), at the wait with
// poison until then (forward), or at one of the two by chance (random).
void issue_copy(const AsyncCopy& copy);
void commit_copies();
void wait_for_copies(size_t groups_in_flight);

// guard.cpp: tensors between guard pages.
std::string describe_address(const void* address);  // empty when no guarded tensor is near
std::string overrun_of_padding();                   // empty when no tensor's padding was written

}  // namespace ferrum::emulation
