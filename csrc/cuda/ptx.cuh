// The PTX instructions that CUDA C++ has no intrinsic for, each behind one function (PTX ISA 9.0). mma.cuh has the
// matrix products. Under emulation they are what tests/emulation/include/ptx_emulation.h says.
#pragma once

#include "cuda/launch.h"

namespace ferrum::cuda {

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#else
using emulation::shared_address;
#endif

// ---- copies from global to shared memory that run beside the thread

// Copies Bytes = 4, 8 or 16 bytes, of which those beyond `valid` are zeros and are not read. Both addresses are aligned
// to Bytes. They land before cp_async_wait lets the thread go on, and other threads see them after the next barrier.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#ifdef __CUDACC__
  if constexpr (Bytes == 16) {  // past L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)), "l"(global),
                 "n"(Bytes), "r"(valid)
                 : "memory");
  }
#else
  emulation::cp_async(shared, global, Bytes, valid);
#endif
}

// Weights that are read once should leave the second-level cache first, and others as anything else does.
__device__ __forceinline__ uint64_t weights_policy(bool read_once) {
#ifdef __CUDACC__
  uint64_t policy;
  if (read_once) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(policy));
  }
  return policy;
#else
  return 0;
#endif
}

__device__ __forceinline__ void cp_async_16_with_policy(void* shared, const void* global, uint64_t policy) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "l"(policy)
               : "memory");
#else
  emulation::cp_async(shared, global, 16, 16);
#endif
}

// Makes a group of the copies since the last one; a group may be empty.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

// Waits until at most `InFlight` of this thread's groups, the latest ones, are under way.
template <int InFlight>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(InFlight) : "memory");
#else
  emulation::wait_for_copies(InFlight);
#endif
}

// ---- 8x8 matrices of 16-bit numbers from shared memory into mma fragments

// Lane i gives the address of row i % 8 of matrix i / 8, aligned to 16 bytes; of Count = 1 or 2, the lanes beyond 8 *
// Count are ignored. Register m receives of matrix m the numbers 2 * (lane % 4) and the next of row lane / 4;
// transposed, of column lane / 4.
template <int Count, bool Transposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[Count], const void* row) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
#ifdef __CUDACC__
  const uint32_t at = shared_address(row);
  if constexpr (Count == 1 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n" : "=r"(r[0]) : "r"(at) : "memory");
  } else if constexpr (Count == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n" : "=r"(r[0]) : "r"(at) : "memory");
  } else if constexpr (Count == 2 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  } else if constexpr (Count == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  } else if constexpr (!Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  }
#else
  emulation::ldmatrix(r, Count, Transposed, row);
#endif
}

// ---- bits

// The same bits as another type, such as a register of two halves.
template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

// Any function of three bits, for all 32 at once: bit (4 * a + 2 * b + c) of Table is the result for those bits. Table
// is the same expression in 0xf0, 0xcc and 0xaa for a, b and c.
template <int Table>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return result;
#else
  return emulation::lop3(a, b, c, Table);
#endif
}

// Four of the eight bytes of (b, a), b the upper: each hexadecimal digit of `selector`, the lowest first, names one;
// with its top bit set, that byte's sign in all 8 bits.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDACC__
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
#else
  return emulation::prmt(a, b, selector);
#endif
}

// ---- global memory

// Reads what no thread writes during the kernel, once, without a place in the first-level cache.
__device__ __forceinline__ uint4 load_streaming(const uint4* from) {
#ifdef __CUDACC__
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
#else
  return *from;
#endif
}

__device__ __forceinline__ uint2 load_streaming(const uint2* from) {
#ifdef __CUDACC__
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
#else
  return *from;
#endif
}

__device__ __forceinline__ uint32_t load_streaming(const uint32_t* from) {
#ifdef __CUDACC__
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];\n" : "=r"(v) : "l"(from));
  return v;
#else
  return *from;
#endif
}

// Reads what other blocks have written: from the second-level cache.
__device__ __forceinline__ uint4 load_uncached(const uint4* from) {
#ifdef __CUDACC__
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
#else
  return *from;
#endif
}

__device__ __forceinline__ uint2 load_uncached(const uint2* from) {
#ifdef __CUDACC__
  uint2 v;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
  return v;
#else
  return *from;
#endif
}

// Adds and does not wait for the old value.
__device__ __forceinline__ void add_to(float* at, float x) {
#ifdef __CUDACC__
  asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(at), "f"(x) : "memory");
#else
  atomicAdd(at, x);
#endif
}

// Counts an arrival at `counter`, behind all earlier writes of this thread and, with a barrier before it, of its block,
// and returns how many came before. Who sees the last number may read what the others wrote.
__device__ __forceinline__ int count_arrival(int* counter) {
#ifdef __CUDACC__
  int before;
  asm volatile("atom.global.acq_rel.gpu.add.s32 %0, [%1], 1;\n" : "=r"(before) : "l"(counter) : "memory");
  return before;
#else
  return atomicAdd(counter, 1);
#endif
}

// ---- programmatic dependent launch, from sm_90 on: nothing before, or where the launch does not ask for it

// Waits until the kernel before this one on the stream has finished and its writes are visible. What
// Stream::launch_early starts has every thread call it, before all else but hints: memory may be written, and what is
// read may not be there.
__device__ __forceinline__ void wait_for_previous_kernel() {
#ifndef __CUDACC__
  emulation::wait_for_previous_grid();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Allows the kernel after this one on the stream to start, up to its own wait, once all blocks have said so. Said after
// this kernel's wait: more than two at once would only take each other's place.
__device__ __forceinline__ void start_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// A hint: brings `bytes`, a multiple of 16 at a multiple of 16, into the second-level cache, in which later writes find
// them. Nothing before sm_90.
__device__ __forceinline__ void prefetch_to_l2(const void* global, int bytes) {
#ifndef __CUDACC__
  emulation::prefetch(global, bytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(global), "r"(bytes) : "memory");
#endif
}

// What the kernel before this one may be writing: any value at all, fit for hints only.
__device__ __forceinline__ int32_t load_guess(const int32_t* from) {
#ifdef __CUDACC__
  int32_t v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];\n" : "=r"(v) : "l"(from) : "memory");
  return v;
#else
  return emulation::guess(from);
#endif
}

}  // namespace ferrum::cuda
