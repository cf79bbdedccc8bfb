// See pt2-cpu.h. With u = t + 1 the stored digit, and x = d*q the activations in groups of 32:
//     sum(w*x) = alpha * sum over groups of (d * sum(u*q)) + (mu - alpha) * sum(x)
// The integer sums are exact in every version, so versions differ only by the order in which
// floats are added.
#include "pt2-cpu.h"

#include "ggml-impl.h"
#include "simd-mappings.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

void quantize_row_tq1_1(const float * x, void * y, int64_t k) {
    quantize_row_tq1_1_ref(x, y, k);
}

void quantize_row_tq2_1(const float * x, void * y, int64_t k) {
    quantize_row_tq2_1_ref(x, y, k);
}

// The factors of sum(u*q) and sum(q).
typedef struct {
    float alpha;
    float offset;
} block_scales;

static inline block_scales load_scales(const char * block) {
    ggml_fp16_t alpha16, mu16;
    memcpy(&alpha16, block, sizeof(alpha16));
    memcpy(&mu16, block + 2, sizeof(mu16));
    const float alpha = GGML_CPU_FP16_TO_FP32(alpha16);
    const float mu = GGML_CPU_FP16_TO_FP32(mu16);
    return (block_scales) { alpha, mu - alpha };
}

// plain C ------------------------------------------------------------------------------------

static void quantize_block_q8_t_generic(const float * x, block_q8_t * y) {
    float sum = 0;
    for (int group = 0; group < QK_PT2 / 32; ++group, x += 32) {
        float amax = 0;
        for (int j = 0; j < 32; ++j) {
            const float a = fabsf(x[j]);
            amax = a > amax ? a : amax;
        }
        const float d = amax / 127;
        const float inverse = d > 0 ? 1 / d : 0;

        int32_t qsum = 0;
        for (int j = 0; j < 32; ++j) {
            // A subnormal d has an inverse that is off by enough to leave int8, or is infinite.
            const float q = rintf(fminf(fmaxf(x[j] * inverse, -127), 127));
            y->qs[32 * group + j] = (int8_t) q;
            qsum += y->qs[32 * group + j];
        }
        y->d[group] = d;
        sum += d * qsum;
    }
    y->sum = sum;
}

void quantize_row_q8_t_generic(const float * x, void * y, int64_t k) {
    assert(k % QK_PT2 == 0);
    for (int64_t i = 0; i < k / QK_PT2; ++i) {
        quantize_block_q8_t_generic(x + i * QK_PT2, (block_q8_t *) y + i);
    }
}

// d*u*q summed over a block: integers within a group, one float product for each group.
static float dot_block_tq1_1_generic(const uint8_t * qs, const block_q8_t * y) {
    int32_t sums[QK_PT2 / 32] = { 0 };
    for (int j = 0; j < 26; ++j) {
        uint8_t fraction = qs[j];
        for (int k = 0; k < (j < 24 ? 5 : 4); ++k) {
            const int column = j < 24 ? 24 * k + j : 120 + 2 * k + (j - 24);
            sums[column / 32] += (fraction * 3 >> 8) * y->qs[column];
            fraction *= 3;
        }
    }
    return y->d[0] * sums[0] + y->d[1] * sums[1] + y->d[2] * sums[2] + y->d[3] * sums[3];
}

static float dot_block_tq2_1_generic(const uint8_t * qs, const block_q8_t * y) {
    float sum = 0;
    for (int k = 0; k < QK_PT2 / 32; ++k) {
        int32_t plane = 0;
        for (int j = 0; j < 32; ++j) {
            plane += (qs[j] >> 2 * k & 3) * y->qs[32 * k + j];
        }
        sum += y->d[k] * plane;
    }
    return sum;
}

// Sums the blocks of a row. Both types start with alpha and mu; digits_dot is inlined.
typedef float (*digits_dot)(const uint8_t * qs, const block_q8_t * y);

