// Reference implementation of the ternary types: packing, dequantization, quantization from
// floats by iterative ternary fitting (PT2-LLM, Eq. 4, 5, 9 and 10), validation.
#include "ggml-pt2.h"

#include "ggml-impl.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>

// digits <-> bytes ---------------------------------------------------------------------------

static void pack_tq2_1(const uint8_t digits[QK_PT2], uint8_t qs[QK_PT2 / 4]) {
    for (int j = 0; j < QK_PT2 / 4; ++j) {
        qs[j] = digits[j] | digits[32 + j] << 2 | digits[64 + j] << 4 | digits[96 + j] << 6;
    }
}

static void unpack_tq2_1(const uint8_t qs[QK_PT2 / 4], uint8_t digits[QK_PT2]) {
    for (int j = 0; j < QK_PT2 / 4; ++j) {
        for (int k = 0; k < 4; ++k) {
            digits[32 * k + j] = qs[j] >> 2 * k & 3;
        }
    }
}

// The column of digit k of byte j.
static int column_tq1_1(int j, int k) {
    return j < 24 ? 24 * k + j : 120 + 2 * k + (j - 24);
}

static int digits_in_byte_tq1_1(int j) {
    return j < 24 ? 5 : 4;
}

static void pack_tq1_1(const uint8_t digits[QK_PT2], uint8_t qs[26]) {
    for (int j = 0; j < 26; ++j) {
        int value = 0;
        for (int k = 0; k < 5; ++k) {
            value = 3 * value + (k < digits_in_byte_tq1_1(j) ? digits[column_tq1_1(j, k)] : 0);
        }
        qs[j] = (value * 256 + 242) / 243;
    }
}

static void unpack_tq1_1(const uint8_t qs[26], uint8_t digits[QK_PT2]) {
    for (int j = 0; j < 26; ++j) {
        uint8_t fraction = qs[j];
        for (int k = 0; k < digits_in_byte_tq1_1(j); ++k) {
            digits[column_tq1_1(j, k)] = fraction * 3 >> 8;
            fraction *= 3;
        }
    }
}

// Both blocks are two scales followed by packed digits: all that differs is the packing.
typedef struct {
    ggml_fp16_t alpha;
    ggml_fp16_t mu;
    uint8_t qs[];
} block_head;

typedef struct {
    size_t block_size; // bytes
    void (*pack)(const uint8_t * digits, uint8_t * qs);
    void (*unpack)(const uint8_t * qs, uint8_t * digits);
} packing;

static const packing TQ1_1 = { sizeof(block_tq1_1), pack_tq1_1, unpack_tq1_1 };
static const packing TQ2_1 = { sizeof(block_tq2_1), pack_tq2_1, unpack_tq2_1 };

// dequantization -----------------------------------------------------------------------------

static void dequantize_row(const packing * type, const void * x, float * y, int64_t k) {
    assert(k % QK_PT2 == 0);
    uint8_t digits[QK_PT2];
    for (int64_t i = 0; i < k / QK_PT2; ++i) {
        const block_head * block = (const block_head *) ((const char *) x + i * type->block_size);
        const float alpha = GGML_FP16_TO_FP32(block->alpha);
        const float mu = GGML_FP16_TO_FP32(block->mu);
        type->unpack(block->qs, digits);
        for (int j = 0; j < QK_PT2; ++j) {
            y[i * QK_PT2 + j] = alpha * (digits[j] - 1) + mu; // an exact product: one rounding, fused or not
        }
    }
}

void dequantize_row_tq1_1(const block_tq1_1 * x, float * y, int64_t k) {
    dequantize_row(&TQ1_1, x, y, k);
}

void dequantize_row_tq2_1(const block_tq2_1 * x, float * y, int64_t k) {
    dequantize_row(&TQ2_1, x, y, k);
}

// quantization -------------------------------------------------------------------------------

#define FIT_MAX_ROUNDS 100 // the paper's cap; about 10 suffice
#define FP16_MAX       65504.0

typedef struct {
    double alpha;
    double mu;
    uint8_t digits[QK_PT2];
} ternary_fit;

// The least-squares alpha and mu for the digits as they are. With one digit in use the system is
// singular: the weights are then a constant, which mu alone carries.
static void fit_grid(const float * x, const float * importance, ternary_fit * fit) {
    double sw = 0, st = 0, stt = 0, sx = 0, sxt = 0;
    for (int j = 0; j < QK_PT2; ++j) {
        const double w = importance ? (double) importance[j] : 1;
        const double t = fit->digits[j] - 1;
        const double wx = w * (double) x[j];
        sw += w;
        st += w * t;
        stt += w * t * t;
        sx += wx;
        sxt += wx * t;
    }
    const double det = sw * stt - st * st;
    if (det > 1e-12 * sw * sw) {
        fit->alpha = (sw * sxt - st * sx) / det;
        fit->mu = (stt * sx - st * sxt) / det;
    } else {
        fit->alpha = 0;
        fit->mu = sw > 0 ? sx / sw : 0;
    }
}

