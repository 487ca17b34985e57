// The scheduler: blocks, warps, lanes, where they meet, and what is said when they do not.
#include "simt.h"

#include <signal.h>

#include <algorithm>
#include <bitset>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "memory.h"

namespace ferrum::emulation {
namespace {

constexpr size_t kStackBytes = 60 << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr uint64_t kMaxIdleYields = 1 << 20;

using Mask = std::bitset<kMaxThreads>;  // of threads of a group

// A barrier or a warp instruction that threads wait in.
struct Collective {
  Meeting first;  // as the first to arrive has it
  Mask mask, arrived;
};

// Threads that can meet: the block, or a warp of it.
struct Group {
  unsigned first, count;       // of the threads
  Mask live;                   // which have not exited
  std::list<Collective> open;  // those of disjoint masks meet apart
};

struct Thread {
  Fiber fiber;
  Guarded stack{"a stack", kStackBytes};
  Index index;
  unsigned number;  // the index, linear
  const Collective* waits_in;
  void* operand;
  bool waited;  // for the launch before this one
  struct Copy : AsyncCopy {
    bool landed;
  };
  std::deque<std::vector<Copy>> copies;  // in groups, the last of which is not committed yet
  std::vector<AsyncCopy> unpublished;    // of those waited for
};

struct Machine {
  const Launch* launch = nullptr;
  Index index;                 // of the block
  std::deque<Thread> threads;  // of the largest block so far
  Group block;
  std::vector<Group> warps;
  Thread* current = nullptr;  // null while the scheduler runs
  Fiber scheduler;
  std::optional<Guarded> shared;
  enum class Byte : unsigned char { stored, under_copy, unpublished };
  std::vector<Byte> bytes;               // of `shared`
  std::vector<unsigned char> published;  // `shared`, as it was then
  std::vector<std::function<void()>> at_block_end;
  std::optional<std::string> failure;
  bool previous_runs = false;  // the launch before this one, which may be writing any tensor
  uint64_t idle_yields = 0;
  Schedule schedule = Schedule::forward;
  unsigned seed = 0;
  std::mt19937 random;
  uint64_t launches = 0, blocks = 0, collectives = 0;
} machine;

std::mutex one_launch_at_a_time;

Group& warp_of(const Thread& thread) { return machine.warps[thread.number / machine.launch->warp_size]; }
bool is_live(const Thread& thread) { return machine.block.live[thread.number]; }
bool coin() { return (machine.random() & 1) != 0; }

void to_scheduler() { switch_fibers(machine.current->fiber, machine.scheduler); }

// ---- reports

std::string to_string(Index i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string to_string(const Meeting& meeting) { return std::string(meeting.name) + " " + to_string(meeting.site); }

// {0, 1, 2, 7} as "0-2, 7"
std::string to_string(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0, j; i < numbers.size(); i = j + 1) {
    for (j = i; j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1;) {
      ++j;
    }
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]) + (j > i ? "-" + std::to_string(numbers[j]) : "");
  }
  return text;
}

std::string deadlock_report() {
  std::map<std::string, std::vector<unsigned>> waiting;
  for (const Thread& thread : machine.threads) {
    if (is_live(thread)) {
      waiting[to_string(thread.waits_in->first)].push_back(thread.number);
    }
  }
  std::string text = "deadlock: ";
  for (const auto& [place, numbers] : waiting) {
    text += "threads " + to_string(numbers) + " wait in " + place + "; ";
  }
  const Group& block = machine.block;
  return text + std::to_string(block.count - block.live.count()) + " of " + std::to_string(block.count) + " exited";
}

[[noreturn]] void raise(const std::string& message, const Thread* thread) {
  throw std::runtime_error(std::string("[") + machine.launch->name + "] emulated kernel, block " +
                           to_string(machine.index) +
                           (thread != nullptr ? ", thread " + to_string(thread->index) : "") + ": " + message);
}

