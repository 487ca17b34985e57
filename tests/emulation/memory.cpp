// Guarded memory, and torch's CPU tensors in it while `ferrum_emulation_guard` is on. Test code, so it may use c10.
#include "memory.h"

#include <c10/core/Allocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <set>

namespace ferrum::emulation {
namespace {

constexpr size_t kGuardBytes = 1 << 20;  // an index that is off by a row or two must not reach other memory
constexpr size_t kAlignment = 16;        // as the widest vector load needs
const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Never destroyed: tensors may live longer than the library's other variables.
auto& lock = *new std::mutex;
auto& all = *new std::set<const Guarded*>;

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    auto* const memory = size == 0 ? nullptr : new Guarded("a tensor", size, side, /*is_tensor=*/true);
    const auto release = [](void* context) { delete static_cast<Guarded*>(context); };
    return {size == 0 ? nullptr : memory->begin, memory, release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

  Guarded::Side side = Guarded::end_at_guard;
};

}  // namespace

Guarded::Guarded(std::string name, size_t bytes, Side side, bool is_tensor)
    : name_(std::move(name)), is_tensor_(is_tensor) {
  const size_t size = round_up(bytes, kPage);
  void* const mapped =
      mmap(nullptr, size + 2 * kGuardBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    throw std::bad_alloc();
  }
  pages_ = static_cast<unsigned char*>(mapped) + kGuardBytes;
  pages_end_ = pages_ + size;
  begin = side == begin_at_guard ? pages_ : pages_end_ - round_up(bytes, kAlignment);
  end = begin + bytes;
  mprotect(pages_, size, PROT_READ | PROT_WRITE);
  std::memset(pages_, kPoison, size);
  const std::lock_guard hold(lock);
  all.insert(this);
}

Guarded::~Guarded() {
  const std::lock_guard hold(lock);
  all.erase(this);
  munmap(pages_ - kGuardBytes, pages_end_ - pages_ + 2 * kGuardBytes);
}

bool Guarded::is_near(const void* address) const {
  return address >= pages_ - kGuardBytes && address < pages_end_ + kGuardBytes;
}

bool Guarded::is_beside(const void* address) const { return is_near(address) && (address < begin || address >= end); }

void Guarded::allow(bool allowed) const {
  mprotect(pages_, pages_end_ - pages_, allowed ? PROT_READ | PROT_WRITE : PROT_NONE);
}

std::string Guarded::place(const void* address) const {
  return "byte " + std::to_string(static_cast<const unsigned char*>(address) - begin) + " of " + name_ + " of " +
         std::to_string(end - begin) + " bytes";
}

std::string Guarded::find_overrun() const {
  for (const auto& [from, to] : {std::pair(pages_, begin), std::pair(end, pages_end_)}) {
    unsigned char* const written = std::find_if(from, to, [](unsigned char byte) { return byte != kPoison; });
    if (written != to) {
      std::memset(from, kPoison, to - from);
      return place(written);
    }
  }
  return "";
}

std::string describe_address(const void* address) {
  const std::lock_guard hold(lock);
  for (const Guarded* memory : all) {
    if (memory->is_near(address)) {
      return memory->place(address);
    }
  }
  char text[40];
  snprintf(text, sizeof(text), "%p, in no tensor", address);
  return text;
}

void allow_tensors(bool allowed) {
  const std::lock_guard hold(lock);
  for (const Guarded* memory : all) {
    if (memory->is_tensor()) {
      memory->allow(allowed);
    }
  }
}

bool is_beside(const void* address) {
  const std::lock_guard hold(lock);
  return std::any_of(all.begin(), all.end(), [=](const Guarded* memory) { return memory->is_beside(address); });
}

std::string find_overrun() {
  const std::lock_guard hold(lock);
  std::string found;
  std::any_of(all.begin(), all.end(), [&](const Guarded* memory) { return !(found = memory->find_overrun()).empty(); });
  return found;
}

}  // namespace ferrum::emulation

// 0 ends it; 1 places tensors before a guard page, 2 behind one.
extern "C" __attribute__((visibility("default"))) void ferrum_emulation_guard(int placement) {
  using ferrum::emulation::Guarded;
  static ferrum::emulation::GuardedAllocator guarded;
  static c10::Allocator* const standard = c10::GetAllocator(c10::DeviceType::CPU);
  guarded.side = placement == 1 ? Guarded::end_at_guard : Guarded::begin_at_guard;
  c10::SetAllocator(c10::DeviceType::CPU, placement == 0 ? standard : &guarded, /*priority=*/255);
}
