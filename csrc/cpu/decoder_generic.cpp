#define FERRUM_LEVEL_GENERIC
#include "cpu/decoder_kernels.h"
