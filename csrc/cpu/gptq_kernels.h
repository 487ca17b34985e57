// The gptq kernel of one instruction level, on raw pointers. No torch header here: the level files include this.
#pragma once

#include <cstdint>

namespace ferrum::cpu {

enum class GptqOutput { f32, f16, bf16 };

// One row of weights. A code is `(low[n] >> shift | high[n] << (32 - shift)) & mask`; high is null unless it crosses
// words.
struct GptqRow {
  const int32_t* low;
  const int32_t* high;
  int shift;
  uint32_t mask;
  const int32_t* zeros;  // of the row's group, one per column
  const float* scales;
  int64_t columns;
};

// out[n] = (code[n] - zeros[n]) * scales[n] in fp32, rounded to the output's type to nearest even.
using GptqRowKernel = void (*)(const GptqRow& row, GptqOutput type, void* out);

void gptq_row_generic(const GptqRow& row, GptqOutput type, void* out);
#if defined(__x86_64__)
void gptq_row_avx2(const GptqRow& row, GptqOutput type, void* out);
void gptq_row_avx512(const GptqRow& row, GptqOutput type, void* out);
#endif

}  // namespace ferrum::cpu
