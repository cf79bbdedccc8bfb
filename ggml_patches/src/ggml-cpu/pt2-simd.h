// What the kernels need of an instruction set: registers of LANES floats or 32-bit integers. When weights
// are multiplied, each lane works for a row of them.
//
//   digits(p, k)       the digits of plane k in the packed bytes at p, four to a lane
//   dot(a, u, q)       a plus, in each lane, the sum of four products of digits u and activations q
//   for_next_plane(a)  sums over an even plane, such that the odd one after it can be added
//   to_float(a, b)     the sums over all planes, from those over the first two and over the last two
//   SUMS               of several columns, how many registers of sums are worked on at a time
//   HALVES_AT_ONCE     of the bytes, with sums of their own: how many are worked on at a time
//
// Where the instruction set multiplies unsigned bytes, the digits stay in place, so that those of
// plane k count 4^k times. All sums end up in units of the last plane; SUM_SCALE takes that back.
#pragma once

#include "simd-mappings.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

// Complete unrolling keeps arrays of registers in registers.
#if !(defined(__AVX2__) || (defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)))
#define UNROLL
#elif defined(__clang__)
#define UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 32")
#else
#define UNROLL
#endif

// Arrays of registers stay in registers within one function only.
#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define ALWAYS_INLINE __forceinline
#else
#define ALWAYS_INLINE inline
#endif

// Makes the compiler read again what the pointer points to, and leave the prefetches after it where they are. On NEON
// it would also unpack the digits of all planes at once, and spill them.
#if defined(__GNUC__) && defined(__ARM_NEON)
#define FORGET(pointer) __asm__ volatile("" : "+r"(pointer) : : "memory")
#elif defined(__GNUC__)
#define FORGET(pointer) __asm__("" : "+r"(pointer))
#else
#define FORGET(pointer) ((void) 0)
#endif

// Keeps a register a register: GCC would load it again from memory for each use.
#if defined(__GNUC__) && defined(__x86_64__)
#define KEEP(floats) __asm__("" : "+v"(floats))
#else
#define KEEP(floats) ((void) 0)
#endif

namespace { // internal, so that libraries for several instruction sets can be in one process

constexpr size_t LINE = 64;

enum cache { L2 = 2, L1 = 3 }; // as __builtin_prefetch numbers them

template <cache level> inline void prefetch(const void * data, size_t begin, size_t end) {
#if defined(__GNUC__)
    for (size_t at = begin; at < end; at += LINE) {
        __builtin_prefetch((const char *) data + at, 0, level);
    }
#else
    (void) data;
    (void) begin;
    (void) end;
#endif
}

// Weights come from memory once for each token that is decoded, and are asked for so many blocks ahead, which leads
// into the next panel where there is one. Left to themselves most processors reach half to two thirds of the bandwidth.
constexpr int PREFETCH_BLOCKS = 8;

inline int32_t four_bytes(const int8_t * q) {
    int32_t four;
    memcpy(&four, q, sizeof(four));
    return four;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int LANES = 16;
constexpr int SUMS = 8;
constexpr int HALVES_AT_ONCE = 2; // eight sums alone would wait for each other
constexpr float SUM_SCALE = 1.0f / 64;

using bytes = __m512i;
using sums = __m512i;
using floats = __m512;

inline bytes digits(const uint8_t * p, int k) {
    return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8((char) (3 << 2 * k)));
}

inline bytes four_activations(const int8_t * q) {
    return _mm512_set1_epi32(four_bytes(q));
}

inline sums no_sums() {
    return _mm512_setzero_si512();
}

inline sums dot(sums a, bytes u, bytes q) {
    return _mm512_dpbusd_epi32(a, u, q);
}

inline sums for_next_plane(sums a) {
    return _mm512_slli_epi32(a, 2);
}

inline floats to_float(sums a, sums b) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(a, 4), b));
}

inline floats broadcast(float x) {
    return _mm512_set1_ps(x);
}

inline floats from_half(const ggml_fp16_t * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}

inline floats multiply(floats a, floats b) {
    return _mm512_mul_ps(a, b);
}

