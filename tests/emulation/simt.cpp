// The scheduler: fibers, collectives, reports, and faults turned into errors.
#include "simt.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#define FERRUM_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace ferrum::emulation {

#ifdef FERRUM_OWN_SWITCH
// Saves the callee-saved registers on the running stack and goes on with another one.
extern "C" __attribute__((visibility("hidden"))) void ferrum_switch_stack(void** save, void* to);
#ifdef __x86_64__
asm(R"(
.text
.hidden ferrum_switch_stack
.globl ferrum_switch_stack
.type ferrum_switch_stack,@function
ferrum_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size ferrum_switch_stack, .-ferrum_switch_stack
)");
constexpr size_t kSavedWords = 6;  // below the return address
#else
asm(R"(
.text
.hidden ferrum_switch_stack
.globl ferrum_switch_stack
.type ferrum_switch_stack,%function
ferrum_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size ferrum_switch_stack, .-ferrum_switch_stack
)");
constexpr size_t kSavedWords = 20, kLinkRegister = 11;
#endif
#endif

namespace {

constexpr size_t kStackBytes = 64 << 10;  // of a fiber, its guard page included
constexpr unsigned kMaxThreads = 1024;
constexpr uint64_t kMaxIdleYields = 1 << 20;

const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

struct Warp {
  std::vector<Collective> pending;  // one for each lane at most; disjoint masks wait apart
  uint64_t live = 0;                // lanes that have not exited
};

// One launch at a time, on one OS thread: the collectives of the emulated library are not entered from two.
struct Machine {
  const Launch* launch = nullptr;
  Index block;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Collective block_collective;
  unsigned live = 0;
  Thread* current = nullptr;
  uint64_t idle_yields = 0;
  bool failed = false;
  std::string message;
  int fault_signal = 0;
  void* fault_address = nullptr;
  unsigned char* shared_pages = nullptr;  // dynamic shared memory ends where a guard page begins
  size_t shared_pages_bytes = 0;
  char* stacks = nullptr;
  unsigned stack_count = 0;
  void* scheduler_stack = nullptr;
#ifndef FERRUM_OWN_SWITCH
  std::vector<ucontext_t> contexts;
  ucontext_t scheduler_context;
#endif
  std::mt19937 random;
  Schedule schedule = Schedule::forward;
  unsigned seed = 0;
  uint64_t collectives = 0, launches = 0;
} machine;

pthread_mutex_t launch_lock = PTHREAD_MUTEX_INITIALIZER;

unsigned warp_size() { return machine.launch->warp_size; }

void to_scheduler() {
#ifdef FERRUM_OWN_SWITCH
  ferrum_switch_stack(&machine.current->stack_pointer, machine.scheduler_stack);
#else
  swapcontext(&machine.contexts[machine.current->number], &machine.scheduler_context);
#endif
}

void resume(Thread& thread) {
  machine.current = &thread;
#ifdef FERRUM_OWN_SWITCH
  ferrum_switch_stack(&machine.scheduler_stack, thread.stack_pointer);
#else
  swapcontext(&machine.scheduler_context, &machine.contexts[thread.number]);
#endif
  machine.current = nullptr;
}

// ---- collectives

void complete(Collective& c, Thread* members, unsigned count) {
  void* operands[kMaxThreads];
  std::fill(operands + count, operands + std::max(count, warp_size()), nullptr);
  for (unsigned i = 0; i < count; ++i) {
    operands[i] = members[i].waits_in == &c ? members[i].operand : nullptr;
  }
  c.combine(c.function, operands);
  for (unsigned i = 0; i < count; ++i) {
    if (members[i].waits_in == &c) {
      members[i].waits_in = nullptr;
    }
  }
  c.name = nullptr;
  c.arrived = 0;
  machine.collectives++;
  machine.idle_yields = 0;
}

Thread* first_lane(size_t warp) { return &machine.threads[warp * warp_size()]; }

unsigned lanes_of(size_t warp) { return std::min<size_t>(warp_size(), machine.threads.size() - warp * warp_size()); }

uint64_t all_lanes(unsigned count) { return count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

void complete_warp_collective(size_t warp, Collective& c) { complete(c, first_lane(warp), lanes_of(warp)); }

std::string where(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

// A block's barrier waits for no thread that has exited, but is one instruction of a whole warp (`bar.sync.aligned`).
void complete_block_collective() {
  const Collective& c = machine.block_collective;
  for (size_t warp = 0; warp < machine.warps.size(); ++warp) {
    const unsigned lanes = lanes_of(warp);
    if (machine.warps[warp].live != 0 && machine.warps[warp].live != all_lanes(lanes)) {
      fail("diverged: warp " + std::to_string(warp) + " reached " + c.name + " (" + where(c.site) + ") with " +
           std::to_string(lanes - __builtin_popcountll(machine.warps[warp].live)) + " of its lanes exited");
    }
  }
  complete(machine.block_collective, machine.threads.data(), machine.threads.size());
}

void arrive(Collective& c, const char* name, Site site, void* operand, const void* function,
            void (*combine)(const void*, void* const*)) {
  if (c.name == nullptr) {
    c.name = name;
    c.site = site;
    c.function = function;
    c.combine = combine;
  } else if (std::strcmp(c.name, name) != 0 || !(c.site == site)) {
    fail(std::string("diverged: reached ") + name + " (" + where(site) + ") while others wait in " + c.name + " (" +
         where(c.site) + ")");
  }
  c.arrived++;
  machine.current->waits_in = &c;
  machine.current->operand = operand;
}

void exit_thread() {
  Thread& thread = *machine.current;
  thread.done = true;
  machine.live--;
  machine.idle_yields = 0;
  const size_t warp_number = thread.number / warp_size();
  Warp& warp = machine.warps[warp_number];
  warp.live &= ~(uint64_t{1} << this_lane());
  if (machine.block_collective.name != nullptr && machine.block_collective.arrived == machine.live) {
    complete_block_collective();
  }
  for (Collective& c : warp.pending) {
    if (c.name != nullptr && c.arrived == static_cast<unsigned>(__builtin_popcountll(c.mask & warp.live))) {
      complete_warp_collective(warp_number, c);
    }
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

void prepare(Thread& thread) {
  char* const stack = machine.stacks + thread.number * kStackBytes;
#ifdef FERRUM_OWN_SWITCH
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
#ifdef __x86_64__
  *--top = nullptr;  // where a caller's return address would be: keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  top -= kSavedWords;
#else
  top -= kSavedWords;
  top[kLinkRegister] = reinterpret_cast<void*>(fiber_main);
#endif
  thread.stack_pointer = top;
#else
  ucontext_t& context = machine.contexts[thread.number];
  getcontext(&context);
  context.uc_stack.ss_sp = stack + kPage;
  context.uc_stack.ss_size = kStackBytes - kPage;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
#endif
}

// ---- reports

std::string to_string(Index i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

// {0, 1, 2, 7} as "0-2, 7"
std::string ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) {
      ++j;
    }
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]) + (j > i ? "-" + std::to_string(numbers[j]) : "");
    i = j + 1;
  }
  return text;
}

std::string deadlock_report() {
  std::map<std::string, std::vector<unsigned>> waiting;
  unsigned exited = 0;
  for (const Thread& thread : machine.threads) {
    if (thread.done) {
      exited++;
    } else {
      waiting[std::string(thread.waits_in->name) + " (" + where(thread.waits_in->site) + ")"].push_back(thread.number);
    }
  }
  std::string text = "deadlock:";
  for (const auto& [place, numbers] : waiting) {
    text += (text.back() == ':' ? " threads " : "; threads ") + ranges(numbers) + " wait in " + place;
  }
  return text + "; " + std::to_string(exited) + " of " + std::to_string(machine.threads.size()) + " exited";
}

std::string fault_report() {
  const auto* address = static_cast<const char*>(machine.fault_address);
  const char* what = machine.fault_signal == SIGFPE ? "division by zero" : "access out of bounds";
  if (address >= machine.stacks && address < machine.stacks + machine.stack_count * kStackBytes) {
    return "stack overflow: a thread's locals need more than " + std::to_string(kStackBytes - kPage) + " bytes";
  }
  const auto* shared = static_cast<const char*>(dynamic_shared());
  const auto* shared_end = reinterpret_cast<const char*>(machine.shared_pages) + machine.shared_pages_bytes;
  if (address >= reinterpret_cast<const char*>(machine.shared_pages) - kPage && address < shared_end + kPage) {
    return std::string(what) + ": byte " + std::to_string(address - shared) + " of " +
           std::to_string(machine.launch->shared_bytes) + " bytes of dynamic shared memory";
  }
  const std::string tensor = describe_address(address);
  char hex[32];
  snprintf(hex, sizeof(hex), "address %p", address);
  return std::string(what) + ": " + (tensor.empty() ? std::string(hex) + ", in no tensor" : tensor);
}

[[noreturn]] void raise_failure(const Thread* thread) {
  std::string text = std::string("[") + machine.launch->name + "] emulated kernel, block " + to_string(machine.block);
  if (thread != nullptr) {
    text += ", thread " + to_string(thread->index);
  }
  throw std::runtime_error(text + ": " + (machine.fault_signal != 0 ? fault_report() : machine.message));
}

// ---- faults

void on_fault(int signal, siginfo_t* info, void*) {
  if (machine.current == nullptr) {  // not a kernel's: the access repeats under the handlers of before
    struct sigaction standard{};
    standard.sa_handler = SIG_DFL;
    sigaction(signal, &standard, nullptr);
    return;
  }
  machine.failed = true;
  machine.fault_signal = signal;
  machine.fault_address = info->si_addr;
  to_scheduler();
}

// Faults become errors while it lives. The handler has a stack of its own, since the fault may be a stack overflow.
class FaultTrap {
 public:
  FaultTrap() : stack_(64 << 10) {
    stack_t stack{};
    stack.ss_sp = stack_.data();
    stack.ss_size = stack_.size();
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // on_fault leaves by a switch, not by a return
    for (int i = 0; i < kSignals; ++i) {
      sigaction(signals_[i], &action, &old_[i]);
    }
  }
  ~FaultTrap() {
    for (int i = 0; i < kSignals; ++i) {
      sigaction(signals_[i], &old_[i], nullptr);
    }
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kSignals = 3;
  static constexpr int signals_[kSignals] = {SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction old_[kSignals];
  stack_t old_stack_{};
  std::vector<char> stack_;
};

// ---- blocks

void reset_block() {
  const Launch& launch = *machine.launch;
  machine.live = machine.threads.size();
  machine.block_collective = {};
  machine.idle_yields = 0;
  for (Thread& thread : machine.threads) {
    thread.done = false;
    thread.waits_in = nullptr;
    thread.committed_copies.clear();
    thread.open_copies.clear();
    prepare(thread);
  }
  for (size_t w = 0; w < machine.warps.size(); ++w) {
    machine.warps[w].live = all_lanes(lanes_of(w));
    machine.warps[w].pending.assign(launch.warp_size, {});
  }
  std::memset(machine.shared_pages, 0xff, machine.shared_pages_bytes);
  if (launch.static_shared_bytes > 0) {
    std::memset(launch.static_shared, 0xff, launch.static_shared_bytes);
  }
}

void run_block() {
  reset_block();
  const bool reverse = machine.schedule == Schedule::reverse, random = machine.schedule == Schedule::random;
  std::vector<unsigned> warps(machine.warps.size()), lanes(warp_size());
  for (unsigned i = 0; i < warps.size(); ++i) {
    warps[i] = reverse ? warps.size() - 1 - i : i;
  }
  for (unsigned i = 0; i < lanes.size(); ++i) {
    lanes[i] = reverse ? lanes.size() - 1 - i : i;
  }
  while (machine.live > 0) {
    bool progress = false;
    if (random) {
      std::shuffle(warps.begin(), warps.end(), machine.random);
    }
    for (unsigned warp : warps) {
      for (bool again = true; again;) {  // as far as the warp gets alone; in random order, perhaps less
        again = false;
        if (random) {
          std::shuffle(lanes.begin(), lanes.end(), machine.random);
        }
        for (unsigned lane : lanes) {
          const size_t number = warp * warp_size() + lane;
          if (number >= machine.threads.size()) {
            continue;
          }
          Thread& thread = machine.threads[number];
          if (thread.done || thread.waits_in != nullptr) {
            continue;
          }
          progress = again = true;
          resume(thread);
          if (machine.failed) {
            raise_failure(&thread);
          }
        }
        again = again && !(random && coin());
      }
    }
    if (!progress) {
      machine.message = deadlock_report();
      raise_failure(nullptr);
    }
  }
}

void reserve_stacks(unsigned count) {
  if (count <= machine.stack_count) {
    return;
  }
  if (machine.stacks != nullptr) {
    munmap(machine.stacks, machine.stack_count * kStackBytes);
  }
  machine.stacks = static_cast<char*>(
      mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (unsigned i = 0; i < count; ++i) {
    mprotect(machine.stacks + i * kStackBytes, kPage, PROT_NONE);
  }
  machine.stack_count = count;
}

void reserve_shared(size_t bytes) {
  const size_t pages = (bytes + kPage - 1) / kPage * kPage;
  if (machine.shared_pages != nullptr) {
    munmap(machine.shared_pages - kPage, machine.shared_pages_bytes + 2 * kPage);
  }
  auto* base = static_cast<unsigned char*>(
      mmap(nullptr, pages + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  machine.shared_pages = base + kPage;
  machine.shared_pages_bytes = pages;
  if (pages > 0) {
    mprotect(machine.shared_pages, pages, PROT_READ | PROT_WRITE);
  }
}

void check_launch(const Launch& launch) {
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const std::string name = std::string("[") + launch.name + "] launch: ";
  if (threads == 0 || threads > kMaxThreads) {
    throw std::runtime_error(name + "expected 1 to 1024 threads, got a block of " + to_string(launch.block));
  }
  if (launch.grid.x == 0 || launch.grid.x > 0x7fffffffu || launch.grid.y == 0 || launch.grid.y > 65535 ||
      launch.grid.z == 0 || launch.grid.z > 65535) {
    throw std::runtime_error(name + "expected a grid of 1 to (2^31 - 1, 65535, 65535) blocks, got " +
                             to_string(launch.grid));
  }
  if (launch.shared_bytes > launch.shared_limit) {
    throw std::runtime_error(name + "expected at most " + std::to_string(launch.shared_limit) +
                             " bytes of shared memory, got " + std::to_string(launch.shared_bytes));
  }
}

void setup(const Launch& launch) {
  check_launch(launch);
  const unsigned count = launch.block.x * launch.block.y * launch.block.z;
  machine.launch = &launch;
  machine.failed = false;
  machine.fault_signal = 0;
  machine.random.seed(machine.seed);
  machine.launches++;
  reserve_stacks(count);
  reserve_shared(launch.shared_bytes);
  machine.threads.resize(count);
  machine.warps.resize((count + launch.warp_size - 1) / launch.warp_size);
#ifndef FERRUM_OWN_SWITCH
  machine.contexts.resize(count);
#endif
  for (unsigned i = 0; i < count; ++i) {
    machine.threads[i].number = i;
    machine.threads[i].index = {i % launch.block.x, i / launch.block.x % launch.block.y,
                                i / (launch.block.x * launch.block.y)};
  }
}

}  // namespace

void run(const Launch& launch) {
  pthread_mutex_lock(&launch_lock);
  struct Unlock {
    ~Unlock() {
      machine.current = nullptr;
      pthread_mutex_unlock(&launch_lock);
    }
  } unlock;
  setup(launch);
  const FaultTrap trap;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) {
    order[i] = machine.schedule == Schedule::reverse ? blocks - 1 - i : i;
  }
  if (machine.schedule == Schedule::random) {
    std::shuffle(order.begin(), order.end(), machine.random);
  }
  for (uint64_t i : order) {
    machine.block = {static_cast<unsigned>(i % launch.grid.x), static_cast<unsigned>(i / launch.grid.x % launch.grid.y),
                     static_cast<unsigned>(i / launch.grid.x / launch.grid.y)};
    run_block();
  }
  machine.message = overrun_of_padding();
  if (!machine.message.empty()) {
    raise_failure(nullptr);
  }
}

bool Site::operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }

Thread& this_thread() { return *machine.current; }
unsigned this_lane() { return machine.current->number % warp_size(); }
const Index& this_block() { return machine.block; }
const Launch& this_launch() { return *machine.launch; }
Schedule schedule() { return machine.schedule; }
bool coin() { return (machine.random() & 1) != 0; }

void* dynamic_shared() {
  const size_t aligned = (machine.launch->shared_bytes + 15) / 16 * 16;
  return machine.shared_pages + machine.shared_pages_bytes - aligned;
}

bool is_shared(const void* address) {
  const auto* a = static_cast<const unsigned char*>(address);
  const auto* fixed = static_cast<const unsigned char*>(machine.launch->static_shared);
  return (a >= dynamic_shared() && a < machine.shared_pages + machine.shared_pages_bytes) ||
         (a >= fixed && a < fixed + machine.launch->static_shared_bytes);
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
    fail("livelock: threads spin on memory that nobody changes");
  }
  to_scheduler();
}

void reach_block_collective(const char* name, Site site, void* operand, const void* function,
                            void (*combine)(const void*, void* const*)) {
  arrive(machine.block_collective, name, site, operand, function, combine);
  if (machine.block_collective.arrived == machine.live) {
    complete_block_collective();
  } else {
    to_scheduler();
  }
}

void reach_warp_collective(const char* name, Site site, uint64_t mask, void* operand, const void* function,
                           void (*combine)(const void*, void* const*)) {
  const unsigned lane = this_lane();
  const size_t warp_number = machine.current->number / warp_size();
  Warp& warp = machine.warps[warp_number];
  if ((mask >> lane & 1) == 0) {
    fail(std::string(name) + " (" + where(site) + "): lane " + std::to_string(lane) + " is not in its own mask");
  }
  Collective* found = nullptr;
  for (Collective& c : warp.pending) {
    if (c.name != nullptr && c.mask == mask) {
      found = &c;
      break;
    }
    if (found == nullptr && c.name == nullptr) {
      found = &c;
    }
  }
  found->mask = mask;
  arrive(*found, name, site, operand, function, combine);
  if (found->arrived == static_cast<unsigned>(__builtin_popcountll(mask & warp.live))) {
    complete_warp_collective(warp_number, *found);
  } else {
    to_scheduler();
  }
}

namespace {
void land(const AsyncCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.from_size);
  std::memset(static_cast<char*>(copy.to) + copy.from_size, 0, copy.size - copy.from_size);
}
}  // namespace

void issue_copy(const AsyncCopy& copy) {
  if (machine.schedule == Schedule::reverse || (machine.schedule == Schedule::random && coin())) {
    land(copy);
    return;
  }
  std::memset(copy.to, 0xff, copy.size);
  machine.current->open_copies.push_back(copy);
}

void commit_copies() {
  machine.current->committed_copies.push_back(std::move(machine.current->open_copies));
  machine.current->open_copies.clear();
}

void wait_for_copies(size_t groups_in_flight) {
  auto& groups = machine.current->committed_copies;
  while (groups.size() > groups_in_flight) {
    for (const AsyncCopy& copy : groups.front()) {
      land(copy);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace ferrum::emulation

// ---- what Python calls

extern "C" {
__attribute__((visibility("default"))) void ferrum_emulation_schedule(int schedule, unsigned seed) {
  ferrum::emulation::machine.schedule = static_cast<ferrum::emulation::Schedule>(schedule);
  ferrum::emulation::machine.seed = seed;
}
__attribute__((visibility("default"))) uint64_t ferrum_emulation_launches() {
  return ferrum::emulation::machine.launches;
}
__attribute__((visibility("default"))) uint64_t ferrum_emulation_collectives() {
  return ferrum::emulation::machine.collectives;
}

// The compiler's checks (-fsanitize=alignment,bounds,shift-exponent) without the sanitizer's runtime
// library. The structures are its stable interface: compiler-rt/lib/ubsan/ubsan_handlers.h.
struct SanitizerSite {
  const char* file;
  uint32_t line, column;
};
struct SanitizerType {
  uint16_t kind, info;
  char name[1];
};
struct TypeMismatch {
  SanitizerSite site;
  const SanitizerType* type;
  unsigned char log_alignment, check_kind;
};

[[noreturn]] static void sanitizer_failure(const SanitizerSite& site, const std::string& message) {
  ferrum::emulation::fail(message + " (" + ferrum::emulation::where({site.file, static_cast<int>(site.line)}) + ")");
}
__attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data, uintptr_t at) {
  const uintptr_t alignment = uintptr_t{1} << data->log_alignment;
  if (at == 0) {
    sanitizer_failure(data->site, std::string("null pointer to ") + data->type->name);
  }
  sanitizer_failure(data->site, std::string("misaligned access: ") + data->type->name + " needs " +
                                    std::to_string(alignment) + " bytes, the address is " +
                                    std::to_string(at % alignment) + " past that");
}
__attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds_abort(SanitizerSite* site, uintptr_t index) {
  sanitizer_failure(*site, "index " + std::to_string(static_cast<intptr_t>(index)) + " out of bounds of its array");
}
__attribute__((visibility("hidden"))) void __ubsan_handle_shift_out_of_bounds_abort(SanitizerSite* site, uintptr_t,
                                                                                    uintptr_t by) {
  sanitizer_failure(*site, "shift by " + std::to_string(static_cast<intptr_t>(by)) + " bits");
}
}
