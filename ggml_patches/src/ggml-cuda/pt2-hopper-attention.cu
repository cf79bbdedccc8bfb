// Attention of one token on Hopper, compiled for sm_90a alone as pt2-hopper.cu is.
//
// A cluster of thread blocks has one or more of the query heads that share a head of keys, and each block a part of the
// tokens. Teams of lanes have a token's key and value, 8 elements a lane, and keep a softmax of their own; what they
// have summed up is brought together in a warp, a thread block and the cluster. The cache's first keys and values are
// loaded while the kernel before, which computes the new ones, is still running.
#include "pt2-graph.h"
#include "pt2-hopper.cuh"
#include "pt2-quantize.cuh"

#include <cooperative_groups.h>

#include <optional>

namespace cg = cooperative_groups;

#define PT2_ATTENTION_WARPS       8
#define PT2_ATTENTION_MAX_CLUSTER 8
#define PT2_ATTENTION_TOKENS      4 // of a team, loaded at once

// With twice as many, upstream's kernels are faster where each query head has keys of its own.
#define PT2_ATTENTION_MAX_TOKENS 4096

static constexpr int PER_LANE = sizeof(int4) / sizeof(half); // elements
static constexpr float NONE = -1e30f;                        // less than any score but a masked one's

struct attention_args {
    const float * q; // heads before norm and rotation, strides in elements
    const float * k;
    const float * v;
    int64_t stride_q, stride_k;
    const float * norm_q; // weights, or NULL
    const float * norm_k;
    float eps_q, eps_k;
    const int32_t * position;
    const float * freq_factors; // or NULL
    float theta_scale, freq_scale, rope_scale;
    int n_dims; // that are rotated
    bool neox;
    char * keys; // the cache, of tokens from the first that is attended to
    char * values;
    int64_t nb_k, nb_v;    // bytes from token to token
    const int64_t * row_k; // of the new token in the whole cache
    const int64_t * row_v;
    int64_t first_k, first_v; // rows of the whole cache before the first that is attended to
    const half * mask;
    float scale;
    int ntokens, heads_per_key;
    float * dst; // or NULL: the result is quantized
    ggml_type quantized_for;
    int nblocks, nblocks_padded;
    int8_t * qs;
    pt2_vec_scales * scales;
};

// What a team, a warp or a thread block has of a head: sum is of exp2(score - max) times values.
template <int D> struct part_of_head {
    float max;
    float norm; // sum of exp2(score - max)
    float sum[D];
};

template <int D, int heads> struct __align__(16) attention_shared {
    float q[heads][D];
    half k[D];
    half v[D];
    part_of_head<D> of_warps[PT2_ATTENTION_WARPS][heads];
    part_of_head<D> of_blocks[PT2_ATTENTION_MAX_CLUSTER][heads]; // in the cluster's first one
};

// Of a pair of elements that are rotated, or, beyond n_dims, are not.
struct rotation {
    int first, second; // elements
    float cos, sin;

    __device__ __forceinline__ rotation(const attention_args & args, const int pair) {
        const bool rotated = 2 * pair < args.n_dims;
        first = args.neox && rotated ? pair : 2 * pair;
        second = args.neox && rotated ? pair + args.n_dims / 2 : 2 * pair + 1;
        const float factor = rotated && args.freq_factors ? args.freq_factors[pair] : 1.0f;
        const float theta = args.freq_scale * (*args.position * powf(args.theta_scale, pair) / factor);
        cos = rotated ? cosf(theta) * args.rope_scale : 1.0f;
        sin = rotated ? sinf(theta) * args.rope_scale : 0.0f;
    }
};

static __device__ __forceinline__ void unpack(float (&to)[PER_LANE], const int4 from) {
    const int words[PER_LANE / 2] = { from.x, from.y, from.z, from.w };
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; ++i) {
        const float2 v = __half22float2(*(const half2 *) &words[i]);
        to[2 * i] = v.x;
        to[2 * i + 1] = v.y;
    }
}

// The same of one element.
struct part_of_element {
    float max, norm, sum;
};

