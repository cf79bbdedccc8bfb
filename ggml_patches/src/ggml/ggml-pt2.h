// Asymmetric ternary tensor types of pt2gguf: w = alpha*t + mu, t in {-1, 0, 1}.
//
// Rows are cut into blocks of 128 columns. The stored digit is u = t + 1 in {0, 1, 2}, so that
//     sum(w*x) = alpha * sum(u*x) + (mu - alpha) * sum(x)
// is an integer dot product plus the sum of the activations, which Q8_T blocks carry.
//
// This header is C and C++, and names everything that the hooks in upstream's files refer to.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QK_PT2 128

// TQ2_1, 2.25 bits per weight: bits 2k..2k+1 of qs[j] hold the digit of column 32k + j.
typedef struct {
    ggml_fp16_t alpha;
    ggml_fp16_t mu;
    uint8_t qs[QK_PT2 / 4];
} block_tq2_1;

// TQ1_1, 1.875 bits per weight: every byte holds base-3 digits, most significant first, as the
// fixed-point fraction ceil(256/243 * (81*d0 + 27*d1 + 9*d2 + 3*d3 + d4)), so that multiplying
// by 3 pushes the next digit out of the top of the byte.
//   qs[j], j < 24:     digit k is column 24k + j      (five planes of 24 columns)
//   qs[24+i], i < 2:   digit k is column 120 + 2k + i (four planes of 2 columns; d4 = 0)
// The planes start at multiples of 4 so that a group of four columns is one int8x4 dot product.
typedef struct {
    ggml_fp16_t alpha;
    ggml_fp16_t mu;
    uint8_t qs[QK_PT2 / 5 + 1];
} block_tq1_1;

// Activations for both, never stored in files: x = d*qs[j], and the sum of these x. With a scale for each 32 the
// kernel is slower; docs/speed.md has by how much, and what one for 128 costs in accuracy.
typedef struct {
    int8_t qs[QK_PT2];
    float d;
    float sum;
} block_q8_t;

#ifdef __cplusplus
static_assert(sizeof(block_tq2_1) == 36 && sizeof(block_tq1_1) == 30 && sizeof(block_q8_t) == 136, "block padding");
#else
_Static_assert(sizeof(block_tq2_1) == 36 && sizeof(block_tq1_1) == 30 && sizeof(block_q8_t) == 136, "block padding");
#endif

// The numbers of the types in GGUF files. They never change; the slots of enum ggml_type may.
#define PT2_FILE_TYPE_TQ1_1 0x50543201
#define PT2_FILE_TYPE_TQ2_1 0x50543202

// The file format version (key pt2.version) that this build reads and writes.
#define PT2_VERSION_KEY "pt2.version"
#define PT2_VERSION     1

// Number in a file -> slot. GGML_TYPE_COUNT for a number that names no type of a file: the slots
// of this build, so that no file can come to depend on them. Other numbers are upstream's.
static inline int32_t ggml_pt2_type_from_file(int32_t number) {
    switch (number) {
    case PT2_FILE_TYPE_TQ1_1:
        return GGML_TYPE_TQ1_1;
    case PT2_FILE_TYPE_TQ2_1:
        return GGML_TYPE_TQ2_1;
    case GGML_TYPE_TQ1_1:
    case GGML_TYPE_TQ2_1:
    case GGML_TYPE_Q8_T:
        return GGML_TYPE_COUNT;
    default:
        return number;
    }
}

static inline int32_t ggml_pt2_type_to_file(int32_t type) {
    switch (type) {
    case GGML_TYPE_TQ1_1:
        return PT2_FILE_TYPE_TQ1_1;
    case GGML_TYPE_TQ2_1:
        return PT2_FILE_TYPE_TQ2_1;
    default:
        return type;
    }
}

static inline bool ggml_pt2_is_ternary(enum ggml_type type) {
    return type == GGML_TYPE_TQ1_1 || type == GGML_TYPE_TQ2_1;
}

// The column permutation of a ternary MUL_MAT or MUL_MAT_ID node, or NULL: I32, one entry per
// column; stored column j multiplies element perm[j] of the activations' rows.
GGML_API void ggml_mul_mat_set_perm(struct ggml_tensor * node, struct ggml_tensor * perm);

static inline struct ggml_tensor * ggml_mul_mat_get_perm(const struct ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT ? node->src[2] : node->op == GGML_OP_MUL_MAT_ID ? node->src[3] : NULL;
}

// Reference implementations. k is a multiple of QK_PT2.
GGML_API void dequantize_row_tq1_1(const block_tq1_1 * x, float * y, int64_t k);
GGML_API void dequantize_row_tq2_1(const block_tq2_1 * x, float * y, int64_t k);
GGML_API void quantize_row_tq1_1_ref(const float * x, block_tq1_1 * y, int64_t k);
GGML_API void quantize_row_tq2_1_ref(const float * x, block_tq2_1 * y, int64_t k);

// With the signature of ggml-quants.h: quant_weights is NULL or n_per_row importances.
GGML_API size_t quantize_tq1_1(const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                               const float * quant_weights);
GGML_API size_t quantize_tq2_1(const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                               const float * quant_weights);

// Whether every scale is finite and every digit is 0, 1 or 2 (llama-cli --check-tensors).
GGML_API bool ggml_pt2_validate_row(enum ggml_type type, const void * data, size_t nbytes);

#ifdef __cplusplus
}
#endif
