// GET_ROWS and CPY to floats. One thread per byte of digits: each plane's stores are coalesced.
#include "convert.cuh"
#include "pt2-cuda.cuh"

#define PT2_DEQUANTIZE_THREADS 128 // four blocks of weights

template <ggml_type type, typename dst_t>
static __device__ __forceinline__ void dequantize(const char * row, const int ib, const int j, dst_t * y) {
    constexpr int bs = ggml_cuda_type_traits<type>::bs;
    const char * block = row + (int64_t) ib * bs;
    const float alpha = __half2float(((const half *) block)[0]);
    const float mu = __half2float(((const half *) block)[1]);
    y += (int64_t) QK_PT2 * ib;
    const auto store = [&](const int column, const int digit) {
        y[column] = ggml_cuda_cast<dst_t>(alpha * (float) (digit - 1) + mu);
    };
    if constexpr (type == GGML_TYPE_TQ2_1) {
        const uint8_t byte = block[4 + j];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            store(32 * k + j, byte >> 2 * k & 3);
        }
    } else if (j < 26) {
        uint32_t fraction = (uint8_t) block[4 + j];
#pragma unroll
        for (int k = 0; k < 5; ++k) {
            fraction *= 3;
            if (j < 24) {
                store(24 * k + j, fraction >> 8);
            } else if (k < 4) {
                store(120 + 2 * k + (j - 24), fraction >> 8);
            }
            fraction &= 0xFF;
        }
    }
}

template <ggml_type type, typename dst_t>
static __global__ void get_rows(const char * __restrict__ x, const int32_t * __restrict__ ids, dst_t * __restrict__ y,
                                const int nblocks, const int64_t n_channels, const uint3 ne12, const size_t nb01,
                                const size_t nb02, const size_t nb03, const size_t s10, const size_t s11,
                                const size_t s12, const size_t s1, const size_t s2, const size_t s3) {
    ggml_cuda_pdl_sync();
    for (int64_t z = blockIdx.z; z < n_channels; z += gridDim.z) {
        const uint2 i12_11 = fast_div_modulo((uint32_t) z, ne12);
        const int64_t i11 = i12_11.x;
        const int64_t i12 = i12_11.y;
        const int64_t i10 = blockIdx.x;
        const char * row = x + ids[i10 * s10 + i11 * s11 + i12 * s12] * nb01 + i11 * nb02 + i12 * nb03;
        dst_t * to = y + i10 * s1 + i11 * s2 + i12 * s3;
        for (int ib = blockIdx.y * 4 + threadIdx.x / 32; ib < nblocks; ib += gridDim.y * 4) {
            dequantize<type>(row, ib, threadIdx.x % 32, to);
        }
    }
}

template <ggml_type type, typename dst_t>
static __global__ void copy(const char * __restrict__ x, dst_t * __restrict__ y, const int64_t nblocks) {
    for (int64_t ib = (int64_t) blockIdx.x * 4 + threadIdx.x / 32; ib < nblocks; ib += (int64_t) gridDim.x * 4) {
        dequantize<type>(x, ib, threadIdx.x % 32, y);
    }
}

void ggml_cuda_pt2_get_rows(const void * src0_d, ggml_type src0_type, const int32_t * src1_d, void * dst_d,
                            ggml_type dst_type, int64_t ne00, size_t nb01, size_t nb02, size_t nb03, int64_t ne10,
                            int64_t ne11, int64_t ne12, size_t nb10, size_t nb11, size_t nb12, size_t nb1, size_t nb2,
                            size_t nb3, cudaStream_t stream) {
    const int nblocks = ne00 / QK_PT2;
    const dim3 grid(ne10, std::min((nblocks + 3) / 4, UINT16_MAX), std::min<int64_t>(ne11 * ne12, UINT16_MAX));
    const ggml_cuda_kernel_launch_params params(grid, dim3(PT2_DEQUANTIZE_THREADS, 1, 1), (size_t) 0, stream);
    const auto launch = [&](const auto kernel, auto * y) {
        constexpr size_t ts = sizeof(*y);
        ggml_cuda_kernel_launch(kernel, params, (const char *) src0_d, src1_d, y, nblocks, ne11 * ne12,
                                init_fastdiv_values(ne12), nb01, nb02, nb03, nb10 / sizeof(int32_t),
                                nb11 / sizeof(int32_t), nb12 / sizeof(int32_t), nb1 / ts, nb2 / ts, nb3 / ts);
    };
    const bool is_tq2_1 = src0_type == GGML_TYPE_TQ2_1;
    switch (dst_type) {
    case GGML_TYPE_F32:
        launch(is_tq2_1 ? get_rows<GGML_TYPE_TQ2_1, float> : get_rows<GGML_TYPE_TQ1_1, float>, (float *) dst_d);
        break;
    case GGML_TYPE_F16:
        launch(is_tq2_1 ? get_rows<GGML_TYPE_TQ2_1, half> : get_rows<GGML_TYPE_TQ1_1, half>, (half *) dst_d);
        break;
    case GGML_TYPE_BF16:
        launch(is_tq2_1 ? get_rows<GGML_TYPE_TQ2_1, nv_bfloat16> : get_rows<GGML_TYPE_TQ1_1, nv_bfloat16>,
               (nv_bfloat16 *) dst_d);
        break;
    default:
        GGML_ABORT("%s: unsupported dst type: %s\n", __func__, ggml_type_name(dst_type));
    }
}

void ggml_cuda_pt2_cpy(const ggml_tensor * src, ggml_tensor * dst, cudaStream_t stream) {
    GGML_ASSERT(ggml_is_contiguous(src) && ggml_is_contiguous(dst));
    const int64_t nblocks = ggml_nelements(src) / QK_PT2;
    const int grid = std::min<int64_t>((nblocks + 3) / 4, 65535);
    const auto launch = [&](const auto kernel, auto * y) {
        kernel<<<grid, PT2_DEQUANTIZE_THREADS, 0, stream>>>((const char *) src->data, y, nblocks);
        CUDA_CHECK(cudaGetLastError());
    };
    const bool is_tq2_1 = src->type == GGML_TYPE_TQ2_1;
    if (dst->type == GGML_TYPE_F32) {
        launch(is_tq2_1 ? copy<GGML_TYPE_TQ2_1, float> : copy<GGML_TYPE_TQ1_1, float>, (float *) dst->data);
    } else {
        GGML_ASSERT(dst->type == GGML_TYPE_F16);
        launch(is_tq2_1 ? copy<GGML_TYPE_TQ2_1, half> : copy<GGML_TYPE_TQ1_1, half>, (half *) dst->data);
    }
}