// n parts of the same head, `stride` from one to the next.
template <int D>
static __device__ __forceinline__ part_of_element bring_together(const part_of_head<D> * parts, const int stride,
                                                                 const int n, const int element) {
    part_of_element whole = { NONE, 0.0f, 0.0f };
    for (int i = 0; i < n; ++i) {
        whole.max = fmaxf(whole.max, parts[i * stride].max);
    }
    for (int i = 0; i < n; ++i) {
        const float factor = exp2f(parts[i * stride].max - whole.max);
        whole.norm += factor * parts[i * stride].norm;
        whole.sum += factor * parts[i * stride].sum[element];
    }
    return whole;
}

// The whole result of a thread block's heads, as a row's blocks from the first on.
template <ggml_type type>
static __device__ __forceinline__ void quantize_heads(const attention_args & args, const float * result,
                                                      const int first, const int n) {
    const auto store = [&](const int block, const float4 x) {
        store_quantized<type>(x, threadIdx.x, block, args.qs, args.scales);
    };
    for (int i = threadIdx.y; i < n; i += PT2_ATTENTION_WARPS) {
        store(first + i, *(const float4 *) (result + i * QK_PT2 + 4 * threadIdx.x));
    }
    if (first + n == args.nblocks) {
        for (int i = args.nblocks + threadIdx.y; i < args.nblocks_padded; i += PT2_ATTENTION_WARPS) {
            store(i, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        }
    }
}

template <int D, int heads>
__launch_bounds__(PT2_ATTENTION_WARPS * WARP_SIZE) static __global__ void attend(const attention_args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int lanes = D / PER_LANE; // of a team
    constexpr int teams = PT2_ATTENTION_WARPS * WARP_SIZE / lanes;
    constexpr int tokens = PT2_ATTENTION_TOKENS;
    __shared__ attention_shared<D, heads> shared;

    const cg::cluster_group cluster = cg::this_cluster();
    const int rank = blockIdx.x; // in the cluster
    const int size = gridDim.x;
    const int lane = threadIdx.x;
    const int warp = threadIdx.y;
    const int thread = warp * WARP_SIZE + lane;
    const int team = thread / lanes;
    const int at = thread % lanes * PER_LANE; // of this lane's elements
    const int first_head = blockIdx.y * heads;
    const int key_head = first_head / args.heads_per_key;

    char * const keys = args.keys + (key_head * D + at) * sizeof(half);
    char * const values = args.values + (key_head * D + at) * sizeof(half);
    struct {
        int4 k[tokens];
        int4 v[tokens];
        float bias[tokens];
    } here, ahead;
    const auto load = [&](auto & to, const int first) { // beyond the last token another's, with a weight of zero
#pragma unroll
        for (int t = 0; t < tokens; ++t) {
            const int token = min(first + t, args.ntokens - 1);
            to.k[t] = *(const int4 *) (keys + token * args.nb_k);
            to.v[t] = *(const int4 *) (values + token * args.nb_v);
            to.bias[t] = first + t < args.ntokens ? __half2float(args.mask[token]) * float(M_LOG2E) : -INFINITY;
        }
    };
    const int step = size * teams * tokens;
    const int first_of_block = rank * teams * tokens;

    cluster.barrier_arrive(); // that all of its blocks have started is waited for where they meet
    ggml_cuda_pdl_lc();
    load(here, first_of_block + team * tokens);
    const int64_t new_key = *args.row_k - args.first_k;
    const int64_t new_value = *args.row_v - args.first_v;
    constexpr int pairs = D / 2 / WARP_SIZE; // of a lane, of one head
    const rotation rotations[2] = { rotation(args, lane), rotation(args, lane + (pairs - 1) * WARP_SIZE) };
    ggml_cuda_pdl_sync();

    // a warp for each query head, one for the key and one for the value
    if (warp <= heads) {
        const bool is_key = warp == heads;
        const float * x = is_key ? args.k + key_head * args.stride_k : args.q + (first_head + warp) * args.stride_q;
        const float * norm = is_key ? args.norm_k : args.norm_q;
        float2 pair[pairs];
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < pairs; ++i) {
            pair[i] = make_float2(x[rotations[i].first], x[rotations[i].second]);
            squares += pair[i].x * pair[i].x + pair[i].y * pair[i].y;
        }
        if (norm) {
            const float factor = rsqrtf(warp_reduce_sum<WARP_SIZE>(squares) / D + (is_key ? args.eps_k : args.eps_q));
#pragma unroll
            for (int i = 0; i < pairs; ++i) {
                pair[i].x *= factor * norm[rotations[i].first];
                pair[i].y *= factor * norm[rotations[i].second];
            }
        }
#pragma unroll
        for (int i = 0; i < pairs; ++i) {
            const rotation & r = rotations[i];
            const float a = pair[i].x * r.cos - pair[i].y * r.sin;
            const float b = pair[i].x * r.sin + pair[i].y * r.cos;
            if (is_key) {
                shared.k[r.first] = __float2half(a);
                shared.k[r.second] = __float2half(b);
            } else {
                shared.q[warp][r.first] = a * args.scale * float(M_LOG2E);
                shared.q[warp][r.second] = b * args.scale * float(M_LOG2E);
            }
        }
    } else if (warp == heads + 1) {
        for (int i = lane; i < D; i += WARP_SIZE) {
            shared.v[i] = __float2half(args.v[key_head * D + i]);
        }
    }
    __syncthreads();
    const int4 new_k = *(const int4 *) (shared.k + at);
    const int4 new_v = *(const int4 *) (shared.v + at);
    if (rank == 0 && first_head % args.heads_per_key == 0 && team == 0) {
        *(int4 *) (keys + new_key * args.nb_k) = new_k;
        *(int4 *) (values + new_value * args.nb_v) = new_v;
    }

    float q[heads][PER_LANE];
    float max[heads];
    float norm[heads];
    float sum[heads][PER_LANE];
#pragma unroll
    for (int h = 0; h < heads; ++h) {
        max[h] = NONE;
        norm[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            q[h][i] = shared.q[h][at + i];
            sum[h][i] = 0.0f;
        }
    }
    const auto raise = [&](const int h, const float largest) {
        const float factor = exp2f(max[h] - largest);
        max[h] = largest;
        norm[h] *= factor;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            sum[h][i] *= factor;
        }
    };
    for (int start = first_of_block; start < args.ntokens; start += step) { // the same in all lanes
        const int first = start + team * tokens;
        const bool more = start + step < args.ntokens;
        if (more) {
            load(ahead, first + step);
        }
        float scores[heads][tokens];
#pragma unroll
        for (int t = 0; t < tokens; ++t) {
            float key[PER_LANE];
            if (first + t == new_key) {
                here.k[t] = new_k;
            }
            unpack(key, here.k[t]);
#pragma unroll
            for (int h = 0; h < heads; ++h) {
                float dot = 0.0f;
#pragma unroll
                for (int i = 0; i < PER_LANE; ++i) {
                    dot += q[h][i] * key[i];
                }
                scores[h][t] = warp_reduce_sum<lanes>(dot) + here.bias[t];
            }
        }
#pragma unroll
        for (int h = 0; h < heads; ++h) {
            float largest = max[h];
#pragma unroll
            for (int t = 0; t < tokens; ++t) {
                largest = fmaxf(largest, scores[h][t]);
            }
            raise(h, largest);
#pragma unroll
            for (int t = 0; t < tokens; ++t) {
                scores[h][t] = exp2f(scores[h][t] - largest);
                norm[h] += scores[h][t];
            }
        }
#pragma unroll
        for (int t = 0; t < tokens; ++t) {
            float value[PER_LANE];
            if (first + t == new_value) {
                here.v[t] = new_v;
            }
            unpack(value, here.v[t]);
#pragma unroll
            for (int h = 0; h < heads; ++h) {
#pragma unroll
                for (int i = 0; i < PER_LANE; ++i) {
                    sum[h][i] += scores[h][t] * value[i];
                }
            }
        }
        if (more) {
            here = ahead;
        }
    }

    // the teams of a warp
