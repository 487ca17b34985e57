#define FERRUM_LEVEL_GENERIC
#include "cpu/rope_kernels.h"
