#if defined(__x86_64__)
#define FERRUM_LEVEL_AVX512
#include "cpu/decoder_kernels.h"

FERRUM_END_LEVEL
#endif
