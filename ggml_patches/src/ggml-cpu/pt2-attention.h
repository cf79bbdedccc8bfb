// Attention on the CPU, of several rows (queries of heads that share keys and values) together where there are such.
#pragma once

struct ggml_compute_params;
struct ggml_tensor;

// Computes a FLASH_ATTN_EXT with all threads, in the scratch memory that the plan has for it. False, with nothing done,
// for operations that this is not made for, which llama.cpp then computes in its own ways: other types than F32 queries
// with F16 or F32 keys and values, heads that do not fill registers, one or two rows on NEON, one query with few
// heads for each thread, and instruction sets without vectors here.
bool pt2_flash_attn(const ggml_compute_params * params, ggml_tensor * dst);
