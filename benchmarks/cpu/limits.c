// What the machine can do: bytes read from memory and int8 multiply-adds per second, with a number of threads.
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

enum { PREFETCH_LINES = 64, SUMS = 4, ACCUMULATORS = 24 };

typedef uint64_t Line __attribute__((vector_size(64)));

// Each thread reads its part as one sequential stream of 64-byte lines.
static uint64_t read_part(const Line* begin, size_t lines) {
  Line sums[SUMS] = {{0}};
  for (size_t i = 0; i < lines; i += SUMS)
#pragma GCC unroll 4
    for (int s = 0; s < SUMS; ++s) {
      __builtin_prefetch(begin + i + s + PREFETCH_LINES, 0, 2);
      sums[s] += begin[i + s];
    }
  uint64_t sum = 0;
  for (int s = 0; s < SUMS; ++s)
    for (int j = 0; j < 8; ++j) sum += sums[s][j];
  return sum;
}

static size_t lines_of_a_thread(size_t bytes, int threads) { return bytes / sizeof(Line) / threads / SUMS * SUMS; }

// Filled memory on pages of one kind; 0 where the system has none of them.
void* filled(size_t bytes, int threads, int huge) {
  size_t lines = lines_of_a_thread(bytes, threads);
  Line* buffer = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (buffer == MAP_FAILED) return 0;
  if (madvise(buffer, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) && huge) {
    munmap(buffer, bytes);
    return 0;
  }
#pragma omp parallel for num_threads(threads)
  for (int t = 0; t < threads; ++t)
    for (size_t i = 0; i < lines; ++i) buffer[t * lines + i] = (Line){i};
  return buffer;
}

void freed(void* buffer, size_t bytes) { munmap(buffer, bytes); }

// Bytes per second of one pass over filled memory.
double read_bytes_per_second(const void* buffer, size_t bytes, int threads) {
  static volatile uint64_t sink;
  size_t lines = lines_of_a_thread(bytes, threads);
  uint64_t sum = 0;
  double start = omp_get_wtime();
#pragma omp parallel for num_threads(threads) reduction(+ : sum)
  for (int t = 0; t < threads; ++t) sum += read_part((const Line*)buffer + t * lines, lines);
  double seconds = omp_get_wtime() - start;
  sink = sum;
  return lines * threads * sizeof(Line) / seconds;
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
