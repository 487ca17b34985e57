#define FERRUM_LEVEL_GENERIC
#include "cpu/gptq_gemm_kernels.h"
