#define FERRUM_LEVEL_GENERIC
#include "cpu/moe_combine_kernels.h"