// Faults in a kernel become errors while it lives. The handler has a stack of its own, since the fault may be a stack
// overflow, and leaves it by a switch.
class FaultTrap {
 public:
  FaultTrap() : stack_(64 << 10) {
    stack_t stack{};
    stack.ss_sp = stack_.data();
    stack.ss_size = stack_.size();
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~FaultTrap() {
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static void on_fault(int signal_number, siginfo_t* info, void*) {
    if (machine.current == nullptr) {  // not the kernel's: happens again, and ends the process
      signal(signal_number, SIG_DFL);
      return;
    }
    if (machine.current->stack.is_near(info->si_addr)) {
      fail("stack overflow: the locals of a thread need more than " + std::to_string(kStackBytes) + " bytes");
    }
    fail((machine.previous_runs ? "access before the wait for the previous launch: " : "access out of bounds: ") +
         describe_address(info->si_addr));
  }

  std::vector<char> stack_;
  stack_t old_stack_{};
  struct sigaction old_segv_, old_bus_;
};

// ---- meetings

using Place = std::list<Collective>::iterator;

// The barrier waits for no thread that has exited, but it is one instruction of a whole warp (PTX: `bar.sync` is
// `.aligned`).
void check_barrier(const Collective& barrier) {
  for (const Group& warp : machine.warps) {
    if (warp.live.any() && warp.live.count() < warp.count) {
      fail("diverged: " + std::to_string(warp.count - warp.live.count()) +
           " lanes of a warp exited while others wait in " + to_string(barrier.first));
    }
  }
}

// Ends the wait in `place` once all that it waits for have arrived; false while some have not.
bool complete(Group& group, Place place) {
  if ((place->mask & group.live & ~place->arrived).any()) {
    return false;
  }
  if (&group == &machine.block) {
    check_barrier(*place);
  }
  void* operands[kMaxThreads];
  for (unsigned i = 0; i < std::max(group.count, machine.launch->warp_size); ++i) {
    operands[i] = place->arrived[i] ? machine.threads[group.first + i].operand : nullptr;
  }
  place->first.combine(operands);
  for (unsigned i = 0; i < group.count; ++i) {
    if (place->arrived[i]) {
      machine.threads[group.first + i].waits_in = nullptr;
    }
  }
  group.open.erase(place);
  machine.collectives++;
  machine.idle_yields = 0;
  return true;
}

bool same(const Meeting& a, const Meeting& b) {
  return std::strcmp(a.name, b.name) == 0 && a.site.line == b.site.line && std::strcmp(a.site.file, b.site.file) == 0;
}

void meet(Group& group, const Mask& mask, const Meeting& meeting) {
  Place place = std::find_if(group.open.begin(), group.open.end(), [&](auto& other) { return other.mask == mask; });
  if (place == group.open.end()) {
    place = group.open.insert(place, {meeting, mask, {}});
  } else if (!same(place->first, meeting)) {
    fail("diverged: reached " + to_string(meeting) + " while others wait in " + to_string(place->first));
  }
  place->arrived.set(machine.current->number - group.first);
  machine.current->waits_in = &*place;
  machine.current->operand = meeting.operand;
  if (!complete(group, place)) {
    to_scheduler();
  }
}

void exit_thread() {
  machine.idle_yields = 0;
  if (machine.launch->early && !machine.current->waited) {
    fail("exited without a wait for the previous launch");
  }
  for (Group* group : {&machine.block, &warp_of(*machine.current)}) {
    group->live.reset(machine.current->number - group->first);
  }
  for (Group* group : {&machine.block, &warp_of(*machine.current)}) {
    for (Place place = group->open.begin(), next; place != group->open.end(); place = next) {
      next = std::next(place);
      complete(*group, place);
    }
  }
}

// What a fiber runs: its thread of block after block.
void fiber_main() {
  for (;;) {
    try {
      machine.launch->kernel();
    } catch (const std::exception& error) {
      fail(error.what());
    }
    exit_thread();
    to_scheduler();
  }
}

// ---- blocks and launches

void start_block() {
  machine.idle_yields = 0;
  machine.blocks++;
  const auto start = [](Group& group) {
    group.live = ~Mask() >> (kMaxThreads - group.count);
    group.open.clear();
  };
  start(machine.block);
  std::for_each(machine.warps.begin(), machine.warps.end(), start);
  for (Thread& thread : machine.threads) {
    thread.waits_in = nullptr;
    thread.waited = false;
    thread.copies.assign(1, {});
    thread.unpublished.clear();
  }
  const size_t shared_bytes = machine.launch->shared_bytes;
  std::memset(machine.shared->begin, kPoison, shared_bytes);
  machine.bytes.assign(shared_bytes, Machine::Byte::stored);
  machine.published.assign(machine.shared->begin, machine.shared->end);
  machine.at_block_end.clear();
  if (machine.launch->static_shared_bytes > 0) {
    std::memset(machine.launch->static_shared, kPoison, machine.launch->static_shared_bytes);
  }
}

void resume(Thread& thread) {
  machine.current = &thread;
  switch_fibers(machine.scheduler, thread.fiber);
  machine.current = nullptr;
  if (machine.failure.has_value()) {
    raise(*machine.failure, &thread);
  }
}

// One turn of every lane that can run; false where none could.
bool run_lanes(const Group& warp, const std::vector<size_t>& order) {
  bool progress = false;
  for (size_t lane : order) {
    if (warp.live[lane] && machine.threads[warp.first + lane].waits_in == nullptr) {
      resume(machine.threads[warp.first + lane]);
      progress = true;
    }
  }
  return progress;
}

std::vector<size_t> order_of(size_t count) {
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) {
    order[i] = machine.schedule == Schedule::reverse ? count - 1 - i : i;
  }
  if (machine.schedule == Schedule::random) {
    std::shuffle(order.begin(), order.end(), machine.random);
  }
  return order;
}

// Tensors are out of reach while it lives and the launch before this one is taken to run.
class PreviousLaunch {
 public:
  PreviousLaunch() {
    const Schedule s = machine.schedule;
    if (machine.launch->early && (s == Schedule::forward || (s == Schedule::random && coin()))) {
      set(true);
    }
  }
  ~PreviousLaunch() { end(); }
  static void end() {
    if (machine.previous_runs) {
      set(false);
    }
  }