// Rounds each weight to the nearest of mu - alpha, mu, mu + alpha. Returns whether a digit changed.
static bool round_to_grid(const float * x, ternary_fit * fit) {
    bool changed = false;
    for (int j = 0; j < QK_PT2; ++j) {
        const double above = (double) x[j] - fit->mu;
        const double half = fit->alpha / 2;
        const uint8_t digit = above > half ? 2 : above < -half ? 0 : 1;
        changed |= digit != fit->digits[j];
        fit->digits[j] = digit;
    }
    return changed;
}

static ternary_fit fit_block(const float * x, const float * importance) {
    ternary_fit fit;

    double total = 0;
    for (int j = 0; j < QK_PT2; ++j) {
        total += importance ? (double) importance[j] : 1;
    }
    if (!(total > 0)) {
        importance = NULL; // columns that calibration never saw: treat them alike
    }

    double mean = 0;
    for (int j = 0; j < QK_PT2; ++j) {
        mean += (double) x[j];
    }
    mean /= QK_PT2;
    double deviation = 0;
    for (int j = 0; j < QK_PT2; ++j) {
        deviation += fabs((double) x[j] - mean);
    }
    deviation /= QK_PT2;
    fit.mu = mean;
    fit.alpha = 2 * 0.75 * deviation; // rounding cuts at alpha/2: the threshold of Eq. 4
    round_to_grid(x, &fit);

    for (int round = 0; round < FIT_MAX_ROUNDS; ++round) {
        fit_grid(x, importance, &fit);
        if (fit.alpha < 0) { // t and -t are the same grid
            fit.alpha = -fit.alpha;
        }
        if (!round_to_grid(x, &fit)) {
            break;
        }
    }

    fit.alpha = fmin(fit.alpha, FP16_MAX);
    fit.mu = fmax(-FP16_MAX, fmin(fit.mu, FP16_MAX));
    return fit;
}

static void quantize_row(const packing * type, const float * x, const float * importance, void * y, int64_t k) {
    assert(k % QK_PT2 == 0);
    for (int64_t i = 0; i < k / QK_PT2; ++i) {
        const ternary_fit fit = fit_block(x + i * QK_PT2, importance ? importance + i * QK_PT2 : NULL);
        block_head * block = (block_head *) ((char *) y + i * type->block_size);
        block->alpha = GGML_FP32_TO_FP16(fit.alpha);
        block->mu = GGML_FP32_TO_FP16(fit.mu);
        type->pack(fit.digits, block->qs);
    }
}

static size_t quantize_rows(const packing * type, const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                            const float * importance) {
    const size_t row_size = n_per_row / QK_PT2 * type->block_size;
    for (int64_t row = 0; row < nrows; ++row) {
        quantize_row(type, src + row * n_per_row, importance, (char *) dst + row * row_size, n_per_row);
    }
    return nrows * row_size;
}

void quantize_row_tq1_1_ref(const float * x, block_tq1_1 * y, int64_t k) {
    quantize_row(&TQ1_1, x, NULL, y, k);
}

void quantize_row_tq2_1_ref(const float * x, block_tq2_1 * y, int64_t k) {
    quantize_row(&TQ2_1, x, NULL, y, k);
}

size_t quantize_tq1_1(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * quant_weights) {
    return quantize_rows(&TQ1_1, src, dst, nrows, n_per_row, quant_weights);
}

size_t quantize_tq2_1(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * quant_weights) {
    return quantize_rows(&TQ2_1, src, dst, nrows, n_per_row, quant_weights);
}

// validation ---------------------------------------------------------------------------------

static bool is_finite_fp16(ggml_fp16_t h) {
    return (h & 0x7c00) != 0x7c00;
}

static bool are_digits(const uint8_t digits[QK_PT2]) {
    for (int j = 0; j < QK_PT2; ++j) {
        if (digits[j] > 2) {
            return false;
        }
    }
    return true;
}

bool ggml_pt2_validate_row(enum ggml_type type, const void * data, size_t nbytes) {
    const packing * p = type == GGML_TYPE_TQ1_1 ? &TQ1_1 : &TQ2_1;
    uint8_t digits[QK_PT2];
    for (size_t i = 0; i < nbytes / p->block_size; ++i) {
        const block_head * block = (const block_head *) ((const char *) data + i * p->block_size);
        if (!is_finite_fp16(block->alpha) || !is_finite_fp16(block->mu)) {
            fprintf(stderr, "ggml_validate_row_data: block %zu of type %s has a scale that is not finite\n", i,
                    ggml_type_name(type));
            return false;
        }
        p->unpack(block->qs, digits);
        if (!are_digits(digits)) {
            fprintf(stderr, "ggml_validate_row_data: block %zu of type %s has a digit that is not 0, 1 or 2\n", i,
                    ggml_type_name(type));
            return false;
        }
    }
    return true;
}

// graph --------------------------------------------------------------------------------------

void ggml_mul_mat_set_perm(struct ggml_tensor * node, struct ggml_tensor * perm) {
    GGML_ASSERT(node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID);
    GGML_ASSERT(ggml_pt2_is_ternary(node->src[0]->type));
    GGML_ASSERT(perm->type == GGML_TYPE_I32 && ggml_nelements(perm) == node->src[0]->ne[0]);
    node->src[node->op == GGML_OP_MUL_MAT ? 2 : 3] = perm;
}
