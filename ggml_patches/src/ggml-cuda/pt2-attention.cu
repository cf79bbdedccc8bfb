// Which nodes are the attention of one token. Between the products and the attention llama.cpp's graphs have the norms
// of some models, the rotations, and what writes to the cache, in this order.
#include "ggml-impl.h"
#include "pt2-attention.cuh"
#include "pt2-graph.h"

// The next node that is computed, if it does this.
static ggml_tensor * take(const ggml_cgraph * cgraph, int & at, const ggml_op op) {
    while (at < cgraph->n_nodes && ggml_op_is_empty(cgraph->nodes[at]->op)) {
        ++at;
    }
    if (at == cgraph->n_nodes || cgraph->nodes[at]->op != op ||
        !(cgraph->nodes[at]->flags & GGML_TENSOR_FLAG_COMPUTE)) {
        return nullptr;
    }
    return cgraph->nodes[at++];
}

// The same, of a node whose result nothing else needs.
static ggml_tensor * take_inner(const ggml_cgraph * cgraph, int & at, const ggml_op op) {
    int behind = at;
    ggml_tensor * node = take(cgraph, behind, op);
    if (!node || !ggml_node_has_n_uses(cgraph, behind - 1, 1)) {
        return nullptr;
    }
    at = behind;
    return node;
}

static bool is_all_of(const ggml_tensor * view, const ggml_tensor * t) {
    return view == t || (view->view_src == t && view->view_offs == 0 && ggml_nelements(view) == ggml_nelements(t));
}

// Whether it is there before the graph is computed: the kernel reads it before those in front of it have finished.
static bool is_given(const ggml_tensor * t) {
    return pt2_memory_of(t)->op == GGML_OP_NONE;
}

static bool is_of_one_token(const ggml_tensor * x) {
    return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[2] == 1 && x->ne[3] == 1;
}

// A norm, if there is one, and a rotation.
static const ggml_tensor * take_rotated(const ggml_cgraph * cgraph, int & at, pt2_heads & heads) {
    heads = {};
    const ggml_tensor * normed = nullptr;
    if (const ggml_tensor * norm = take_inner(cgraph, at, GGML_OP_RMS_NORM)) {
        normed = take_inner(cgraph, at, GGML_OP_MUL);
        if (!normed || normed->src[0] != norm) {
            return nullptr;
        }
        heads = { norm->src[0], normed->src[1], ggml_get_op_params_f32(norm, 0) };
        if (!is_given(heads.norm) || heads.norm->type != GGML_TYPE_F32 || !ggml_is_contiguous(heads.norm) ||
            ggml_nelements(heads.norm) != norm->ne[0]) {
            return nullptr;
        }
    }
    const ggml_tensor * rope = take_inner(cgraph, at, GGML_OP_ROPE);
    if (!rope || (normed && rope->src[0] != normed)) {
        return nullptr;
    }
    if (!normed) {
        heads.x = rope->src[0];
    }
    const bool fits = is_of_one_token(heads.x) && rope->type == GGML_TYPE_F32 && ggml_are_same_shape(heads.x, rope);
    return fits ? rope : nullptr;
}

static bool is_known_rope(const ggml_tensor * rope) {
    const int n_dims = ggml_get_op_params_i32(rope, 1);
    const int mode = ggml_get_op_params_i32(rope, 2);
    const float ext_factor = ggml_get_op_params_f32(rope, 7); // of YaRN
    const int n_offs = ggml_get_op_params_i32(rope, 15);
    return is_given(rope->src[1]) && (!rope->src[2] || is_given(rope->src[2])) &&
           (mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX) && ext_factor == 0.0f && n_offs == 0 &&
           n_dims % 2 == 0 && n_dims <= rope->ne[0];
}

// rows: SET_ROWS of a whole token's heads into a cache that `cache` shows some tokens of.
static bool is_row_of(const ggml_tensor * rows, const ggml_tensor * cache, const int64_t head_size) {
    const ggml_tensor * x = rows->src[0];
    return rows->type == GGML_TYPE_F16 && cache->type == GGML_TYPE_F16 && pt2_memory_of(rows) == pt2_memory_of(cache) &&
           x->type == GGML_TYPE_F32 && ggml_is_contiguous(x) && ggml_nrows(x) == 1 &&
           x->ne[0] == head_size * cache->ne[2] && rows->ne[0] == x->ne[0] && rows->src[1]->type == GGML_TYPE_I64 &&
           is_given(rows->src[1]) && cache->ne[0] == head_size && cache->ne[3] == 1 && cache->nb[0] == sizeof(half) &&
           cache->nb[1] == rows->nb[1] && cache->nb[1] % sizeof(int4) == 0 &&
           (cache->ne[2] == 1 || cache->nb[2] == head_size * sizeof(half)) && cache->view_offs >= rows->view_offs &&
           (cache->view_offs - rows->view_offs) % cache->nb[1] == 0;
}

