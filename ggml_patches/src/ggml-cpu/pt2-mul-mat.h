// MUL_MAT and MUL_MAT_ID with ternary weights on the CPU.
#pragma once

#include "ggml-backend.h"

// The buffer type in which ternary weights lie as panels (pt2-panel.h), which llama.cpp loads them into unless told not
// to repack. Being one of the CPU's extra buffer types, it also computes with weights in other buffers.
ggml_backend_buffer_type_t ggml_backend_cpu_pt2_buffer_type(void);