static inline float dot_row_generic(int n, const char * x, size_t block_size, const block_q8_t * y, digits_dot dot) {
    assert(n % QK_PT2 == 0);
    float sum = 0;
    for (int i = 0; i < n / QK_PT2; ++i, x += block_size) {
        const block_scales scales = load_scales(x);
        sum += scales.alpha * dot((const uint8_t *) x + 4, &y[i]) + scales.offset * y[i].sum;
    }
    return sum;
}

void ggml_vec_dot_tq1_1_q8_t_generic(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,
                                     size_t by, int nrc) {
    assert(nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    *s = dot_row_generic(n, vx, sizeof(block_tq1_1), vy, dot_block_tq1_1_generic);
}

void ggml_vec_dot_tq2_1_q8_t_generic(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,
                                     size_t by, int nrc) {
    assert(nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    *s = dot_row_generic(n, vx, sizeof(block_tq2_1), vy, dot_block_tq2_1_generic);
}

// AVX2, with VNNI where there is ---------------------------------------------------------------

#if defined(__AVX2__)

static inline float horizontal_sum(__m256 v) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    h = _mm_add_ss(h, _mm_movehdup_ps(h));
    return _mm_cvtss_f32(h);
}

// acc + the sums of four products of digits u (0..2) and activations q. |q| <= 127, so the
// 16-bit pair sums of maddubs, at most 2*2*127, cannot saturate.
static inline __m256i dot_u8_i8(__m256i acc, __m256i u, __m256i q) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(acc, u, q);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, u, q);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, q), _mm256_set1_epi16(1)));
#endif
}

static inline float horizontal_max(__m256 v) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    h = _mm_max_ss(h, _mm_movehdup_ps(h));
    return _mm_cvtss_f32(h);
}

static inline int32_t horizontal_sum_i32(__m256i v) {
    __m128i h = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    h = _mm_add_epi32(h, _mm_unpackhi_epi64(h, h));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 1));
    return _mm_cvtsi128_si32(h);
}

static void quantize_block_q8_t(const float * x, block_q8_t * y) {
    const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const __m256 limit = _mm256_set1_ps(127);
    const __m256 minus = _mm256_set1_ps(-127);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    float sum = 0;
    for (int group = 0; group < QK_PT2 / 32; ++group, x += 32) {
        __m256 v[4];
        __m256 vmax = _mm256_setzero_ps();
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            vmax = _mm256_max_ps(_mm256_and_ps(v[i], absolute), vmax);
        }
        const float d = horizontal_max(vmax) / 127;
        const float inverse = d > 0 ? 1 / d : 0;

        __m256i q[4];
        for (int i = 0; i < 4; ++i) {
            const __m256 scaled = _mm256_mul_ps(v[i], _mm256_set1_ps(inverse));
            q[i] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(scaled, minus), limit));
        }
        const __m256i qsum = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
        const __m256i low = _mm256_packs_epi32(q[0], q[1]);
        const __m256i high = _mm256_packs_epi32(q[2], q[3]);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
        _mm256_storeu_si256((__m256i *) (y->qs + 32 * group), bytes);
        y->d[group] = d;
        sum += d * horizontal_sum_i32(qsum);
    }
    y->sum = sum;
}

// The next digit of every byte, floor(3*fraction/256): averages of bytes round up, and taking one
// off first makes them exact for all 256 values.
static inline __m256i next_digit(__m256i fraction) {
    const __m256i less = _mm256_subs_epu8(fraction, _mm256_set1_epi8(1));
    const __m256i three_quarters = _mm256_avg_epu8(less, _mm256_avg_epu8(less, _mm256_setzero_si256()));
    return _mm256_and_si256(_mm256_srli_epi16(three_quarters, 6), _mm256_set1_epi8(3));
}

static inline __m256i times_three(__m256i fraction) {
    return _mm256_add_epi8(fraction, _mm256_add_epi8(fraction, fraction));
}