inline floats multiply_add(floats a, floats b, floats c) {
    return _mm512_fmadd_ps(a, b, c);
}

inline floats load(const float * p) {
    return _mm512_loadu_ps(p);
}

inline void store(float * p, floats a) {
    _mm512_storeu_ps(p, a);
}

inline floats add(floats a, floats b) {
    return _mm512_add_ps(a, b);
}

inline floats subtract(floats a, floats b) {
    return _mm512_sub_ps(a, b);
}

inline floats larger(floats a, floats b) {
    return _mm512_max_ps(a, b);
}

// Rows become columns.
ALWAYS_INLINE void transpose(floats (&a)[LANES]) {
    floats b[LANES];
    UNROLL
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL
    for (int i = 0; i < LANES; i += 4) {
        UNROLL
        for (int j = 0; j < 2; ++j) {
            const __m512d low = _mm512_castps_pd(b[i + j]);
            const __m512d high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    // Every register has one column of four rows in each quarter; quarters i of the four groups belong together.
    UNROLL
    for (int i = 0; i < 4; ++i) {
        const floats even = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        const floats odd = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        const floats later_even = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        const floats later_odd = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
        b[i] = _mm512_shuffle_f32x4(even, later_even, 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(odd, later_odd, 0x88);
        b[i + 8] = _mm512_shuffle_f32x4(even, later_even, 0xdd);
        b[i + 12] = _mm512_shuffle_f32x4(odd, later_odd, 0xdd);
    }
    UNROLL
    for (int i = 0; i < LANES; ++i) {
        a[i] = b[i];
    }
}

inline floats larger_magnitude(floats a, floats b) {
    return _mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b));
}

inline float largest(floats a) {
    return _mm512_reduce_max_ps(a);
}

inline float total(floats a) {
    return _mm512_reduce_add_ps(a);
}

// The nearest integers, stored as bytes, and their values.
inline floats store_rounded(int8_t * p, floats a) {
    const __m512i integers = _mm512_cvtps_epi32(a);
    _mm_storeu_si128((__m128i *) p, _mm512_cvtepi32_epi8(integers));
    return _mm512_cvtepi32_ps(integers);
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int LANES = 8;
constexpr int SUMS = 8;
constexpr int HALVES_AT_ONCE = 1;

using bytes = __m256i;
using sums = __m256i;
using floats = __m256;

#if defined(__AVXVNNI__)

constexpr float SUM_SCALE = 1.0f / 64;

inline bytes digits(const uint8_t * p, int k) {
    return _mm256_and_si256(_mm256_loadu_si256((const __m256i *) p), _mm256_set1_epi8((char) (3 << 2 * k)));
}

inline sums dot(sums a, bytes u, bytes q) {
    return _mm256_dpbusd_avx_epi32(a, u, q);
}

inline sums for_next_plane(sums a) {
    return _mm256_slli_epi32(a, 2);
}

inline floats to_float(sums a, sums b) {
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(a, 4), b));
}

#else

// Sums stay 16 bits wide, two to a lane: the eight steps of two planes, with digits up to 2*4, reach 2*8*2*8*127 =
// 32512. (Digits of 3, which only damaged files have, would wrap.) The last two planes are shifted to where the first
// two are.
constexpr float SUM_SCALE = 1.0f / 4;

inline bytes digits(const uint8_t * p, int k) {
    const __m256i packed = _mm256_loadu_si256((const __m256i *) p);
    return _mm256_and_si256(k < 2 ? packed : _mm256_srli_epi16(packed, 4), _mm256_set1_epi8((char) (3 << 2 * (k % 2))));
}

inline sums dot(sums a, bytes u, bytes q) {
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(u, q));
#if defined(__GNUC__)
    // Compilers that add in another order need more registers than there are, which cost a third of the speed.
    __asm__("" : "+x"(a));
#endif
    return a;
}

inline sums for_next_plane(sums a) {
    return _mm256_slli_epi16(a, 2);
}

inline floats to_float(sums a, sums b) {
    const __m256i one = _mm256_set1_epi16(1);
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one)));
}

