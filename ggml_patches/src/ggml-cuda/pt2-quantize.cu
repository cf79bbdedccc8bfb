// Activations to 8 bits, their columns gathered on the way, or normed. One warp per 128 columns.
#include "mmq.cuh"
#include "pt2-group.cuh"
#include "pt2-quantize.cuh"

#define PT2_QUANTIZE_WARPS 4
#define PT2_NORM_WARPS     8 // all of which read the whole row

static __device__ __forceinline__ int4 load_columns(const int32_t * perm, const int column) {
    return perm ? *(const int4 *) (perm + column) : make_int4(column, column + 1, column + 2, column + 3);
}

static __device__ __forceinline__ float4 load_x(const float * x, const int4 columns) {
    return make_float4(x[columns.x], x[columns.y], x[columns.z], x[columns.w]);
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
    store_quantized<type>(xi, lane, ib, qs + QK_PT2 * first_block, scales + first_block);
}

pt2_vec_activations::pt2_vec_activations(ggml_backend_cuda_context & ctx, const ggml_type type, const int64_t nblocks,
                                         const int64_t nrows)
    : type(type), nblocks(nblocks), nblocks_padded(pt2_vec_padded_blocks(type, nblocks)), nrows(nrows),
      memory(ctx.pool(), nblocks_padded * nrows * (QK_PT2 + sizeof(pt2_vec_scales))), qs(memory.get()),
      scales((pt2_vec_scales *) (qs + QK_PT2 * nblocks_padded * nrows)) {
}

void pt2_quantize_vec(const ggml_tensor * x, const pt2_norm * norm, const ggml_tensor * const * perms,
                      const int n_perms, const pt2_vec_activations & y, cudaStream_t stream) {
    const ggml_type type = y.type;
    const int nblocks = y.nblocks;
    const int64_t channels = x->ne[2] * x->ne[3];
    const int nblocks_padded = y.nblocks_padded;
    const int warps = norm ? PT2_NORM_WARPS : PT2_QUANTIZE_WARPS;
    const dim3 grid((nblocks_padded + warps - 1) / warps, x->ne[1], channels * n_perms);
    const dim3 block(WARP_SIZE, warps, 1);
    const auto perm = [&](int i) { return i < n_perms && perms[i] ? (const int32_t *) perms[i]->data : nullptr; };
    const ggml_cuda_kernel_launch_params params(grid, block, (size_t) 0, stream);
    const auto of_type = [&](const auto tq2_1, const auto tq1_1) { return type == GGML_TYPE_TQ2_1 ? tq2_1 : tq1_1; };
    const auto kernel = norm ? of_type(quantize_vec<GGML_TYPE_TQ2_1, true>, quantize_vec<GGML_TYPE_TQ1_1, true>)
                             : of_type(quantize_vec<GGML_TYPE_TQ2_1, false>, quantize_vec<GGML_TYPE_TQ1_1, false>);
    ggml_cuda_kernel_launch(kernel, params, (const float *) x->data, perm(0), perm(1), y.qs, y.scales, nblocks,
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
    const half d = __float2half(warp_reduce_max<8>(abs_max(xi)) / 127.0f);
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