static bool is_plain(const ggml_tensor * attn, const ggml_tensor * rope) {
    const ggml_tensor * q = attn->src[0];
    const ggml_tensor * mask = attn->src[3];
    const float max_bias = ggml_get_op_params_f32(attn, 1);
    const float softcap = ggml_get_op_params_f32(attn, 2);
    const int n_kv_max = ggml_get_op_params_i32(attn, 4);
    return is_all_of(q, rope) && q->ne[1] == 1 && q->ne[3] == 1 && q->nb[0] == sizeof(float) &&
           q->nb[2] == rope->nb[1] && max_bias == 0.0f && softcap == 0.0f && n_kv_max == 0 && !attn->src[4] && mask &&
           is_given(mask) && mask->type == GGML_TYPE_F16 && ggml_nrows(mask) == 1 &&
           mask->ne[0] >= attn->src[1]->ne[1] && ggml_is_contiguous(attn);
}

// The product that alone needs the attention's result, and what is added to it. at: the node behind the attention.
static void find_output(const ggml_cgraph * cgraph, const int at, pt2_attention & found) {
    found.output = {};
    int i = at;
    ggml_tensor * product = take(cgraph, i, GGML_OP_MUL_MAT);
    if (!product || !pt2_is_product(product) || ggml_mul_mat_get_perm(product) || !is_given(product->src[0]) ||
        ggml_nrows(product->src[0]) != product->ne[0] || !is_all_of(product->src[1], found.attn) ||
        ggml_nrows(product->src[1]) != 1) {
        return;
    }
    for (int between = at - 1; between < i - 1; ++between) { // the attention and its views
        if (ggml_node_get_use_count(cgraph, between) != 1 || cgraph->nodes[between]->flags & GGML_TENSOR_FLAG_OUTPUT) {
            return;
        }
    }
    found.output = { product, pt2_added_to(cgraph, i - 1), product };
    found.n_nodes_output = found.n_nodes + i - at;
    if (found.output.bias) {
        found.output.dst = cgraph->nodes[i];
        found.n_nodes_output += 1;
    }
}

bool pt2_find_attention(const ggml_cgraph * cgraph, const int i, pt2_attention & found) {
    int at = i;
    const ggml_tensor * rope_q = take_rotated(cgraph, at, found.q);
    const ggml_tensor * rope_k = rope_q ? take_rotated(cgraph, at, found.k) : nullptr;
    found.rope = rope_q;
    found.set_k = rope_k ? take(cgraph, at, GGML_OP_SET_ROWS) : nullptr;
    found.set_v = found.set_k ? take(cgraph, at, GGML_OP_SET_ROWS) : nullptr;
    found.attn = found.set_v ? take(cgraph, at, GGML_OP_FLASH_ATTN_EXT) : nullptr;
    if (!found.attn) {
        return false;
    }
    found.v = found.set_v->src[0];
    found.n_nodes = at - i;
    const int64_t head_size = rope_q->ne[0];
    const ggml_tensor * k = found.attn->src[1];
    const ggml_tensor * v = found.attn->src[2];
    const bool fits =
        is_known_rope(rope_q) && memcmp(rope_q->op_params, rope_k->op_params, sizeof(rope_q->op_params)) == 0 &&
        rope_q->src[1] == rope_k->src[1] && rope_q->src[2] == rope_k->src[2] && rope_k->ne[0] == head_size &&
        is_all_of(found.set_k->src[0], rope_k) && is_row_of(found.set_k, k, head_size) &&
        is_row_of(found.set_v, v, head_size) && rope_k->ne[1] == k->ne[2] && v->ne[2] == k->ne[2] &&
        v->ne[1] == k->ne[1] && rope_q->ne[1] % k->ne[2] == 0 && is_plain(found.attn, rope_q);
    if (fits) {
        find_output(cgraph, at, found);
    }
    return fits;
}
