// Which products belong together, and with which norm and GLU. llama.cpp's graphs do with q what is done with q before
// they compute k; so the graph is reordered before memory is given to its tensors, and what then lies side by side is
// computed at once. Results may lie where the activations were: these are quantized before anything is written.
#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "mmvq.cuh"
#include "pt2-graph.h"
#include "pt2-group.cuh"
#include "pt2-hopper.cuh"

#include <algorithm>

// In how many nodes behind the first product others are looked for: q's norm and rotation come before k.
static constexpr int REACH = 24;

// Kernels load weights before the kernel in front of them has finished.
static bool is_weight(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE;
}

static bool is_product(const ggml_tensor * node) {
    if (!pt2_is_product(node)) {
        return false;
    }
    const ggml_tensor * perm = ggml_mul_mat_get_perm(node);
    return is_weight(node->src[0]) && (!perm || is_weight(perm)) && ggml_n_dims(node->src[0]) <= 2 &&
           ggml_n_dims(node->src[1]) <= 2;
}

static bool belong_together(const ggml_tensor * a, const ggml_tensor * b) {
    return is_product(b) && pt2_same_activations(a, b) && a->src[0]->type == b->src[0]->type &&
           a->src[0]->nb[1] == b->src[0]->nb[1] && a->src[0]->buffer == b->src[0]->buffer;
}

const ggml_tensor * pt2_added_to(const ggml_cgraph * cgraph, const int i) {
    if (!ggml_can_fuse(cgraph, i, { GGML_OP_MUL_MAT, GGML_OP_ADD })) {
        return nullptr;
    }
    const ggml_tensor * product = cgraph->nodes[i];
    const ggml_tensor * add = cgraph->nodes[i + 1];
    const ggml_tensor * other = add->src[0] == product ? add->src[1] : add->src[0];
    const bool fits = product->src[1]->ne[1] == 1 && other->type == GGML_TYPE_F32 &&
                      ggml_are_same_shape(other, product) && ggml_is_contiguous(other);
    return fits ? other : nullptr;
}

// The bias that node i + 1 adds to a product of one column, or NULL.
static const ggml_tensor * bias_of(const ggml_cgraph * cgraph, const int i) {
    const ggml_tensor * added = pt2_added_to(cgraph, i);
    return added && is_weight(added) ? added : nullptr;
}

// How many nodes a product takes.
static int size_of(const ggml_cgraph * cgraph, const int i) {
    return bias_of(cgraph, i) ? 2 : 1;
}

// For one column upstream computes a product together with the residual or, with its bias too, the GLU behind it.
static bool fuses_with_next(const ggml_cgraph * cgraph, const int i) {
    const int end = i + size_of(cgraph, i);
    const ggml_tensor * result = cgraph->nodes[end - 1];
    const ggml_tensor * next = end < cgraph->n_nodes ? cgraph->nodes[end] : nullptr;
    return next && result->ne[1] == 1 && (next->op == GGML_OP_ADD || next->op == GGML_OP_GLU) &&
           (next->src[0] == result || next->src[1] == result);
}

static bool writes_to(const ggml_tensor * node, const ggml_tensor * t) {
    return node->view_src && node->view_src == pt2_memory_of(t);
}

static void order_products(ggml_cgraph * cgraph) {
    for (int i = 0; i < cgraph->n_nodes; ++i) {
        const ggml_tensor * first = cgraph->nodes[i];
        if (!is_product(first) || fuses_with_next(cgraph, i)) {
            continue;
        }
        int end = i + size_of(cgraph, i);
        int n = 1;
        for (int j = end; j < std::min(i + REACH, cgraph->n_nodes) && n < PT2_GROUP; ++j) {
            if (writes_to(cgraph->nodes[j], first->src[1])) {
                break;
            }
            if (belong_together(first, cgraph->nodes[j]) && !fuses_with_next(cgraph, j)) {
                const int size = size_of(cgraph, j);
                std::rotate(cgraph->nodes + end, cgraph->nodes + j, cgraph->nodes + j + size);
                end += size;
                ++n;
            }
        }
        i = end - 1;
    }
}

void ggml_cuda_pt2_optimize_graph(const int device, ggml_cgraph * cgraph,
                                  const struct ggml_backend_graph_optimize_params * params) {
    order_products(cgraph);
    if (!pt2_attends_hopper(device)) {
        return;
    }
    pt2_attention attention;
    for (int i = 0; i < cgraph->n_nodes; ++i) {
        if (pt2_find_attention(cgraph, i, attention)) {
            pt2_for_each_input(attention, [&](const ggml_tensor * t) {
                params->add_alloc_dep(params->user_data, const_cast<ggml_tensor *>(t), attention.attn);
            });
        }
    }
}

