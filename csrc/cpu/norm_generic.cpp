#define FERRUM_LEVEL_GENERIC
#include "cpu/norm_kernels.h"
