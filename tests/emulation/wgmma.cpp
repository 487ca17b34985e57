// The products of warpgroups (PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions").
//
// A product is computed where it is issued and shows where it is waited for. In between D is poison, and A, D and the
// shared memory of B must stay as they are.
#include <algorithm>
#include <deque>
#include <map>
#include <stdexcept>
#include <vector>

#include "memory.h"
#include "wgmma_emulation.h"

namespace ferrum::emulation {
namespace {

constexpr int kWarpsInGroup = 4;

struct Product {
  const char* name;
  float* d[32];
  const uint32_t* a[32];
  uint32_t a_values[32][4];
  std::vector<const unsigned char*> b;  // pieces of 16 bytes
  std::vector<unsigned char> b_values;
};

struct Result {  // of a lane
  std::vector<float> values;
  int under_way = 0;  // products that write it
};

struct Warp {
  bool fenced = false;
  std::deque<std::vector<Product>> groups = {{}};  // the last one is not committed yet
  std::map<float*, Result> results;
  size_t issued = 0;
};

// What the warps of a warpgroup execute one after another, by the first of them to get there.
struct Instruction {
  const char* name;
  uint64_t descriptor;
};
struct Block {
  uint64_t number = 0;
  std::vector<Warp> warps;
  std::map<unsigned, std::vector<Instruction>> of_group;
} block;

// Throws what fail() would say, where no thread runs.
void check_end() {
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const Warp& warp = block.warps[w];
    if (!warp.results.empty()) {
      throw std::runtime_error("wgmma: products of warp " + std::to_string(w) + " are under way at its end");
    }
    if (warp.issued != block.warps[w / kWarpsInGroup * kWarpsInGroup].issued) {
      throw std::runtime_error("wgmma: diverged: warp " + std::to_string(w) + " of a warpgroup executes " +
                               std::to_string(warp.issued) + ", its first warp " +
                               std::to_string(block.warps[w / kWarpsInGroup * kWarpsInGroup].issued));
    }
  }
}

Warp& this_warps() {
  if (threads_in_block() % (32 * kWarpsInGroup) != 0) {
    fail("wgmma: expected whole warpgroups, got a block of " + std::to_string(threads_in_block()) + " threads");
  }
  if (block.number != blocks_started()) {
    block = {blocks_started(), std::vector<Warp>(threads_in_block() / 32), {}};
    at_block_end(check_end);
  }
  return block.warps[this_warp()];
}

// The pieces of 16 bytes of B: two of each column.
std::vector<const unsigned char*> pieces_of(const WgmmaIssue& issue) {
  const auto field = [&](int first, uint64_t mask) { return issue.descriptor >> first & mask; };
  if (field(62, 3) != 1 || field(49, 7) != 0) {
    fail(std::string(issue.name) + ": only swizzles of 128 bytes that begin at multiples of 1024 are modelled");
  }
  const auto* const base = static_cast<const unsigned char*>(dynamic_shared());
  const size_t stride = field(32, 0x3fff) << 4;
  std::vector<const unsigned char*> pieces;
  for (int column = 0; column < issue.columns; ++column) {
    for (int half = 0; half < 2; ++half) {
      size_t address = (field(0, 0x3fff) << 4) + column / 8 * stride + column % 8 * 128 + half * 16;
      address ^= (address >> 7 & 7) << 4;  // of the address itself, so that a matrix may begin within a row
      pieces.push_back(base + static_cast<ptrdiff_t>(address) - kDynamicSharedStart);
    }
  }
  return pieces;
}

void multiply(const WgmmaIssue& issue, const Product& product, Warp& warp) {
  static float left[16][kWgmmaRows], right[kWgmmaRows][kWgmmaMostColumns], sum[16][kWgmmaMostColumns];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const int row = lane / 4 + 8 * (i / 2 % 2), k = 2 * (lane % 4) + 8 * (i / 4) + i % 2;
      left[row][k] = issue.number(static_cast<uint16_t>(product.a_values[lane][i / 2] >> 16 * (i % 2)));
    }
  }
  const auto* const b = reinterpret_cast<const uint16_t*>(product.b_values.data());
  for (int column = 0; column < issue.columns; ++column) {
    for (int k = 0; k < kWgmmaRows; ++k) {
      right[k][column] = issue.number(b[column * kWgmmaRows + k]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    std::fill_n(sum[row], issue.columns, 0.0f);
    for (int k = 0; k < kWgmmaRows; ++k) {
      for (int column = 0; column < issue.columns; ++column) {
        sum[row][column] += left[row][k] * right[k][column];
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    std::vector<float>& d = warp.results[issue.d[lane]].values;
    for (int i = 0; i < issue.columns / 2; ++i) {
      const float more = sum[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2];
      d[i] = issue.keep ? d[i] + more : more;
    }
  }
}

bool is_poison(const float* d, size_t count) {
  const auto* const bytes = reinterpret_cast<const unsigned char*>(d);
  return std::all_of(bytes, bytes + count * sizeof(float), [](unsigned char byte) { return byte == kPoison; });
}

void complete(const Product& product, Warp& warp) {
  const std::string name = product.name;
  for (size_t i = 0; i < product.b.size(); ++i) {
    if (std::memcmp(product.b[i], &product.b_values[16 * i], 16) != 0) {
      fail(name + ": shared memory changed under a product that was not waited for: " + describe_address(product.b[i]));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (std::memcmp(product.a[lane], product.a_values[lane], sizeof(product.a_values[lane])) != 0) {
      fail(name + ": A changed under a product that was not waited for");
    }
    const auto result = warp.results.find(product.d[lane]);
    const std::vector<float>& values = result->second.values;
    if (!is_poison(product.d[lane], values.size())) {
      fail(name + ": D was written under a product that was not waited for");
    }
    if (--result->second.under_way == 0) {
      std::copy(values.begin(), values.end(), product.d[lane]);
      warp.results.erase(result);
    }
  }
}

}  // namespace

void issue_wgmma(const WgmmaIssue& issue) {
  Warp& warp = this_warps();
  if (!warp.fenced) {
    fail(std::string(issue.name) + ": no wgmma.fence since the last group of products");
  }
  std::vector<Instruction>& all = block.of_group[this_warp() / kWarpsInGroup];
  if (warp.issued == all.size()) {
    all.push_back({issue.name, issue.descriptor});
  } else if (all[warp.issued].name != issue.name || all[warp.issued].descriptor != issue.descriptor) {
    fail(std::string(issue.name) + ": diverged: warps of a warpgroup have different products");
  }
  ++warp.issued;
  Product product{issue.name, {}, {}, {}, pieces_of(issue), {}};
  product.b_values.resize(product.b.size() * 16);
  for (size_t i = 0; i < product.b.size(); ++i) {
    read_published(issue.name, &product.b_values[16 * i], product.b[i], 16);
  }
  const size_t count = issue.columns / 2;
  for (int lane = 0; lane < 32; ++lane) {
    product.d[lane] = issue.d[lane];
    product.a[lane] = issue.a[lane];
    std::memcpy(product.a_values[lane], issue.a[lane], sizeof(product.a_values[lane]));
    Result& result = warp.results[issue.d[lane]];
    if (result.under_way++ == 0) {
      result.values.assign(issue.d[lane], issue.d[lane] + count);
    } else if (!is_poison(issue.d[lane], count)) {
      fail(std::string(issue.name) + ": D was written under a product that was not waited for");
    }
    std::memset(issue.d[lane], kPoison, count * sizeof(float));
  }
  multiply(issue, product, warp);
  warp.groups.back().push_back(std::move(product));
}

namespace {

// An instruction of the whole warp that has no operands.
template <class Function>
void once_for_warp(const char* name, const Function& function) {
  char none = 0;
  aligned_collective(name, none, [&](char* const*) { function(this_warps()); });
}

}  // namespace

void wgmma_fence() {
  once_for_warp("wgmma.fence", [](Warp& warp) { warp.fenced = true; });
}

void wgmma_commit() {
  once_for_warp("wgmma.commit_group", [](Warp& warp) {
    warp.groups.emplace_back();
    warp.fenced = false;
  });
}

void wgmma_wait(size_t groups_in_flight) {
  once_for_warp("wgmma.wait_group", [=](Warp& warp) {
    for (; warp.groups.size() - 1 > groups_in_flight; warp.groups.pop_front()) {
      for (const Product& product : warp.groups.front()) {
        complete(product, warp);
      }
    }
  });
}

}  // namespace ferrum::emulation
