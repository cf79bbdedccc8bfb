// Matmul for many columns on Hopper.
#pragma once

#include "pt2-cuda.cuh"

// Products of the same activations, type and column order; false: they are not for it.
#if defined(PT2_HOPPER) // the compiler knows sm_90a
bool pt2_mul_mat_hopper(ggml_backend_cuda_context & ctx, ggml_tensor * const * dsts, int n);
#else
static inline bool pt2_mul_mat_hopper(ggml_backend_cuda_context &, ggml_tensor * const *, int) {
    return false;
}
#endif
