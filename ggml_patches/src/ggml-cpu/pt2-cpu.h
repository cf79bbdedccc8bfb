// CPU kernels of the ternary types: activations to Q8_T and dot products with them.
#pragma once

#include "ggml-pt2.h"

#ifdef __cplusplus
extern "C" {
#endif

// With the signatures of ggml_type_traits_cpu. k and n are multiples of QK_PT2.
void quantize_row_tq1_1(const float * x, void * y, int64_t k);
void quantize_row_tq2_1(const float * x, void * y, int64_t k);
void quantize_row_q8_t(const float * x, void * y, int64_t k);
void ggml_vec_dot_tq1_1_q8_t(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                             int nrc);
void ggml_vec_dot_tq2_1_q8_t(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                             int nrc);

// quantize_row_q8_t of x[perm[0]], ..., x[perm[k-1]]: the column permutation without a pass of its own.
void quantize_row_q8_t_gathered(const float * x, const int32_t * perm, void * y, int64_t k);

// The same functions in plain C, which the vectorised ones are tested against.
void quantize_row_q8_t_generic(const float * x, void * y, int64_t k);
void ggml_vec_dot_tq1_1_q8_t_generic(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,
                                     size_t by, int nrc);
void ggml_vec_dot_tq2_1_q8_t_generic(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,
                                     size_t by, int nrc);

#ifdef __cplusplus
}
#endif