#pragma unroll
    for (int h = 0; h < heads; ++h) {
#pragma unroll
        for (int offset = lanes; offset < WARP_SIZE; offset *= 2) {
            raise(h, fmaxf(max[h], __shfl_xor_sync(0xFFFFFFFF, max[h], offset, WARP_SIZE)));
            norm[h] += __shfl_xor_sync(0xFFFFFFFF, norm[h], offset, WARP_SIZE);
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                sum[h][i] += __shfl_xor_sync(0xFFFFFFFF, sum[h][i], offset, WARP_SIZE);
            }
        }
        if (lane < lanes) {
            part_of_head<D> & part = shared.of_warps[warp][h];
            part.max = max[h];
            part.norm = norm[h];
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                part.sum[at + i] = sum[h][i];
            }
        }
    }
    __syncthreads();
    cluster.barrier_wait();
    attention_shared<D, heads> & of_first = *cluster.map_shared_rank(&shared, 0);
    for (int i = thread; i < heads * D; i += PT2_ATTENTION_WARPS * WARP_SIZE) {
        const part_of_element whole = bring_together(&shared.of_warps[0][i / D], heads, PT2_ATTENTION_WARPS, i % D);
        part_of_head<D> & part = of_first.of_blocks[rank][i / D];
        part.sum[i % D] = whole.sum;
        if (i % D == 0) {
            part.max = whole.max;
            part.norm = whole.norm;
        }
    }
    cluster.sync();
    if (rank != 0) {
        return;
    }
    for (int i = thread; i < heads * D; i += PT2_ATTENTION_WARPS * WARP_SIZE) {
        const part_of_element whole = bring_together(&shared.of_blocks[0][i / D], heads, size, i % D);
        const float result = whole.sum / whole.norm;
        if (args.dst) {
            args.dst[first_head * D + i] = result;
        } else {
            shared.q[i / D][i % D] = result;
        }
    }
    if (args.dst) {
        return;
    }
    __syncthreads();
    const int first_block = first_head * D / QK_PT2;
    if (args.quantized_for == GGML_TYPE_TQ2_1) {
        quantize_heads<GGML_TYPE_TQ2_1>(args, shared.q[0], first_block, heads * D / QK_PT2);
    } else {
        quantize_heads<GGML_TYPE_TQ1_1>(args, shared.q[0], first_block, heads * D / QK_PT2);
    }
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif // defined(__CUDA_ARCH_FEAT_SM90_ALL)
}

