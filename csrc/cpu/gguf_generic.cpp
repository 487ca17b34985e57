#define FERRUM_LEVEL_GENERIC
#include "cpu/gguf_kernels.h"
