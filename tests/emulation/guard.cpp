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
  munmap(region.pages - kPage, region.pages_end - region.pages + 2 * kPage);
}

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (size == 0) {
      return {nullptr, nullptr, &release, cpu};
    }
    const size_t bytes = (size + kPage - 1) / kPage * kPage;
    void* mapped = mmap(nullptr, bytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(mapped != MAP_FAILED, "no memory for a guarded tensor of ", size, " bytes");
    Region r{};
    r.pages = static_cast<unsigned char*>(mapped) + kPage;
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

const unsigned char* first_changed(const unsigned char* begin, const unsigned char* end) {
  while (begin < end && *begin == kPoison) {
    ++begin;
  }
  return begin;
}

}  // namespace

std::string describe_tensor_at(const void* address) {
  for (const auto& [begin, region] : regions) {
    if (address >= region.pages - kPage && address < region.pages_end + kPage) {
      return place_in(region, address);
    }
  }
  return "";
}

std::string overrun_of_padding() {
  for (const auto& [begin, r] : regions) {
    if (const auto* at = first_changed(r.pages, r.begin); at < r.begin) {
      return "wrote out of bounds: " + place_in(r, at);
    }
    if (const auto* at = first_changed(r.end, r.pages_end); at < r.pages_end) {
      return "wrote out of bounds: " + place_in(r, at);
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
