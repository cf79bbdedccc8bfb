// Activations to 8 bits, their columns gathered on the way. One warp per 128 columns, four columns
// per lane. Scales belong to 32 columns, or to the digit planes of a TQ1_1 block (24 columns).
#include "mmq.cuh"
#include "pt2-group.cuh"

#define PT2_QUANTIZE_WARPS 4
#define PT2_NORM_WARPS     8 // all of which read the whole row

// The largest absolute value or the sum among the lanes that share a scale.
static __device__ __forceinline__ float max_of_lanes(float v, const int first, const int n) {
    float max = 0.0f;
#pragma unroll
    for (int i = 0; i < 6; ++i) {
        max = fmaxf(max, __shfl_sync(0xFFFFFFFF, v, first + i % n, WARP_SIZE));
    }
    return max;
}

static __device__ __forceinline__ int sum_of_lanes(int v, const int first, const int n) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 6; ++i) {
        const int other = __shfl_sync(0xFFFFFFFF, v, first + i % n, WARP_SIZE);
        sum += i < n ? other : 0;
    }
    return sum;
}

static __device__ __forceinline__ float max_of_eight(float v) {
#pragma unroll
    for (int offset = 4; offset > 0; offset >>= 1) {
        v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFF, v, offset, WARP_SIZE));
    }
    return v;
}

static __device__ __forceinline__ int sum_of_eight(int v) {
#pragma unroll
    for (int offset = 4; offset > 0; offset >>= 1) {
        v += __shfl_xor_sync(0xFFFFFFFF, v, offset, WARP_SIZE);
    }
    return v;
}

static __device__ __forceinline__ int4 load_columns(const int32_t * perm, const int column) {
    return perm ? *(const int4 *) (perm + column) : make_int4(column, column + 1, column + 2, column + 3);
}

static __device__ __forceinline__ float4 load_x(const float * x, const int4 columns) {
    return make_float4(x[columns.x], x[columns.y], x[columns.z], x[columns.w]);
}

static __device__ __forceinline__ float abs_max(const float4 x) {
    return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
}

static __device__ __forceinline__ char4 quantize(const float4 x, const float d) {
    const float inverse = d > 0.0f ? 1.0f / d : 0.0f;
    const auto round = [inverse](const float v) {
        return (signed char) max(-127, min(127, __float2int_rn(v * inverse)));
    };
    return make_char4(round(x.x), round(x.y), round(x.z), round(x.w));
}

static __device__ __forceinline__ int sum(const char4 q) {
    return q.x + q.y + q.z + q.w;
}

// The factor of a row's RMS norm. Every thread block finds it for itself.
static __device__ float rms_factor(const float * x, const int n, const float eps) {
    __shared__ float of_warps[PT2_NORM_WARPS];
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 4 * (threadIdx.y * WARP_SIZE + threadIdx.x); i < n; i += 4 * WARP_SIZE * PT2_NORM_WARPS) {
        const float4 v = *(const float4 *) (x + i);
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    sum = warp_reduce_sum<WARP_SIZE>(sum);
    if (threadIdx.x == 0) {
        of_warps[threadIdx.y] = sum;
    }
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < PT2_NORM_WARPS; ++i) {
        total += of_warps[i];
    }
    return rsqrtf(total / n + eps);
}

