// Activations of the ternary types in 8 bits (Q8_T), and plain dot products with them: the reference of
// the kernels in pt2-panel.h.
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

#ifdef __cplusplus
}
#endif