template <int D, int heads>
static void launch(const attention_args & args, const int groups, const int cluster, cudaStream_t stream) {
    const dim3 grid(cluster, groups, 1);
    const dim3 block(WARP_SIZE, PT2_ATTENTION_WARPS, 1);
    pt2_cluster_launch launch({ grid, block, (size_t) 0, stream }, dim3(cluster, 1, 1));
    launch.start_early();
    CUDA_CHECK(cudaLaunchKernelEx(&launch.config, attend<D, heads>, args));
}

// Query heads of a thread block.
static int heads_at_once(const int heads_per_key) {
    return heads_per_key % 4 == 0 ? 4 : heads_per_key % 2 == 0 ? 2 : 1;
}

template <int D> static void launch_for(const attention_args & args, const int nheads, cudaStream_t stream) {
    const int heads = heads_at_once(args.heads_per_key);
    const int groups = nheads / heads;
    const int at_once = PT2_ATTENTION_WARPS * WARP_SIZE / (D / PER_LANE) * PT2_ATTENTION_TOKENS; // of a thread block
    // At most as many thread blocks as there are multiprocessors: more are not faster.
    const int nsm = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm;
    const int with_tokens = (args.ntokens + at_once - 1) / at_once;
    const int cluster = std::max(1, std::min({ PT2_ATTENTION_MAX_CLUSTER, with_tokens, nsm / groups }));
    switch (heads) {
    case 1:
        launch<D, 1>(args, groups, cluster, stream);
        break;
    case 2:
        launch<D, 2>(args, groups, cluster, stream);
        break;
    default:
        launch<D, 4>(args, groups, cluster, stream);
    }
}