// normed: the activations are x's RMS norm times norm_weight.
template <ggml_type type, bool normed>
static __global__ void quantize_vec(const float * x_ptr, const int32_t * perm0, const int32_t * perm1, int8_t * qs,
                                    pt2_vec_scales * scales, const int nblocks, const uint3 ne2_fd, const int64_t s1,
                                    const int64_t s2, const int64_t s3, const uint32_t channels,
                                    const float * norm_weight, const float eps) {
    ggml_cuda_pdl_lc();
    const float * GGML_CUDA_RESTRICT x = x_ptr;
    const int nblocks_padded = pt2_vec_padded_blocks(type, nblocks);
    const int ib = blockIdx.x * blockDim.y + threadIdx.y;
    if (!normed && ib >= nblocks_padded) {
        return;
    }
    const int lane = threadIdx.x;
    const bool second = blockIdx.z >= channels;
    const uint2 i32 = fast_div_modulo(second ? blockIdx.z - channels : blockIdx.z, ne2_fd);
    // column orders are weights: they are there before the activations are
    const int4 columns =
        ib < nblocks ? load_columns(second ? perm1 : perm0, QK_PT2 * ib + 4 * lane) : make_int4(0, 0, 0, 0);

    float4 weight;
    if constexpr (normed) {
        weight = load_x(norm_weight, columns);
    }

    ggml_cuda_pdl_sync();
    x += i32.x * s3 + i32.y * s2 + blockIdx.y * s1;
    float4 xi = ib < nblocks ? load_x(x, columns) : make_float4(0, 0, 0, 0);
    if constexpr (normed) {
        const float factor = rms_factor(x, nblocks * QK_PT2, eps);
        if (ib >= nblocks_padded) {
            return;
        }
        xi = make_float4(factor * xi.x * weight.x, factor * xi.y * weight.y, factor * xi.z * weight.z,
                         factor * xi.w * weight.w);
    }
    const int64_t first_block = ((int64_t) blockIdx.z * gridDim.y + blockIdx.y) * nblocks_padded;
    qs += QK_PT2 * first_block;
    scales += first_block + ib;
    // this lane's columns are an int of the matvec's lane part
    const auto store = [&](const int part, const int i, const char4 q) {
        *(char4 *) (qs + pt2_vec_offset(type, ib, part, i / 4) + i % 4 * 4) = q;
    };

    if constexpr (type == GGML_TYPE_TQ2_1) {
        // a lane of the matvec: two ints of every plane
        const int plane = lane / 8;
        const float d = max_of_eight(abs_max(xi)) / 127.0f;
        const char4 q = quantize(xi, d);
        const int s = sum_of_eight(sum(q));
        const float own = (float) s * d;
        const float other = __shfl_xor_sync(0xFFFFFFFF, own, 8, WARP_SIZE);
        store(lane % 8 / 2, 2 * plane + lane % 2, q);
        if (lane % 8 == 0) {
            scales->d[plane] = d / (1 << 2 * plane);
            if (plane % 2 == 0) {
                scales->s[plane / 2] = 0.5f * (own + other); // two lanes of the matvec add it
            }
        }
    } else {
        // a lane of the matvec: three ints of every plane and one of the tail
        const bool tail = lane >= 30;
        const int plane = lane / 6;
        const int word = lane % 6;
        const int first = 6 * plane;
        const int n = tail ? 2 : 6;
        const float d = max_of_lanes(abs_max(xi), first, n) / 127.0f;
        const char4 q = quantize(xi, d);
        const float s = (float) sum_of_lanes(sum(q), first, n) * d;
        store(tail ? word : word / 3, tail ? 15 : 3 * plane + word % 3, q);
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            total += __shfl_sync(0xFFFFFFFF, s, 6 * i, WARP_SIZE);
        }
        if (word == 0) {
            scales->d[plane] = d;
        }
        if (lane < 2) {
            scales->s[lane] = 0.5f * total;
        }
    }
}

