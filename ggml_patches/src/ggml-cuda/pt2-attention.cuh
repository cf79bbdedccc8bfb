// Attention of one token in one launch: its query and key are normed and rotated, its key and value are written to
// the cache, and its heads attend to all that is there. Where only a product needs their result, it is quantized for
// it.
#pragma once

#include "pt2-group.cuh"

// A query or key, [head size, heads], before its norm and rotation.
struct pt2_heads {
    const ggml_tensor * x;
    const ggml_tensor * norm; // weight of the RMS norm of each head, or NULL
    float eps;
};

struct pt2_attention {
    pt2_heads q, k;
    const ggml_tensor * v;     // as it is written to the cache
    const ggml_tensor * rope;  // of q; k's is like it
    const ggml_tensor * set_k; // SET_ROWS of the new key and value
    const ggml_tensor * set_v;
    ggml_tensor * attn; // FLASH_ATTN_EXT
    int n_nodes;        // that it replaces
    pt2_biased output;  // the only product of its result, or product is NULL
    int n_nodes_output; // with the product
};

// Whether nodes from i on are one token's attention.
bool pt2_find_attention(const ggml_cgraph * cgraph, int i, pt2_attention & found);

// All that it reads, but for weights and the cache, must be in memory for as long as it runs.
template <typename F> void pt2_for_each_input(const pt2_attention & a, const F & f) {
    for (const ggml_tensor * t :
         { a.q.x, a.k.x, a.v, (const ggml_tensor *) a.rope->src[1], (const ggml_tensor *) a.set_k->src[1],
           (const ggml_tensor *) a.set_v->src[1], (const ggml_tensor *) a.attn->src[3] }) {
        f(t);
    }
}
