#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FERRUM_LEVEL_AVX512
#include "cpu/attention.h"

// From here on: what is shared with the other files above must not use this instruction.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,avx512vnni")
#define FERRUM_ATTENTION_PAIRS
#include "cpu/attention_kernels.h"

FERRUM_END_LEVEL
#endif
