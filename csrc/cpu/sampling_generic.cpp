#define FERRUM_LEVEL_GENERIC
#include "cpu/sampling_kernels.h"
