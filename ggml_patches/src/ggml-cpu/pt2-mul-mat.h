// MUL_MAT and MUL_MAT_ID with ternary weights on the CPU.
#pragma once

#include "ggml-backend.h"

// The buffer type in which ternary weights lie as panels (pt2-panel.h), which llama.cpp loads them into unless told not
// to repack. Being one of the CPU's extra buffer types, it also computes with weights in other buffers.
ggml_backend_buffer_type_t ggml_backend_cpu_pt2_buffer_type(void);

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_cgraph;

// Computes node `first` together with the products behind it that have the same activations, and says how many nodes
// behind it need nothing more; 0: it has not computed anything. Called by all threads.
int ggml_pt2_mul_mat_group(const struct ggml_compute_params * params, const struct ggml_cgraph * cgraph, int first);

#ifdef __cplusplus
}
#endif
