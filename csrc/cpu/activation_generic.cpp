#define FERRUM_LEVEL_GENERIC
#include "cpu/activation_kernels.h"
