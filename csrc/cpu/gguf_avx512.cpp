#if defined(__x86_64__)
#define FERRUM_LEVEL_AVX512
#include "cpu/gguf_kernels.h"

FERRUM_END_LEVEL
#endif
