#define FERRUM_LEVEL_GENERIC
#include "cpu/kv_cache_kernels.h"
