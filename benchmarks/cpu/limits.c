// What the machine can do: bytes read from memory and int8 multiply-adds per second, with a number of threads.
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

enum { STREAMS = 2, PREFETCH_LINES = 64, ACCUMULATORS = 24 };

typedef uint64_t Line __attribute__((vector_size(64)));

// Each thread reads its part as several sequential streams of 64-byte lines.
static uint64_t read_part(const Line* begin, size_t lines) {
  size_t length = lines / STREAMS;
  Line sums[STREAMS] = {{0}};
  for (size_t i = 0; i < length; ++i)
#pragma GCC unroll 2
    for (int s = 0; s < STREAMS; ++s) {
      const Line* line = begin + s * length + i;
      __builtin_prefetch(line + PREFETCH_LINES, 0, 0);
      sums[s] += *line;
    }
  uint64_t sum = 0;
  for (int s = 0; s < STREAMS; ++s)
    for (int j = 0; j < 8; ++j) sum += sums[s][j];
  return sum;
}

// The fastest of `repeats` passes over `bytes`, on huge pages where the system gives them, in bytes per second.
double read_bytes_per_second(size_t bytes, int threads, int repeats) {
  bytes -= bytes % ((size_t)threads * STREAMS * sizeof(Line));
  Line* buffer = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (buffer == MAP_FAILED) return 0;
  madvise(buffer, bytes, MADV_HUGEPAGE);
  size_t lines = bytes / sizeof(Line) / threads;
#pragma omp parallel for num_threads(threads)
  for (int t = 0; t < threads; ++t)
    for (size_t i = 0; i < lines; ++i) buffer[t * lines + i] = (Line){i};
  double best = 0;
  volatile uint64_t sink = 0;
  for (int r = 0; r < repeats; ++r) {
    uint64_t sum = 0;
    double start = omp_get_wtime();
#pragma omp parallel for num_threads(threads) reduction(+ : sum)
    for (int t = 0; t < threads; ++t) sum += read_part(buffer + t * lines, lines);
    double rate = bytes / (omp_get_wtime() - start);
    if (rate > best) best = rate;
    sink += sum;
  }
  munmap(buffer, bytes);
  return best;
}

// Multiplications and additions per second of vpdpbusd on 512-bit registers; 0 where the instruction is missing.
double int8_ops_per_second(int threads, int repeats) {
  double best = 0;
#if defined(__AVX512VNNI__)
  enum { ITERATIONS = 1 << 21 };
  for (int r = 0; r < repeats; ++r) {
    double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
      __m512i sums[ACCUMULATORS];
      __m512i a = _mm512_set1_epi32(omp_get_thread_num() + 1), b = _mm512_set1_epi8(1);
#pragma GCC unroll 24
      for (int j = 0; j < ACCUMULATORS; ++j) sums[j] = _mm512_set1_epi32(j);  // unlike, or they are one
      for (int i = 0; i < ITERATIONS; ++i) {
#pragma GCC unroll 24
        for (int j = 0; j < ACCUMULATORS; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], a, b);
        __asm__ volatile("" : "+v"(a), "+v"(b));  // nothing moves out of the loop
      }
#pragma GCC unroll 24
      for (int j = 0; j < ACCUMULATORS; ++j) __asm__ volatile("" : : "v"(sums[j]));  // used
    }
    double seconds = omp_get_wtime() - start;
    double rate = 2.0 * 64 * ACCUMULATORS * ITERATIONS * threads / seconds;
    if (rate > best) best = rate;
  }
#endif
  return best;
}
