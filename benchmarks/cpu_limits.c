// What one core can do at best: prints GB/s of reading memory, and the 10^9 products of bytes a second that its
// dot-product instruction reaches (0 where it has none). cpu.py compiles it with -O3 -march=native.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#define BYTES  ((size_t) 1 << 29)
#define ROUNDS 5
#define CHAINS 12 // independent sums: more than the latency of an instruction
#define STEPS  4000000

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double) now.tv_sec + 1e-9 * (double) now.tv_nsec;
}

typedef uint64_t line __attribute__((vector_size(64))); // a cache line

static double read_bandwidth(void) {
    line * data = aligned_alloc(1 << 21, BYTES); // on huge pages, where the system gives them to what is aligned
    madvise(data, BYTES, MADV_HUGEPAGE);
    memset(data, 1, BYTES);
    double best = 0;
    for (int round = 0; round < ROUNDS; ++round) {
        const double begun = seconds();
        line sums[4] = { { 0 } };
        for (size_t i = 0; i < BYTES / sizeof(line); i += 4) {
            for (int j = 0; j < 4; ++j) {
                __builtin_prefetch(data + i + 128 + j);
                sums[j] ^= data[i + j];
            }
        }
        const line sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
        __asm__ volatile("" : : "m"(sum));
        const double rate = BYTES / (seconds() - begun) / 1e9;
        best = rate > best ? rate : best;
    }
    free(data);
    return best;
}

#if defined(__AVX512VNNI__)
typedef __m512i sums;
#define DOT(a, x) _mm512_dpbusd_epi32(a, x, x)
#define FILL(x)   _mm512_set1_epi8(x)
#define KEEP(a)   __asm__ volatile("" : "+v"(a))
#elif defined(__AVXVNNI__)
typedef __m256i sums;
#define DOT(a, x) _mm256_dpbusd_avx_epi32(a, x, x)
#define FILL(x)   _mm256_set1_epi8(x)
#define KEEP(a)   __asm__ volatile("" : "+x"(a))
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t sums;
#define DOT(a, x) vdotq_s32(a, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(x))
#define FILL(x)   vreinterpretq_s32_s8(vdupq_n_s8(x))
#define KEEP(a)   __asm__ volatile("" : "+w"(a))
#endif

static double dot_products(void) {
#if defined(DOT)
    double best = 0;
    for (int round = 0; round < ROUNDS; ++round) {
        sums a[CHAINS];
        for (int j = 0; j < CHAINS; ++j) {
            a[j] = FILL(0);
        }
        const sums x = FILL(1);
        const double begun = seconds();
        for (int i = 0; i < STEPS; ++i) {
#pragma GCC unroll 12
            for (int j = 0; j < CHAINS; ++j) {
                a[j] = DOT(a[j], x);
                KEEP(a[j]);
            }
        }
        const double rate = (double) STEPS * CHAINS * sizeof(sums) / (seconds() - begun) / 1e9;
        best = rate > best ? rate : best;
    }
    return best;
#else
    return 0;
#endif
}

int main(void) {
    const double bandwidth = read_bandwidth();
    printf("%.1f %.1f\n", bandwidth, dot_products());
    return 0;
}
