// Products of the same activations, q, k and v for example, in one launch: the activations are quantized once, and
// the matrices' thread blocks fill the GPU together.
#pragma once

#include "pt2-cuda.cuh"

#include <climits>

static constexpr int PT2_GROUP = 3; // products at most

struct pt2_product {
    const char * x; // weights
    float * dst;
    const float * bias; // NULL, or like dst, or for experts one row of each
    int64_t s1;         // of dst, in elements
    int nrows;
    int first_block;
};

// A kernel's argument: each product has consecutive thread blocks of its own.
struct pt2_group {
    pt2_product products[PT2_GROUP];
    int n = 0;

    void add(const ggml_tensor * weights, const ggml_tensor * dst, const ggml_tensor * bias = nullptr) {
        GGML_ASSERT(n < PT2_GROUP);
        products[n++] = {
            (const char *) weights->data,        (float *) dst->data, bias ? (const float *) bias->data : nullptr,
            int64_t(dst->nb[1] / sizeof(float)), int(weights->ne[1]), 0
        };
    }

    // Chooses the products' thread blocks and returns how many there are.
    int place(const int rows_per_block) {
        int nblocks = 0;
        for (int i = 0; i < PT2_GROUP; ++i) {
            products[i].first_block = i < n ? nblocks : INT_MAX;
            nblocks += i < n ? (products[i].nrows + rows_per_block - 1) / rows_per_block : 0;
        }
        return nblocks;
    }

    __device__ __forceinline__ const pt2_product & of(const int block) const {
        int found = 0;
#pragma unroll
        for (int i = 1; i < PT2_GROUP; ++i) {
            found += block >= products[i].first_block;
        }
        return products[found];
    }
};

// A MUL_MAT, and the ADD behind it if there is a bias.
struct pt2_biased {
    ggml_tensor * product;
    const ggml_tensor * bias; // or NULL
    ggml_tensor * dst;        // of the two
};

// What node i + 1 adds to the MUL_MAT of one column that node i is, if nothing else needs that, or NULL.
const ggml_tensor * pt2_added_to(const ggml_cgraph * cgraph, int i);

// Activations that are x's RMS norm times weight.
struct pt2_norm {
    const ggml_tensor * x;
    const ggml_tensor * weight;
    float eps;
};

// in ggml_backend_cuda_graph_optimize: brings products of the same activations together, and keeps in memory what one
// token's attention reads.
void ggml_cuda_pt2_optimize_graph(int device, ggml_cgraph * cgraph,
                                  const struct ggml_backend_graph_optimize_params * params);

// in ggml_cuda_try_fuse: computes products from node i on, with the norm before and the GLU behind them, or one token's
// attention. How many nodes behind i it computed: 0 means that it did nothing.
int ggml_cuda_pt2_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);

// MUL_MATs of 1 to 8 columns, all of the same activations, type and column order, with their biases. norm: what the
// activations are, if they are not computed yet, or NULL.
void pt2_mul_mat_vec_group(ggml_backend_cuda_context & ctx, const pt2_biased * products, int n, const pt2_norm * norm);

// The GLU of two products, src[0] and src[1], of one column.
void pt2_mul_mat_vec_glu(ggml_backend_cuda_context & ctx, ggml_tensor * glu, const pt2_norm & norm);

// Quantized activations of a matvec, in memory of the context's pool.
struct pt2_vec_activations {
    const ggml_type type; // of the weights
    const int64_t nblocks, nblocks_padded, nrows;
    ggml_cuda_pool_alloc<int8_t> memory;
    int8_t * const qs;
    pt2_vec_scales * const scales;

    pt2_vec_activations(ggml_backend_cuda_context & ctx, ggml_type type, int64_t nblocks, int64_t nrows);
};

// Of x or, unless norm is NULL, of x's norm. perms: up to two different column orders (NULL: as they are), for one set
// of rows each.
void pt2_quantize_vec(const ggml_tensor * x, const pt2_norm * norm, const ggml_tensor * const * perms, int n_perms,
                      const pt2_vec_activations & y, cudaStream_t stream);

// A MUL_MAT of one column whose activations are quantized already.
void pt2_mul_mat_vec_quantized(ggml_backend_cuda_context & ctx, const pt2_biased & product,
                               const pt2_vec_activations & y);
