// What the instructions of csrc/cuda/wgmma.cuh do.
#pragma once

#include "ptx_emulation.h"

namespace ferrum::emulation {

// A step of 16 along K, at most.
constexpr int kWgmmaRows = 16, kWgmmaMostColumns = 256;

// A product of a warp with all of B: rows of its warpgroup's A are its own, so that no other warp takes part.
struct WgmmaIssue {
  const char* name;
  int columns;
  uint64_t descriptor;
  bool keep;
  float* d[32];  // columns / 2 numbers of each lane
  const uint32_t* a[32];
  float (*number)(uint16_t bits);  // of T
};

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(size_t groups_in_flight);
// For a collective of the warp.
void issue_wgmma(const WgmmaIssue& issue);

template <class T>
void wgmma(const char* name, float* d, int columns, const uint32_t (&a)[4], uint64_t descriptor, bool keep) {
  struct Operand {
    float* d;
    const uint32_t* a;
    uint64_t descriptor;
    bool keep;
  } operand{d, a, descriptor, keep};
  aligned_collective(name, operand, [=](Operand* const* lanes) {
    WgmmaIssue issue{name, columns, lanes[0]->descriptor, lanes[0]->keep, {}, {}, [](uint16_t bits) {
                       return number(__builtin_bit_cast(T, bits));
                     }};
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane]->descriptor != issue.descriptor || lanes[lane]->keep != issue.keep) {
        fail(std::string(name) + ": lanes have different descriptors or scales of D");
      }
      issue.d[lane] = lanes[lane]->d;
      issue.a[lane] = lanes[lane]->a;
    }
    issue_wgmma(issue);
  });
}

}  // namespace ferrum::emulation