#endif

inline bytes four_activations(const int8_t * q) {
    return _mm256_set1_epi32(four_bytes(q));
}

inline sums no_sums() {
    return _mm256_setzero_si256();
}

inline floats broadcast(float x) {
    return _mm256_set1_ps(x);
}

inline floats from_half(const ggml_fp16_t * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
}

inline floats multiply(floats a, floats b) {
    return _mm256_mul_ps(a, b);
}

inline floats multiply_add(floats a, floats b, floats c) {
    return _mm256_fmadd_ps(a, b, c);
}

inline floats load(const float * p) {
    return _mm256_loadu_ps(p);
}

inline void store(float * p, floats a) {
    _mm256_storeu_ps(p, a);
}

inline floats add(floats a, floats b) {
    return _mm256_add_ps(a, b);
}

inline floats subtract(floats a, floats b) {
    return _mm256_sub_ps(a, b);
}

inline floats larger(floats a, floats b) {
    return _mm256_max_ps(a, b);
}

// Rows become columns.
ALWAYS_INLINE void transpose(floats (&a)[LANES]) {
    floats b[LANES];
    UNROLL
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL
    for (int i = 0; i < LANES; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    UNROLL
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
    }
    UNROLL
    for (int i = 0; i < LANES; ++i) {
        a[i] = b[i];
    }
}

inline floats larger_magnitude(floats a, floats b) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return _mm256_max_ps(_mm256_andnot_ps(sign, a), _mm256_andnot_ps(sign, b));
}

inline float largest(floats a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline float total(floats a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// The nearest integers, stored as bytes, and their values.
inline floats store_rounded(int8_t * p, floats a) {
    const __m256i integers = _mm256_cvtps_epi32(a);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
    _mm_storel_epi64((__m128i *) p, _mm_packs_epi16(words, words));
    return _mm256_cvtepi32_ps(integers);
}

#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)

constexpr int LANES = 4;
constexpr int SUMS = 8;
constexpr int HALVES_AT_ONCE = 1;
constexpr float SUM_SCALE = 1;

using bytes = int8x16_t;
using sums = int32x4_t;
using floats = float32x4_t;

inline bytes digits(const uint8_t * p, int k) {
    const uint8x16_t shifted = vshlq_u8(vld1q_u8(p), vdupq_n_s8((int8_t) (-2 * k)));
    return vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8(3)));
}

inline bytes four_activations(const int8_t * q) {
    return vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(q)));
}

inline sums no_sums() {
    return vdupq_n_s32(0);
}

inline sums dot(sums a, bytes u, bytes q) {
    return vdotq_s32(a, u, q);
}

inline sums for_next_plane(sums a) {
    return a;
}

inline floats to_float(sums a, sums b) {
    return vcvtq_f32_s32(vaddq_s32(a, b));
}

inline floats broadcast(float x) {
    return vdupq_n_f32(x);
}

