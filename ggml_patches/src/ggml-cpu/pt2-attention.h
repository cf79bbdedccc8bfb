// Attention of many queries at once on the CPU, in place of llama.cpp's own tiles.
#pragma once

struct ggml_compute_params;
struct ggml_tensor;

// Computes rows ir0 to ir1 - 1 (query, then head, then sequence, counted as llama.cpp does) of a FLASH_ATTN_EXT: what
// ggml_compute_forward_flash_attn_ext_tiled in ggml/src/ggml-cpu/ops.cpp does, under the same conditions and in the
// same scratch memory. False, with nothing done, where this has no vectors for the instruction set.
bool pt2_flash_attn_tiled(const ggml_compute_params * params, ggml_tensor * dst, int ir0, int ir1);
