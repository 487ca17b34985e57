// Tensors between guard pages: torch's CPU allocator while `ferrum_emulation_guard` is on. Test code, so it may use
// c10.
#include <c10/core/Allocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "simt.h"

namespace ferrum::emulation {
namespace {

enum class Placement { off, end_at_guard, begin_at_guard };

constexpr size_t kAlignment = 16;  // of a tensor, as the widest vector load needs; what it pads is checked afterwards
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating type, -1 as an integer
constexpr size_t kGuardBytes =
    1 << 20;  // on each side: an index that is off by a row or two must not reach other memory

struct Region {
  unsigned char *begin, *end;  // of the tensor
  unsigned char *pages, *pages_end;
};

const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));
std::map<const void*, Region> regions;  // by `begin`
std::mutex regions_lock;
Placement placement = Placement::off;

void release(void* begin) {
  const std::lock_guard<std::mutex> lock(regions_lock);
  const auto found = regions.find(begin);
  const Region region = found->second;
  regions.erase(found);
  munmap(region.pages - kGuardBytes, region.pages_end - region.pages + 2 * kGuardBytes);
}

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (size == 0) {
      return {nullptr, nullptr, &release, cpu};
    }
    const size_t bytes = (size + kPage - 1) / kPage * kPage;
    void* mapped =
        mmap(nullptr, bytes + 2 * kGuardBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(mapped != MAP_FAILED, "no memory for a guarded tensor of ", size, " bytes");
    Region r{};
    r.pages = static_cast<unsigned char*>(mapped) + kGuardBytes;
    r.pages_end = r.pages + bytes;
    mprotect(r.pages, bytes, PROT_READ | PROT_WRITE);
    std::memset(r.pages, kPoison, bytes);
    r.begin = placement == Placement::begin_at_guard ? r.pages
                                                     : r.pages_end - (size + kAlignment - 1) / kAlignment * kAlignment;
    r.end = r.begin + size;
    const std::lock_guard<std::mutex> lock(regions_lock);
    regions[r.begin] = r;
    return {r.begin, r.begin, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};

std::string place_in(const Region& region, const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  return "byte " + std::to_string(at - region.begin) + " of a tensor of " + std::to_string(region.end - region.begin) +
         " bytes";
}

// The first changed byte of the padding, or null. Restores it, so that it is reported once.
const unsigned char* find_overrun(unsigned char* begin, unsigned char* end) {
  for (unsigned char* at = begin; at < end; ++at) {
    if (*at != kPoison) {
      std::memset(begin, kPoison, end - begin);
      return at;
    }
  }
  return nullptr;
}

}  // namespace

std::string describe_tensor_at(const void* address) {
  for (const auto& [begin, region] : regions) {
    if (address >= region.pages - kGuardBytes && address < region.pages_end + kGuardBytes) {
      return place_in(region, address);
    }
  }
  return "";
}

std::string overrun_of_padding() {
  for (const auto& [begin, r] : regions) {
    const unsigned char* before = find_overrun(r.pages, r.begin);
    const unsigned char* behind = find_overrun(r.end, r.pages_end);
    if (before != nullptr || behind != nullptr) {
      return "wrote out of bounds: " + place_in(r, before != nullptr ? before : behind);
    }
  }
  return "";
}

}  // namespace ferrum::emulation

// 0 ends it; 1 places tensors before a guard page, 2 behind one.
extern "C" __attribute__((visibility("default"))) void ferrum_emulation_guard(int placement) {
  using namespace ferrum::emulation;
  static GuardedAllocator guarded;
  static c10::Allocator* const standard = c10::GetAllocator(c10::DeviceType::CPU);
  ferrum::emulation::placement = static_cast<Placement>(placement);
  c10::SetAllocator(c10::DeviceType::CPU, placement == 0 ? standard : &guarded, /*priority=*/255);
}