inline floats from_half(const ggml_fp16_t * p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

inline floats multiply(floats a, floats b) {
    return vmulq_f32(a, b);
}

inline floats multiply_add(floats a, floats b, floats c) {
    return vfmaq_f32(c, a, b);
}

inline floats load(const float * p) {
    return vld1q_f32(p);
}

inline void store(float * p, floats a) {
    vst1q_f32(p, a);
}

inline floats add(floats a, floats b) {
    return vaddq_f32(a, b);
}

inline floats subtract(floats a, floats b) {
    return vsubq_f32(a, b);
}

inline floats larger(floats a, floats b) {
    return vmaxq_f32(a, b);
}

// Rows become columns.
ALWAYS_INLINE void transpose(floats (&a)[LANES]) {
    const float32x4x2_t top = vtrnq_f32(a[0], a[1]);
    const float32x4x2_t bottom = vtrnq_f32(a[2], a[3]);
    a[0] = vcombine_f32(vget_low_f32(top.val[0]), vget_low_f32(bottom.val[0]));
    a[1] = vcombine_f32(vget_low_f32(top.val[1]), vget_low_f32(bottom.val[1]));
    a[2] = vcombine_f32(vget_high_f32(top.val[0]), vget_high_f32(bottom.val[0]));
    a[3] = vcombine_f32(vget_high_f32(top.val[1]), vget_high_f32(bottom.val[1]));
}

inline floats larger_magnitude(floats a, floats b) {
    return vmaxq_f32(vabsq_f32(a), vabsq_f32(b));
}

inline float largest(floats a) {
    return vmaxvq_f32(a);
}

inline float total(floats a) {
    return vaddvq_f32(a);
}

// The nearest integers, stored as bytes, and their values.
inline floats store_rounded(int8_t * p, floats a) {
    const int32x4_t integers = vcvtnq_s32_f32(a);
    const int16x4_t words = vmovn_s32(integers);
    const int32x2_t four = vreinterpret_s32_s8(vmovn_s16(vcombine_s16(words, words)));
    vst1_lane_s32((int32_t *) p, four, 0);
    return vcvtq_f32_s32(integers);
}

#else

#define PT2_PLAIN

// Plain C++: one column at a time, so that compilers find what to vectorize.
constexpr int LANES = 4;
constexpr int SUMS = 1;
constexpr int HALVES_AT_ONCE = 1;
constexpr float SUM_SCALE = 1;

struct bytes {
    int8_t v[16];
};

struct sums {
    int32_t v[4];
};

struct floats {
    float v[4];
};

inline bytes digits(const uint8_t * p, int k) {
    bytes u;
    for (int i = 0; i < 16; ++i) {
        u.v[i] = p[i] >> 2 * k & 3;
    }
    return u;
}

inline bytes four_activations(const int8_t * q) {
    bytes x;
    for (int i = 0; i < 16; ++i) {
        x.v[i] = q[i % 4];
    }
    return x;
}

inline sums no_sums() {
    return { { 0, 0, 0, 0 } };
}

inline sums dot(sums a, bytes u, bytes q) {
    for (int i = 0; i < 16; ++i) {
        a.v[i / 4] += u.v[i] * q.v[i];
    }
    return a;
}

inline sums for_next_plane(sums a) {
    return a;
}

inline floats to_float(sums a, sums b) {
    floats x;
    for (int i = 0; i < 4; ++i) {
        x.v[i] = (float) (a.v[i] + b.v[i]);
    }
    return x;
}

inline floats broadcast(float x) {
    return { { x, x, x, x } };
}

inline floats from_half(const ggml_fp16_t * p) {
    floats a;
    for (int i = 0; i < 4; ++i) {
        a.v[i] = GGML_CPU_FP16_TO_FP32(p[i]);
    }
    return a;
}

inline floats multiply(floats a, floats b) {
    for (int i = 0; i < 4; ++i) {
        a.v[i] *= b.v[i];
    }
    return a;
}

inline floats multiply_add(floats a, floats b, floats c) {
    for (int i = 0; i < 4; ++i) {
        c.v[i] += a.v[i] * b.v[i];
    }
    return c;
}

inline floats load(const float * p) {
    floats a;
    memcpy(a.v, p, sizeof(a.v));
    return a;
}

inline void store(float * p, floats a) {
    memcpy(p, a.v, sizeof(a.v));
}

inline floats larger_magnitude(floats a, floats b) {
    for (int i = 0; i < 4; ++i) {
        a.v[i] = fmaxf(fabsf(a.v[i]), fabsf(b.v[i]));
    }
    return a;
}

inline float largest(floats a) {
    return fmaxf(fmaxf(a.v[0], a.v[1]), fmaxf(a.v[2], a.v[3]));
}

inline float total(floats a) {
    return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]);
}

// The nearest integers, stored as bytes, and their values.
inline floats store_rounded(int8_t * p, floats a) {
    for (int i = 0; i < 4; ++i) {
        a.v[i] = fminf(fmaxf(nearbyintf(a.v[i]), -127), 127); // a NaN has no integer
        p[i] = (int8_t) a.v[i];
    }
    return a;
}

#endif

} // namespace