void pt2_quantize_vec(ggml_type type, const ggml_tensor * x, const pt2_norm * norm, const ggml_tensor * const * perms,
                      int n_perms, int8_t * qs, pt2_vec_scales * scales, cudaStream_t stream) {
    const int nblocks = x->ne[0] / QK_PT2;
    const int64_t channels = x->ne[2] * x->ne[3];
    const int nblocks_padded = pt2_vec_padded_blocks(type, nblocks);
    const int warps = norm ? PT2_NORM_WARPS : PT2_QUANTIZE_WARPS;
    const dim3 grid((nblocks_padded + warps - 1) / warps, x->ne[1], channels * n_perms);
    const dim3 block(WARP_SIZE, warps, 1);
    const auto perm = [&](int i) { return i < n_perms && perms[i] ? (const int32_t *) perms[i]->data : nullptr; };
    const ggml_cuda_kernel_launch_params params(grid, block, (size_t) 0, stream);
    const auto of_type = [&](const auto tq2_1, const auto tq1_1) { return type == GGML_TYPE_TQ2_1 ? tq2_1 : tq1_1; };
    const auto kernel = norm ? of_type(quantize_vec<GGML_TYPE_TQ2_1, true>, quantize_vec<GGML_TYPE_TQ1_1, true>)
                             : of_type(quantize_vec<GGML_TYPE_TQ2_1, false>, quantize_vec<GGML_TYPE_TQ1_1, false>);
    ggml_cuda_kernel_launch(kernel, params, (const float *) x->data, perm(0), perm(1), qs, scales, nblocks,
                            init_fastdiv_values(x->ne[2]), (int64_t) (x->nb[1] / sizeof(float)),
                            (int64_t) (x->nb[2] / sizeof(float)), (int64_t) (x->nb[3] / sizeof(float)),
                            (uint32_t) channels, norm ? (const float *) norm->weight->data : nullptr,
                            norm ? norm->eps : 0.0f);
}

template <bool scatter>
static __global__ void quantize_mmq(const float * __restrict__ x, const int32_t * __restrict__ perm,
                                    const int32_t * __restrict__ ids, block_q8_1_mmq * __restrict__ y,
                                    const int nblocks, const int nblocks_padded, const int64_t s01, const int64_t s02,
                                    const int64_t s03, const int ne2, const int64_t nrows, const int n_scatter) {
    const int ib = blockIdx.y * PT2_QUANTIZE_WARPS + threadIdx.y;
    if (ib >= nblocks_padded) {
        return;
    }
    const int lane = threadIdx.x;
    const int64_t row = blockIdx.x;
    if constexpr (scatter) {
        x += row * s02;
    } else {
        x += (int64_t) (blockIdx.z / ne2) * s03 + (int64_t) (blockIdx.z % ne2) * s02 + (ids ? ids[row] : row) * s01;
    }
    const float4 xi = ib < nblocks ? load_x(x, load_columns(perm, QK_PT2 * ib + 4 * lane)) : make_float4(0, 0, 0, 0);

    // The scale is rounded before it is used, so that only the digits carry an error.
    const half d = __float2half(max_of_eight(abs_max(xi)) / 127.0f);
    const char4 q = quantize(xi, __half2float(d));
    const half2 ds = make_half2(d, __float2half(__half2float(d) * (float) sum_of_eight(sum(q))));

    const int copies = scatter ? n_scatter : 1;
    for (int i = 0; i < copies; ++i) {
        const int64_t to = scatter ? ids[row * n_scatter + i] : row;
        block_q8_1_mmq * block = y + ((int64_t) blockIdx.z * nblocks_padded + ib) * nrows + to;
        ((char4 *) block->qs)[lane] = q;
        if (lane % 8 == 0) {
            block->ds4[lane / 8] = ds;
        }
    }
}

void pt2_quantize_mmq(const float * x, const ggml_tensor * perm, const int32_t * ids, int n_scatter, void * y,
                      int64_t ne00, int64_t s01, int64_t s02, int64_t s03, int64_t ne0, int64_t ne1, int64_t ne2,
                      int64_t ne3, int64_t nrows, cudaStream_t stream) {
    const int nblocks_padded = ne0 / QK_PT2;
    const dim3 grid(ne1, (nblocks_padded + PT2_QUANTIZE_WARPS - 1) / PT2_QUANTIZE_WARPS, ne2 * ne3);
    const dim3 block(WARP_SIZE, PT2_QUANTIZE_WARPS, 1);
    const int32_t * perm_d = perm ? (const int32_t *) perm->data : nullptr;
    const auto kernel = n_scatter > 0 ? quantize_mmq<true> : quantize_mmq<false>;
    kernel<<<grid, block, 0, stream>>>(x, perm_d, ids, (block_q8_1_mmq *) y, ne00 / QK_PT2, nblocks_padded, s01, s02,
                                       s03, ne2, nrows, n_scatter);
}
