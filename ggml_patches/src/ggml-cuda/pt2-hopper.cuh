// What runs on Hopper only.
#pragma once

#include "pt2-attention.cuh"
#include "pt2-mmvq.cuh"

// pt2_mul_mat_hopper, many columns: products of the same activations, type and column order.
// pt2_mul_mat_vec_hopper, one column. pt2_attend_hopper, one token. All return false for what is not for them.
// pt2_attends_hopper: whether a device could be asked for the latter.
#if defined(PT2_HOPPER) // the compiler knows sm_90a
bool pt2_mul_mat_hopper(ggml_backend_cuda_context & ctx, ggml_tensor * const * dsts, int n);
bool pt2_mul_mat_vec_hopper(ggml_type type, const mmv_args & args, cudaStream_t stream);
bool pt2_attends_hopper(int device);
bool pt2_attend_hopper(ggml_backend_cuda_context & ctx, const pt2_attention & attention);
#else
static inline bool pt2_mul_mat_hopper(ggml_backend_cuda_context &, ggml_tensor * const *, int) {
    return false;
}
static inline bool pt2_mul_mat_vec_hopper(ggml_type, const mmv_args &, cudaStream_t) {
    return false;
}
static inline bool pt2_attends_hopper(int) {
    return false;
}
static inline bool pt2_attend_hopper(ggml_backend_cuda_context &, const pt2_attention &) {
    return false;
}
#endif