// The norm whose result nodes i and i + 1 compute.
static bool is_norm(const ggml_cgraph * cgraph, const int i, pt2_norm & norm) {
    if (!ggml_can_fuse(cgraph, i, { GGML_OP_RMS_NORM, GGML_OP_MUL })) {
        return false;
    }
    const ggml_tensor * scaled = cgraph->nodes[i];
    const ggml_tensor * mul = cgraph->nodes[i + 1];
    norm.x = scaled->src[0];
    norm.weight = mul->src[0] == scaled ? mul->src[1] : mul->src[0];
    norm.eps = ggml_get_op_params_f32(scaled, 0);
    return norm.x->type == GGML_TYPE_F32 && norm.x->nb[0] == sizeof(float) && norm.x->nb[1] % sizeof(float4) == 0 &&
           (uintptr_t) norm.x->data % sizeof(float4) == 0 && is_weight(norm.weight) &&
           norm.weight->type == GGML_TYPE_F32 && ggml_nrows(norm.weight) == 1 && norm.weight->ne[0] == norm.x->ne[0] &&
           ggml_is_contiguous(norm.weight);
}

// Products that belong together.
struct found_products {
    pt2_biased all[PT2_GROUP];
    int n = 0;
    int n_nodes = 0;

    found_products(const ggml_cgraph * cgraph, const int first) {
        while (n < PT2_GROUP && first + n_nodes < cgraph->n_nodes) {
            const int i = first + n_nodes;
            if (!is_product(cgraph->nodes[i]) || !belong_together(cgraph->nodes[first], cgraph->nodes[i]) ||
                fuses_with_next(cgraph, i)) {
                break;
            }
            const int size = size_of(cgraph, i);
            ggml_tensor * dst = cgraph->nodes[i + size - 1];
            const auto in_the_way = [dst](const pt2_biased & other) { return pt2_overlap(dst, other.dst); };
            if (std::any_of(all, all + n, in_the_way)) {
                break;
            }
            all[n++] = { cgraph->nodes[i], bias_of(cgraph, i), dst };
            n_nodes += size;
        }
    }
};

// The GLU of two products of one column that nodes i to i + 2 compute, or NULL.
static ggml_tensor * find_glu(const ggml_cgraph * cgraph, const int i) {
    if (!ggml_can_fuse_subgraph(cgraph, i, { GGML_OP_MUL_MAT, GGML_OP_MUL_MAT, GGML_OP_GLU }, { i + 2 })) {
        return nullptr;
    }
    const ggml_tensor * gate = cgraph->nodes[i];
    const ggml_tensor * up = cgraph->nodes[i + 1];
    ggml_tensor * glu = cgraph->nodes[i + 2];
    const ggml_glu_op op = ggml_get_glu_op(glu);
    const bool known = op == GGML_GLU_OP_SWIGLU || op == GGML_GLU_OP_GEGLU || op == GGML_GLU_OP_SWIGLU_OAI ||
                       op == GGML_GLU_OP_SWIGLU_CLAMP;
    const bool swapped = ggml_get_op_params_i32(glu, 1);
    const bool fits = is_product(gate) && is_product(up) && gate->src[1] == up->src[1] && ggml_nrows(up) == 1 &&
                      gate->src[0]->type == up->src[0]->type && ggml_are_same_shape(gate->src[0], up->src[0]) &&
                      ggml_are_same_stride(gate->src[0], up->src[0]) && glu->src[0] == gate && glu->src[1] == up;
    return fits && known && !swapped ? glu : nullptr;
}

int ggml_cuda_pt2_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, const int i) {
    if (ctx.curr_stream_no != 0) { // the results may be for other streams too
        return 0;
    }
    pt2_attention attention;
    if (pt2_find_attention(cgraph, i, attention)) {
        if (const int n_nodes = pt2_attend_hopper(ctx, attention)) {
            return n_nodes - 1;
        }
    }
    pt2_norm norm;
    if (is_norm(cgraph, i, norm)) {
        const ggml_tensor * activations = cgraph->nodes[i + 1];
        if (ggml_tensor * glu = find_glu(cgraph, i + 2)) {
            if (glu->src[0]->src[1] != activations || !ggml_node_has_n_uses(cgraph, i + 1, 2)) {
                return 0;
            }
            pt2_mul_mat_vec_glu(ctx, glu, norm);
            return 4;
        }
        const found_products products(cgraph, i + 2);
        if (products.n == 0 || products.all[0].product->src[1] != activations ||
            activations->ne[1] > MMVQ_MAX_BATCH_SIZE || !ggml_node_has_n_uses(cgraph, i + 1, products.n)) {
            return 0;
        }
        pt2_mul_mat_vec_group(ctx, products.all, products.n, &norm);
        return 1 + products.n_nodes;
    }
    const found_products products(cgraph, i);
    if (products.n < 2) {
        return 0;
    }
    if (products.all[0].dst->ne[1] <= MMVQ_MAX_BATCH_SIZE) {
        pt2_mul_mat_vec_group(ctx, products.all, products.n, nullptr);
        return products.n_nodes - 1;
    }
    ggml_tensor * dsts[PT2_GROUP]; // of many columns, and so without biases
    std::transform(products.all, products.all + products.n, dsts, [](const pt2_biased & p) { return p.dst; });
    return pt2_mul_mat_hopper(ctx, dsts, products.n) ? products.n_nodes - 1 : 0;
}
