// The scheduler: blocks, warps, lanes, where they meet, and what is said when they do not.
#include "simt.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.h"

namespace ferrum::emulation {
namespace {

constexpr size_t kStackBytes = 64 << 10;  // of a fiber, its guard page included
constexpr unsigned kMaxThreads = 1024;
constexpr uint64_t kMaxIdleYields = 1 << 20;
constexpr int kPoison = 0xff;  // a NaN in every floating type

constexpr size_t kGuardBytes = 1 << 20;
const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

// A barrier or a warp instruction that `arrived` threads wait in; nobody where it is 0.
struct Collective {
  Meeting first;  // as the first to arrive has it
  uint64_t mask = 0;
  unsigned arrived = 0;
};

struct Thread {
  Context context;
  Index index;
  unsigned number = 0;  // the index, linear
  bool exited = false;
  const Collective* waits_in = nullptr;
  void* operand = nullptr;
  std::vector<AsyncCopy> open_copies;
  std::vector<std::vector<AsyncCopy>> committed_copies;
};

struct Warp {
  Thread* lanes;
  unsigned count;
  uint64_t live;                     // lanes that have not exited
  std::vector<Collective> meetings;  // lanes of disjoint masks meet apart
};

// Memory between stretches that may not be accessed.
struct GuardedPages {
  unsigned char* begin = nullptr;
  size_t bytes = 0;

