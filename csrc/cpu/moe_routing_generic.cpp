#define FERRUM_LEVEL_GENERIC
#include "cpu/moe_routing_kernels.h"
