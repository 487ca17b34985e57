// The names ops register under: `torch.ops.ferrum`, and CUDA kernels for CUDA. The emulated build (tests/emulation)
// compiles the same sources as `torch.ops.ferrum_emulated`, whose "CUDA" kernels take CPU tensors.
#pragma once

#ifndef FERRUM_NAMESPACE
#define FERRUM_NAMESPACE ferrum
#endif

#ifndef FERRUM_CUDA_KEY
#define FERRUM_CUDA_KEY CUDA
#endif