  void reserve(size_t size) {
    if (begin != nullptr) {
      munmap(begin - kGuardBytes, bytes + 2 * kGuardBytes);
    }
    bytes = (size + kPage - 1) / kPage * kPage;
    void* mapped =
        mmap(nullptr, bytes + 2 * kGuardBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
      throw std::runtime_error("emulation: out of memory");
    }
    begin = static_cast<unsigned char*>(mapped) + kGuardBytes;
    mprotect(begin, bytes, PROT_READ | PROT_WRITE);
  }
  bool holds(const void* address) const { return address >= begin && address < begin + bytes; }
  bool is_near(const void* address) const {
    return address >= begin - kGuardBytes && address < begin + bytes + kGuardBytes;
  }
};

struct Machine {
  const Launch* launch = nullptr;
  Index block;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Collective barrier;
  unsigned live = 0;
  Thread* current = nullptr;  // null while the scheduler runs
  Context scheduler;
  GuardedPages stacks, shared;
  bool failed = false;
  std::string message;
  uint64_t idle_yields = 0;
  Schedule schedule = Schedule::forward;
  unsigned seed = 0;
  std::mt19937 random;
  uint64_t launches = 0, collectives = 0;
} machine;

std::mutex one_launch_at_a_time;

uint64_t all_lanes(unsigned count) { return count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }
unsigned count_lanes(uint64_t mask) { return static_cast<unsigned>(__builtin_popcountll(mask)); }
Warp& warp_of(const Thread& thread) { return machine.warps[thread.number / machine.launch->warp_size]; }

void to_scheduler() { switch_context(machine.current->context, machine.scheduler); }

// ---- reports

std::string to_string(Index i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string to_string(const Meeting& meeting) {
  const char* slash = std::strrchr(meeting.site.file, '/');
  const std::string file = slash != nullptr ? slash + 1 : meeting.site.file;
  return std::string(meeting.name) + " (" + file + ":" + std::to_string(meeting.site.line) + ")";
}

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
    if (!thread.exited) {
      waiting[to_string(thread.waits_in->first)].push_back(thread.number);
    }
  }
  std::string text = "deadlock: ";
  for (const auto& [place, numbers] : waiting) {
    text += "threads " + to_string(numbers) + " wait in " + place + "; ";
  }
  const size_t exited = machine.threads.size() - machine.live;
  return text + std::to_string(exited) + " of " + std::to_string(machine.threads.size()) + " exited";
}

std::string describe_address(const void* address) {
  if (machine.stacks.is_near(address)) {
    return "stack overflow: the locals of a thread need more than " + std::to_string(kStackBytes - kPage) + " bytes";
  }
  std::string place;
  if (machine.shared.is_near(address)) {
    const auto offset = static_cast<const char*>(address) - static_cast<const char*>(dynamic_shared());
    place = "byte " + std::to_string(offset) + " of " + std::to_string(machine.launch->shared_bytes) +
            " bytes of dynamic shared memory";
  } else {
    place = describe_tensor_at(address);
  }
  char text[32];
  snprintf(text, sizeof(text), "%p, in no tensor", address);
  return "access out of bounds: " + (place.empty() ? text : place);
}

[[noreturn]] void raise(const std::string& message, const Thread* thread) {
  throw std::runtime_error(std::string("[") + machine.launch->name + "] emulated kernel, block " +
                           to_string(machine.block) +
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
  static void on_fault(int signal, siginfo_t* info, void*) {
    if (machine.current == nullptr) {  // not the kernel's: happens again, and ends the process
      struct sigaction standard{};
      standard.sa_handler = SIG_DFL;
      sigaction(signal, &standard, nullptr);
      return;
    }
    fail(describe_address(info->si_addr));
  }

  std::vector<char> stack_;
  stack_t old_stack_{};
  struct sigaction old_segv_, old_bus_;
};

// ---- meetings

void complete(Collective& collective, Thread* members, unsigned count) {
  void* operands[kMaxThreads];
  for (unsigned i = 0; i < std::max(count, machine.launch->warp_size); ++i) {
    operands[i] = i < count && members[i].waits_in == &collective ? members[i].operand : nullptr;
  }
  collective.first.combine(collective.first.function, operands);
  for (unsigned i = 0; i < count; ++i) {
    if (members[i].waits_in == &collective) {
      members[i].waits_in = nullptr;
    }
  }
  collective.arrived = 0;
  machine.collectives++;
  machine.idle_yields = 0;
}

void arrive(Collective& collective, const Meeting& meeting) {
  const Meeting& first = collective.first;
  if (collective.arrived == 0) {
    collective.first = meeting;
  } else if (std::strcmp(first.name, meeting.name) != 0 || first.site.line != meeting.site.line ||
             std::strcmp(first.site.file, meeting.site.file) != 0) {
    fail("diverged: reached " + to_string(meeting) + " while others wait in " + to_string(first));
  }
  collective.arrived++;
  machine.current->waits_in = &collective;
  machine.current->operand = meeting.operand;
}

// The barrier waits for no thread that has exited, but it is one instruction of a whole warp (PTX: `bar.sync` is
// `.aligned`).
bool complete_barrier() {
  if (machine.barrier.arrived == 0 || machine.barrier.arrived < machine.live) {
    return false;
  }
  for (const Warp& warp : machine.warps) {
    if (warp.live != 0 && warp.live != all_lanes(warp.count)) {
      fail("diverged: " + std::to_string(warp.count - count_lanes(warp.live)) +
           " lanes of a warp exited while others wait in " + to_string(machine.barrier.first));
    }
  }
  complete(machine.barrier, machine.threads.data(), threads_in_block());
  return true;
}

bool complete_lanes(Warp& warp, Collective& collective) {
  if (collective.arrived == 0 || collective.arrived < count_lanes(collective.mask & warp.live)) {
    return false;
  }
  complete(collective, warp.lanes, warp.count);
  return true;
}

void exit_thread() {
  Thread& thread = *machine.current;
  Warp& warp = warp_of(thread);
  thread.exited = true;
  machine.live--;
  machine.idle_yields = 0;
  warp.live &= ~(uint64_t{1} << this_lane());
  complete_barrier();
  for (Collective& collective : warp.meetings) {
    complete_lanes(warp, collective);
  }
}

void fiber_main() {
  try {
    machine.launch->kernel();
  } catch (const std::exception& error) {
    fail(error.what());
  }
  exit_thread();
  to_scheduler();
}

// ---- blocks and launches

void start_block() {
  machine.live = machine.threads.size();
  machine.barrier = {};
  machine.idle_yields = 0;
  for (Thread& thread : machine.threads) {
    thread.exited = false;
    thread.waits_in = nullptr;
    thread.open_copies.clear();
    thread.committed_copies.clear();
    char* const stack = reinterpret_cast<char*>(machine.stacks.begin) + thread.number * kStackBytes;
    make_context(thread.context, stack + kPage, kStackBytes - kPage, fiber_main);
  }
  for (Warp& warp : machine.warps) {
    warp.live = all_lanes(warp.count);
    warp.meetings.assign(warp.count, {});
  }
  std::memset(machine.shared.begin, kPoison, machine.shared.bytes);
  if (machine.launch->static_shared_bytes > 0) {
    std::memset(machine.launch->static_shared, kPoison, machine.launch->static_shared_bytes);
  }
}

void resume(Thread& thread) {
  machine.current = &thread;
  switch_context(machine.scheduler, thread.context);
  machine.current = nullptr;
  if (machine.failed) {
    raise(machine.message, &thread);
  }
}

// One turn of every lane that can run; false where none could.
bool run_lanes(Warp& warp, const std::vector<size_t>& order) {
  bool progress = false;
  for (size_t lane : order) {
    if (lane < warp.count && !warp.lanes[lane].exited && warp.lanes[lane].waits_in == nullptr) {
      resume(warp.lanes[lane]);
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

void run_block() {
  start_block();
  const bool random = machine.schedule == Schedule::random;
  std::vector<size_t> warps = order_of(machine.warps.size()), lanes = order_of(machine.launch->warp_size);
  while (machine.live > 0) {
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
}

void check_limits(const Launch& launch) {
  const auto expect = [&](bool condition, const std::string& expected, const std::string& got) {
    if (!condition) {
      throw std::runtime_error(std::string("[") + launch.name + "] launch: expected " + expected + ", got " + got);
    }
  };
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  expect(threads >= 1 && threads <= kMaxThreads, "1 to 1024 threads", "a block of " + to_string(launch.block));
  const Index& grid = launch.grid;
  expect(grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 0xffff && grid.z >= 1 && grid.z <= 0xffff,
         "a grid of 1 to (2^31 - 1, 65535, 65535) blocks", to_string(grid));
  expect(launch.shared_bytes <= launch.shared_limit,
         "at most " + std::to_string(launch.shared_limit) + " bytes of shared memory",
         std::to_string(launch.shared_bytes));
}

void reserve_stacks(unsigned count) {
  if (machine.stacks.bytes < count * kStackBytes) {
    machine.stacks.reserve(count * kStackBytes);
    for (unsigned i = 0; i < count; ++i) {
      mprotect(machine.stacks.begin + i * kStackBytes, kPage, PROT_NONE);
    }
  }
}

void prepare(const Launch& launch) {
  check_limits(launch);
  const Index& block = launch.block;
  const unsigned count = block.x * block.y * block.z;
  machine.launch = &launch;
  machine.failed = false;
  machine.random.seed(machine.seed);
  machine.launches++;
  reserve_stacks(count);
  machine.shared.reserve(launch.shared_bytes);
  machine.threads.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    machine.threads[i].number = i;
    machine.threads[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  machine.warps.clear();
  for (unsigned first = 0; first < count; first += launch.warp_size) {
    machine.warps.push_back({&machine.threads[first], std::min(launch.warp_size, count - first), 0, {}});
  }
}

}  // namespace

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  prepare(launch);
  const FaultTrap trap;
  const Index& grid = launch.grid;
  for (size_t i : order_of(size_t{grid.x} * grid.y * grid.z)) {
    machine.block = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                     static_cast<unsigned>(i / grid.x / grid.y)};
    run_block();
  }
  if (const std::string overrun = overrun_of_padding(); !overrun.empty()) {
    raise(overrun, nullptr);
  }
}

// ---- for a running kernel

const Launch& this_launch() { return *machine.launch; }
const Index& this_block() { return machine.block; }
const Index& this_thread() { return machine.current->index; }
unsigned this_lane() { return machine.current->number % machine.launch->warp_size; }
unsigned threads_in_block() { return machine.threads.size(); }
Schedule schedule() { return machine.schedule; }
bool coin() { return (machine.random() & 1) != 0; }

void* dynamic_shared() {  // its end, aligned to 16 bytes, is where the guard page begins
  return machine.shared.begin + machine.shared.bytes - (machine.launch->shared_bytes + 15) / 16 * 16;
}

bool is_shared(const void* address) {
  const auto* fixed = static_cast<const char*>(machine.launch->static_shared);
  return (machine.shared.holds(address) && address >= dynamic_shared()) ||
         (address >= fixed && address < fixed + machine.launch->static_shared_bytes);
}

void fail(const std::string& message) {
  if (machine.current == nullptr) {  // the launcher's own code
    throw std::runtime_error(message);
  }
  machine.failed = true;
  machine.message = message;
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

void meet_block(const Meeting& meeting) {
  arrive(machine.barrier, meeting);
  if (!complete_barrier()) {
    to_scheduler();
  }
}

void meet_lanes(uint64_t mask, const Meeting& meeting) {
  if ((mask >> this_lane() & 1) == 0) {
    fail(to_string(meeting) + ": lane " + std::to_string(this_lane()) + " is not in its own mask");
  }
  Warp& warp = warp_of(*machine.current);
  Collective* place = nullptr;
  for (Collective& c : warp.meetings) {
    if (c.arrived > 0 ? c.mask == mask : place == nullptr) {
      place = &c;
      if (c.arrived > 0) {
        break;
      }
    }
  }
  place->mask = mask;
  arrive(*place, meeting);
  if (!complete_lanes(warp, *place)) {
    to_scheduler();
  }
}

namespace {
void land(const AsyncCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.size - copy.valid);
}
}  // namespace

void issue_copy(const AsyncCopy& copy) {
  if (machine.schedule == Schedule::reverse || (machine.schedule == Schedule::random && coin())) {
    land(copy);
  } else {
    std::memset(copy.to, kPoison, copy.size);
    machine.current->open_copies.push_back(copy);
  }
}

void commit_copies() {
  machine.current->committed_copies.push_back(std::move(machine.current->open_copies));
  machine.current->open_copies.clear();
}

void wait_for_copies(size_t groups_in_flight) {
  auto& groups = machine.current->committed_copies;
  for (; groups.size() > groups_in_flight; groups.erase(groups.begin())) {
    std::for_each(groups.front().begin(), groups.front().end(), land);
  }
}

}  // namespace ferrum::emulation

// ---- for Python

#define FERRUM_EXPORT extern "C" __attribute__((visibility("default")))

FERRUM_EXPORT void ferrum_emulation_schedule(int schedule, unsigned seed) {
  ferrum::emulation::machine.schedule = static_cast<ferrum::emulation::Schedule>(schedule);
  ferrum::emulation::machine.seed = seed;
}
FERRUM_EXPORT uint64_t ferrum_emulation_launches() { return ferrum::emulation::machine.launches; }
FERRUM_EXPORT uint64_t ferrum_emulation_collectives() { return ferrum::emulation::machine.collectives; }