 private:
  static void set(bool runs) {
    allow_tensors(!runs);
    machine.previous_runs = runs;
  }
};

void run_block() {
  start_block();
  const PreviousLaunch previous;
  const bool random = machine.schedule == Schedule::random;
  std::vector<size_t> warps = order_of(machine.warps.size()), lanes = order_of(machine.launch->warp_size);
  while (machine.block.live.any()) {
    bool progress = false;
    for (size_t warp : warps) {  // each as far as it gets alone; in random order, perhaps less
      while (run_lanes(machine.warps[warp], lanes)) {
        progress = true;
        if (random) {
          lanes = order_of(lanes.size());
          if (coin()) {
            break;
          }
        }
      }
    }
    if (!progress) {
      raise(deadlock_report(), nullptr);
    }
    if (random) {
      warps = order_of(warps.size());
    }
  }
  for (const auto& check : machine.at_block_end) {
    try {
      check();
    } catch (const std::exception& error) {
      raise(error.what(), nullptr);
    }
  }
}

void prepare(const Launch& launch) {
  const Index& block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads) {
    throw std::runtime_error(std::string("[") + launch.name + "] launch: expected 1 to 1024 threads, got a block of " +
                             to_string(block));
  }
  const unsigned count = threads;
  if (machine.block.live.any()) {  // after a failure: these stopped within the kernel
    machine.threads.clear();
  }
  machine.failure.reset();
  machine.launch = &launch;
  machine.random.seed(machine.seed);
  machine.launches++;
  machine.shared.emplace("dynamic shared memory", launch.shared_bytes);
  while (machine.threads.size() < count) {
    Thread& thread = machine.threads.emplace_back();
    thread.fiber.start_on(thread.stack.begin, kStackBytes, fiber_main);
  }
  for (unsigned i = 0; i < count; ++i) {
    machine.threads[i].number = i;
    machine.threads[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  machine.block = {0, count, {}, {}};
  machine.warps.clear();
  for (unsigned first = 0; first < count; first += launch.warp_size) {
    machine.warps.push_back({first, std::min(launch.warp_size, count - first), {}, {}});
  }
}

}  // namespace

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  prepare(launch);
  const FaultTrap trap;
  const Index& grid = launch.grid;
  for (size_t i : order_of(size_t{grid.x} * grid.y * grid.z)) {
    machine.index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                     static_cast<unsigned>(i / grid.x / grid.y)};
    run_block();
  }
  if (const std::string overrun = find_overrun(); !overrun.empty()) {
    raise("wrote out of bounds: " + overrun, nullptr);
  }
}

// ---- for a running kernel

const Launch& this_launch() { return *machine.launch; }
const Index& this_block() { return machine.index; }
uint64_t blocks_started() { return machine.blocks; }
const Index& this_thread() { return machine.current->index; }
unsigned this_lane() { return machine.current->number % machine.launch->warp_size; }
unsigned this_warp() { return machine.current->number / machine.launch->warp_size; }
unsigned threads_in_block() { return machine.block.count; }
void* dynamic_shared() { return machine.shared->begin; }

bool is_shared(const void* address) {
  const auto* fixed = static_cast<const char*>(machine.launch->static_shared);
  return (address >= machine.shared->begin && address < machine.shared->end) ||
         (address >= fixed && address < fixed + machine.launch->static_shared_bytes);
}

