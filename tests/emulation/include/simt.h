// Runs a GPU kernel on one CPU thread: one fiber per GPU thread, one block at a time. Nothing here belongs to CUDA or
// to Metal; cuda_emulation.h puts CUDA's names on top. README.md says what is modelled and what is not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

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
};
std::string to_string(Site site);  // "(norm.cu:12)"

struct Launch {
  const char* name;
  Index grid, block;    // block: 1 to 1024 threads
  size_t shared_bytes;  // dynamic
  unsigned warp_size;   // at most 64
  void* static_shared;  // poisoned before every block, as the dynamic one
  size_t static_shared_bytes;
  bool early;  // may start before the launch before it is done, and waits for it
  std::function<void()> kernel;
};

// Runs every thread of every block. Raises std::runtime_error for whatever goes wrong in the kernel.
void run(const Launch& launch);

// ---- for a running kernel

const Launch& this_launch();
const Index& this_block();
uint64_t blocks_started();   // with this one, by all launches
const Index& this_thread();  // within its block
unsigned this_lane();
unsigned this_warp();
unsigned threads_in_block();
void* dynamic_shared();
bool is_shared(const void* address);

// Ends the launch with this error. Never returns to the kernel and does not unwind its frames.
[[noreturn]] void fail(const std::string& message);

// Lets other threads run: whoever spins must call it.
void yield();
// The same, under the random schedule and by chance: where another thread may come between.
void maybe_yield();

// What threads do together: `combine(operands)`, with a null operand for each one that has exited or is not meant.
struct Meeting {
  const char* name;
  Site site;
  void* operand;
  std::function<void(void* const*)> combine;
};
void meet_block(const Meeting& meeting);
void meet_lanes(uint64_t mask, const Meeting& meeting);

// Waits until every live thread of the block, or every live lane of `mask`, is here. Then `function(Operand* const*)`
// runs once for all of them, by their number in the block or by lane; it reads and writes their operands in place.
template <class Operand, class Function>
void block_collective(const char* name, Site site, Operand& operand, const Function& function) {
  meet_block({name, site, &operand, [&](void* const* all) { function(reinterpret_cast<Operand* const*>(all)); }});
}
template <class Operand, class Function>
void warp_collective(const char* name, Site site, uint64_t mask, Operand& operand, const Function& function) {
  meet_lanes(mask, {name, site, &operand, [&](void* const* all) { function(reinterpret_cast<Operand* const*>(all)); }});
}

// A copy to shared memory that may land at any time between issue and wait: at the issue (reverse order), at the wait
// with poison until then (forward), or at one of the two by chance (random).
struct AsyncCopy {
  void* to;
  const void* from;
  size_t size, valid;  // bytes beyond `valid` are zeroed
};
void issue_copy(const AsyncCopy& copy);
void commit_copies();
void wait_for_copies(size_t groups_in_flight);

// ---- an early launch. The launch before it is done from the start (reverse order), or when all threads of a block
// wait (forward), until when no tensor may be touched; or one of the two by chance (random). Every thread waits.
void wait_for_previous_grid();

// A hint to bring memory nearer: that of a tensor, whole pieces of 16 bytes.
void prefetch(const void* from, size_t bytes);
// What a read beside its writer may give: anything.
int32_t guess(const int32_t* from);

// ---- dynamic shared memory for a unit that works beside the threads, and sees what has been published to it

// Publishes what has been stored up to here and the copies that this thread has waited for.
void publish_shared();
// What such a unit reads; fails where a byte is written by a copy that no wait has ended or nobody has published, or
// has been stored since it was published. `reader` is for messages.
void read_published(const std::string& reader, void* to, const void* from, size_t size);

// `check` runs once all threads of this block have exited.
void at_block_end(std::function<void()> check);

}  // namespace ferrum::emulation
