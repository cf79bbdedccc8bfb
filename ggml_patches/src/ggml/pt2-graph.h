// What the backends ask about nodes when they compute several products at once.
#pragma once

#include "ggml-pt2.h"

static inline bool pt2_is_product(const struct ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT && ggml_pt2_is_ternary(node->src[0]->type) &&
           (node->flags & GGML_TENSOR_FLAG_COMPUTE);
}

// Whether their activations are the same, in the same order of columns.
static inline bool pt2_same_activations(const struct ggml_tensor * a, const struct ggml_tensor * b) {
    return a->src[1] == b->src[1] && ggml_mul_mat_get_perm(a) == ggml_mul_mat_get_perm(b);
}

// The tensor in whose memory it is.
static inline const struct ggml_tensor * pt2_memory_of(const struct ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

static inline bool pt2_overlap(const struct ggml_tensor * a, const struct ggml_tensor * b) {
    const char * a_data = (const char *) a->data;
    const char * b_data = (const char *) b->data;
    return a_data < b_data + ggml_nbytes(b) && b_data < a_data + ggml_nbytes(a);
}