std::string to_string(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string("(") + (slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

void fail(const std::string& message) {
  if (machine.current == nullptr) {  // the launcher's own code
    throw std::runtime_error(message);
  }
  machine.failure = message;
  for (;;) {
    to_scheduler();
  }
}

void yield() {
  if (++machine.idle_yields > kMaxIdleYields) {
    fail("livelock: threads spin on memory that no thread of the block changes");
  }
  to_scheduler();
}

void maybe_yield() {
  if (machine.schedule == Schedule::random && coin()) {
    yield();
  }
}

void meet_block(const Meeting& meeting) { meet(machine.block, ~Mask(), meeting); }

void wait_for_previous_grid() {
  machine.current->waited = true;
  if (machine.previous_runs) {
    meet_block(
        {"the wait for the previous launch", Site::here(), nullptr, [](void* const*) { PreviousLaunch::end(); }});
  }
}

void prefetch(const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) {
    fail("prefetch: expected whole pieces of 16 bytes");
  }
  const auto* const first = static_cast<const unsigned char*>(from);
  if (bytes > 0 && (is_beside(first) || is_beside(first + bytes - 1))) {
    fail("prefetch out of bounds: " + describe_address(is_beside(first) ? first : first + bytes - 1));
  }
}

int32_t guess(const int32_t* from) {
  if (is_beside(from)) {
    fail("access out of bounds: " + describe_address(from));
  }
  return machine.schedule == Schedule::forward   ? static_cast<int32_t>(machine.index.x % 8)
         : machine.schedule == Schedule::reverse ? kPoison
                                                 : static_cast<int32_t>(machine.random() >> machine.random() % 32);
}

void meet_lanes(uint64_t mask, const Meeting& meeting) {
  if ((mask >> this_lane() & 1) == 0) {
    fail(to_string(meeting) + ": lane " + std::to_string(this_lane()) + " is not in its own mask");
  }
  meet(warp_of(*machine.current), mask, meeting);
}

namespace {
void land(const AsyncCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.size - copy.valid);
}

// Of the bytes that a copy has written.
void mark(const AsyncCopy& copy, Machine::Byte state) {
  const auto* const to = static_cast<unsigned char*>(copy.to);
  if (to >= machine.shared->begin && to + copy.size <= machine.shared->end) {
    std::fill_n(machine.bytes.begin() + (to - machine.shared->begin), copy.size, state);
  }
}
}  // namespace

void issue_copy(const AsyncCopy& copy) {
  const bool landed = machine.schedule == Schedule::reverse || (machine.schedule == Schedule::random && coin());
  if (landed) {
    land(copy);
  } else {
    std::memset(copy.to, kPoison, copy.size);
  }
  mark(copy, Machine::Byte::under_copy);
  machine.current->copies.back().push_back({copy, landed});
}

void commit_copies() { machine.current->copies.emplace_back(); }

void wait_for_copies(size_t groups_in_flight) {
  auto& copies = machine.current->copies;
  for (; copies.size() - 1 > groups_in_flight; copies.pop_front()) {
    for (const Thread::Copy& copy : copies.front()) {
      if (!copy.landed) {
        land(copy);
      }
      mark(copy, Machine::Byte::unpublished);
      machine.current->unpublished.push_back(copy);
    }
  }
}

void publish_shared() {
  for (const AsyncCopy& copy : machine.current->unpublished) {
    mark(copy, Machine::Byte::stored);
  }
  machine.current->unpublished.clear();
  std::memcpy(machine.published.data(), machine.shared->begin, machine.published.size());
}

void read_published(const std::string& reader, void* to, const void* from, size_t size) {
  const auto* const begin = static_cast<const unsigned char*>(from);
  if (begin < machine.shared->begin || begin + size > machine.shared->end) {
    fail(reader + ": " + describe_address(from));
  }
  const size_t first = begin - machine.shared->begin;
  for (size_t at = first; at < first + size; ++at) {
    const Machine::Byte state = machine.bytes[at];
    if (state != Machine::Byte::stored || machine.published[at] != machine.shared->begin[at]) {
      fail(reader + " reads byte " + std::to_string(at) + " of dynamic shared memory, which " +
           (state == Machine::Byte::under_copy    ? "a copy writes that has not been waited for"
            : state == Machine::Byte::unpublished ? "a copy has written and its thread not published"
                                                  : "has been stored since it was published"));
    }
  }
  std::memcpy(to, from, size);
}

void at_block_end(std::function<void()> check) { machine.at_block_end.push_back(std::move(check)); }

}  // namespace ferrum::emulation

// ---- for Python

#define FERRUM_EXPORT extern "C" __attribute__((visibility("default")))

FERRUM_EXPORT void ferrum_emulation_schedule(int schedule, unsigned seed) {
  ferrum::emulation::machine.schedule = static_cast<ferrum::emulation::Schedule>(schedule);
  ferrum::emulation::machine.seed = seed;
}
FERRUM_EXPORT uint64_t ferrum_emulation_launches() { return ferrum::emulation::machine.launches; }
FERRUM_EXPORT uint64_t ferrum_emulation_collectives() { return ferrum::emulation::machine.collectives; }