bool pt2_attends_hopper(const int device) {
    return ggml_cuda_info().devices[device].cc == GGML_CUDA_CC_HOPPER;
}

int pt2_attend_hopper(ggml_backend_cuda_context & ctx, const pt2_attention & a) {
    const ggml_tensor * keys = a.attn->src[1];
    const ggml_tensor * values = a.attn->src[2];
    const int head_size = keys->ne[0];
    bool fits = pt2_attends_hopper(ctx.device) && (head_size == 64 || head_size == 128) &&
                keys->ne[1] <= PT2_ATTENTION_MAX_TOKENS && (uintptr_t) keys->data % sizeof(int4) == 0 &&
                (uintptr_t) values->data % sizeof(int4) == 0;
    // another thread block may still be reading
    pt2_for_each_input(a, [&](const ggml_tensor * t) { fits = fits && !pt2_overlap(t, a.attn); });
    if (!fits) {
        return 0;
    }

    attention_args args = {};
    args.q = (const float *) a.q.x->data;
    args.k = (const float *) a.k.x->data;
    args.v = (const float *) a.v->data;
    args.stride_q = a.q.x->nb[1] / sizeof(float);
    args.stride_k = a.k.x->nb[1] / sizeof(float);
    args.norm_q = a.q.norm ? (const float *) a.q.norm->data : nullptr;
    args.norm_k = a.k.norm ? (const float *) a.k.norm->data : nullptr;
    args.eps_q = a.q.eps;
    args.eps_k = a.k.eps;
    args.position = (const int32_t *) a.rope->src[1]->data;
    args.freq_factors = a.rope->src[2] ? (const float *) a.rope->src[2]->data : nullptr;
    args.n_dims = ggml_get_op_params_i32(a.rope, 1);
    args.neox = ggml_get_op_params_i32(a.rope, 2) == GGML_ROPE_TYPE_NEOX;
    args.theta_scale = powf(ggml_get_op_params_f32(a.rope, 5), -2.0f / args.n_dims);
    args.freq_scale = ggml_get_op_params_f32(a.rope, 6);
    args.rope_scale = ggml_get_op_params_f32(a.rope, 8);
    args.keys = (char *) keys->data;
    args.values = (char *) values->data;
    args.nb_k = keys->nb[1];
    args.nb_v = values->nb[1];
    args.row_k = (const int64_t *) a.set_k->src[1]->data;
    args.row_v = (const int64_t *) a.set_v->src[1]->data;
    args.first_k = (keys->view_offs - a.set_k->view_offs) / keys->nb[1];
    args.first_v = (values->view_offs - a.set_v->view_offs) / values->nb[1];
    args.mask = (const half *) a.attn->src[3]->data;
    args.scale = ggml_get_op_params_f32(a.attn, 0);
    args.ntokens = keys->ne[1];
    args.heads_per_key = a.q.x->ne[1] / keys->ne[2];

    std::optional<pt2_vec_activations> quantized;
    const ggml_tensor * product = a.output.product;
    if (product && heads_at_once(args.heads_per_key) * head_size % QK_PT2 == 0) { // no block of two thread blocks
        const ggml_tensor * weights = product->src[0];
        quantized.emplace(ctx, weights->type, weights->ne[0] / QK_PT2, 1);
        args.quantized_for = quantized->type;
        args.nblocks = quantized->nblocks;
        args.nblocks_padded = quantized->nblocks_padded;
        args.qs = quantized->qs;
        args.scales = quantized->scales;
    } else {
        args.dst = (float *) a.attn->data;
    }
    if (head_size == 64) {
        launch_for<64>(args, a.q.x->ne[1], ctx.stream());
    } else {
        launch_for<128>(args, a.q.x->ne[1], ctx.stream());
    }
    if (!quantized) {
        return a.n_nodes;
    }
    pt2_mul_mat_vec_quantized(ctx, a.output, *quantized);
    return a.n_nodes_output;
}
