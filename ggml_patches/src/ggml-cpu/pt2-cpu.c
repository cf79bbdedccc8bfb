// See pt2-cpu.h.
#include "pt2-cpu.h"

#include "ggml-impl.h"
#include "simd-mappings.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

void quantize_row_tq1_1(const float * x, void * y, int64_t k) {
    quantize_row_tq1_1_ref(x, y, k);
}

void quantize_row_tq2_1(const float * x, void * y, int64_t k) {
    quantize_row_tq2_1_ref(x, y, k);
}

// Activations ------------------------------------------------------------------------------------

static void quantize_block(const float * x, block_q8_t * y) {
    float amax = 0;
    for (int j = 0; j < QK_PT2; ++j) {
        amax = fmaxf(amax, fabsf(x[j]));
    }
    const float d = amax / 127;
    const bool zero = !(d >= FLT_MIN); // the inverse could be infinite
    int32_t sum = 0;
    for (int j = 0; j < QK_PT2; ++j) {
        // within bounds even for an infinite value, which makes the product NaN
        const float q = fminf(fmaxf(nearbyintf(x[j] * (1 / d)), -127), 127);
        y->qs[j] = zero ? 0 : (int8_t) q;
        sum += y->qs[j];
    }
    y->d = zero ? 0 : d;
    y->sum = y->d * sum;
}

void quantize_row_q8_t(const float * x, void * y, int64_t k) {
    assert(k % QK_PT2 == 0);
    for (int64_t i = 0; i < k / QK_PT2; ++i) {
        quantize_block(x + i * QK_PT2, (block_q8_t *) y + i);
    }
}

// Dot products -------------------------------------------------------------------------------------

// u*q summed over a block.
static int32_t dot_block_tq1_1(const uint8_t * qs, const block_q8_t * y) {
    int32_t sum = 0;
    for (int j = 0; j < 26; ++j) {
        uint8_t fraction = qs[j];
        for (int k = 0; k < (j < 24 ? 5 : 4); ++k) {
            const int column = j < 24 ? 24 * k + j : 120 + 2 * k + (j - 24);
            sum += (fraction * 3 >> 8) * y->qs[column];
            fraction *= 3;
        }
    }
    return sum;
}

static int32_t dot_block_tq2_1(const uint8_t * qs, const block_q8_t * y) {
    int32_t sum = 0;
    for (int k = 0; k < QK_PT2 / 32; ++k) {
        for (int j = 0; j < 32; ++j) {
            sum += (qs[j] >> 2 * k & 3) * y->qs[32 * k + j];
        }
    }
    return sum;
}

// Sums the blocks of a row. Both types start with alpha and mu.
static float dot_row(int n, const char * x, size_t block_size, const block_q8_t * y,
                     int32_t (*dot_block)(const uint8_t * qs, const block_q8_t * y)) {
    assert(n % QK_PT2 == 0);
    float sum = 0;
    for (int i = 0; i < n / QK_PT2; ++i, x += block_size) {
        ggml_fp16_t halves[2];
        memcpy(halves, x, sizeof(halves));
        const float alpha = GGML_CPU_FP16_TO_FP32(halves[0]);
        const float mu = GGML_CPU_FP16_TO_FP32(halves[1]);
        sum += alpha * y[i].d * dot_block((const uint8_t *) x + sizeof(halves), &y[i]) + (mu - alpha) * y[i].sum;
    }
    return sum;
}

void ggml_vec_dot_tq1_1_q8_t(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                             int nrc) {
    assert(nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    *s = dot_row(n, vx, sizeof(block_tq1_1), vy, dot_block_tq1_1);
}

void ggml_vec_dot_tq2_1_q8_t(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                             int nrc) {
    assert(nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    *s = dot_row(n, vx, sizeof(block_tq2_1), vy, dot_block_tq2_1);
}
