#define FERRUM_LEVEL_GENERIC
#include "cpu/attention_kernels.h"