// The sum, times d, of the products of digits u and activations q, added to acc lane by lane.
static inline __m256 add_products(__m256 acc, __m256i u, const int8_t * q, __m256 d) {
    const __m256i x = _mm256_loadu_si256((const __m256i *) q);
    const __m256i dot = dot_u8_i8(_mm256_setzero_si256(), u, x);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), d, acc);
}

// The eight columns of the last two bytes.
static inline __m256 dot_tail_tq1_1(const uint8_t * qs, const block_q8_t * y) {
    uint16_t pair;
    memcpy(&pair, qs, sizeof(pair));
    const __m128i powers = _mm_setr_epi16(1, 1, 3, 3, 9, 9, 27, 27);
    const __m128i bytes = _mm_cvtepu8_epi16(_mm_set1_epi16((int16_t) pair));
    const __m128i fraction = _mm_and_si128(_mm_mullo_epi16(bytes, powers), _mm_set1_epi16(255));
    const __m128i digits = _mm_srli_epi16(_mm_mullo_epi16(fraction, _mm_set1_epi16(3)), 8);
    const __m128i q = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *) (y->qs + 120)));
    const __m128 dot = _mm_cvtepi32_ps(_mm_madd_epi16(digits, q));
    return _mm256_zextps128_ps256(_mm_mul_ps(dot, _mm_set1_ps(y->d[3])));
}

static inline __m256 dot_block_tq1_1_avx2(const uint8_t * qs, const block_q8_t * y) {
    // The group of each lane's four columns, in each plane of 24.
    static const int32_t group[5][8] = {
        { 0, 0, 0, 0, 0, 0, 0, 0 }, // columns 0..31
        { 0, 0, 1, 1, 1, 1, 1, 1 }, // columns 24..55
        { 1, 1, 1, 1, 2, 2, 2, 2 }, // columns 48..79
        { 2, 2, 2, 2, 2, 2, 2, 2 }, // columns 72..103
        { 3, 3, 3, 3, 3, 3, 3, 3 }, // columns 96..127
    };
    const __m256 d = _mm256_castps128_ps256(_mm_loadu_ps(y->d));
    // 24 bytes and zeros: zero digits, so that the loads of q may run into the next plane.
    const __m128i low = _mm_loadu_si128((const __m128i *) qs);
    const __m128i high = _mm_loadl_epi64((const __m128i *) (qs + 16));
    __m256i fraction = _mm256_set_m128i(high, low);
    __m256 sum = dot_tail_tq1_1(qs + 24, y);
    for (int k = 0; k < 5; ++k) {
        const __m256i lanes = _mm256_loadu_si256((const __m256i *) group[k]);
        sum = add_products(sum, next_digit(fraction), y->qs + 24 * k, _mm256_permutevar8x32_ps(d, lanes));
        fraction = times_three(fraction);
    }
    return sum;
}

#if !(defined(__AVX512VNNI__) && defined(__AVX512BW__))
static inline __m256 dot_block_tq2_1_avx2(const uint8_t * qs, const block_q8_t * y) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i *) qs);
    __m256 sum = _mm256_setzero_ps();
    for (int k = 0; k < 4; ++k) {
        const __m256i digits = _mm256_and_si256(_mm256_srli_epi16(bytes, 2 * k), _mm256_set1_epi8(3));
        sum = add_products(sum, digits, y->qs + 32 * k, _mm256_set1_ps(y->d[k]));
    }
    return sum;
}
#endif

typedef __m256 (*digits_dot_avx2)(const uint8_t * qs, const block_q8_t * y);

static inline float dot_row_avx2(int n, const char * x, size_t block_size, const block_q8_t * y, digits_dot_avx2 dot) {
    assert(n % QK_PT2 == 0);
    __m256 sum = _mm256_setzero_ps();
    float offset = 0;
    for (int i = 0; i < n / QK_PT2; ++i, x += block_size) {
        const block_scales scales = load_scales(x);
        sum = _mm256_fmadd_ps(_mm256_set1_ps(scales.alpha), dot((const uint8_t *) x + 4, &y[i]), sum);
        offset += scales.offset * y[i].sum;
    }
    return horizontal_sum(sum) + offset;
}

#else

static void quantize_block_q8_t(const float * x, block_q8_t * y) {
    quantize_block_q8_t_generic(x, y);
}

#endif // __AVX2__

// AVX-512 VNNI: two planes of TQ2_1 at once ------------------------------------------------------

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

static inline float dot_row_tq2_1_avx512(int n, const block_tq2_1 * x, const block_q8_t * y) {
    assert(n % QK_PT2 == 0);
    const __m512i mask = _mm512_set1_epi8(3);
    const __m512i shift01 = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
    const __m512i shift23 = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(6), 1);
    const __m512i lanes01 = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(1), 1);
    const __m512i lanes23 = _mm512_inserti64x4(_mm512_set1_epi32(2), _mm256_set1_epi32(3), 1);
    __m512 sum = _mm512_setzero_ps();
    float offset = 0;
    for (int i = 0; i < n / QK_PT2; ++i) {
        const block_scales scales = load_scales((const char *) &x[i]);
        const __m512i bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) x[i].qs));
        const __m512i u01 = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift01), mask);
        const __m512i u23 = _mm512_and_si512(_mm512_srlv_epi16(bytes, shift23), mask);
        const __m512i dot01 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), u01, _mm512_loadu_si512(y[i].qs));
        const __m512i dot23 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), u23, _mm512_loadu_si512(y[i].qs + 64));
        // the four scales of the activations times alpha, spread over the lanes of their groups
        const __m512 d = _mm512_castps128_ps512(_mm_mul_ps(_mm_loadu_ps(y[i].d), _mm_set1_ps(scales.alpha)));
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot01), _mm512_permutexvar_ps(lanes01, d), sum);
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot23), _mm512_permutexvar_ps(lanes23, d), sum);
        offset += scales.offset * y[i].sum;
    }
    return _mm512_reduce_add_ps(sum) + offset;
}

#endif

// what ggml calls --------------------------------------------------------------------------------

void quantize_row_q8_t(const float * x, void * y, int64_t k) {
    assert(k % QK_PT2 == 0);
    for (int64_t i = 0; i < k / QK_PT2; ++i) {
        quantize_block_q8_t(x + i * QK_PT2, (block_q8_t *) y + i);
    }
}

void quantize_row_q8_t_gathered(const float * x, const int32_t * perm, void * y, int64_t k) {
    assert(k % QK_PT2 == 0);
    float gathered[QK_PT2];
    for (int64_t i = 0; i < k / QK_PT2; ++i) {
        for (int j = 0; j < QK_PT2; ++j) {
            gathered[j] = x[perm[i * QK_PT2 + j]];
        }
        quantize_block_q8_t(gathered, (block_q8_t *) y + i);
    }
}

void ggml_vec_dot_tq1_1_q8_t(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                             int nrc) {
    assert(nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
#if defined(__AVX2__)
    *s = dot_row_avx2(n, vx, sizeof(block_tq1_1), vy, dot_block_tq1_1_avx2);
#else
    *s = dot_row_generic(n, vx, sizeof(block_tq1_1), vy, dot_block_tq1_1_generic);
#endif
}

void ggml_vec_dot_tq2_1_q8_t(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                             int nrc) {
    assert(nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    *s = dot_row_tq2_1_avx512(n, vx, vy);
#elif defined(__AVX2__)
    *s = dot_row_avx2(n, vx, sizeof(block_tq2_1), vy, dot_block_tq2_1_avx2);
#else
    *s = dot_row_generic(n, vx, sizeof(block_tq2_1), vy, dot_block_tq2_1_generic);
#endif
}
