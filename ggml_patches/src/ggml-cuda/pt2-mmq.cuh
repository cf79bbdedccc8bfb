// Tiles for upstream's matmul (mmq.cuh, which includes this file in its middle): digits as bytes,
// and a dot product for tensor cores that applies alpha and mu once per 128 columns.
#pragma once

// Where the parts of a tile's row are. With tensor cores of our own dot product a row has one pair
// of alpha and mu per block, as they are in the file; upstream's dot products want a scale and an
// offset per 32 columns.
//
// Functions, not constants: HIP's compiler calls no device function for a constant of a struct.
template <ggml_type type, int J, bool fallback> struct pt2_tile {
    static constexpr __device__ int I() {
        return ggml_cuda_mmq_get_I(type, J, fallback);
    }
#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
    static constexpr __device__ int stride() {
        return ggml_cuda_mmq_get_sram_stride(type, J, fallback);
    }
    static constexpr __device__ int at_dm() {
        return 2 * MMQ_TILE_NE_K;
    }
    static __device__ __forceinline__ int dm(const int i) {
        return at_dm() + i * stride();
    }
#else
    static constexpr __device__ int stride() {
        return 2 * MMQ_TILE_NE_K + 1;
    }
    static constexpr __device__ int at_dm() {
        return mmq_get_dp4a_tile_x_sizes(GGML_TYPE_Q5_1, I()).qs;
    }
    static __device__ __forceinline__ int dm(const int i) {
        return at_dm() + i * (MMQ_TILE_NE_K / QI5_1) + i / QI5_1;
    }
#endif
#if defined(TURING_MMA_AVAILABLE)
    static constexpr bool one_dm_per_block = true;
#else
    static constexpr bool one_dm_per_block = false;
#endif
};

template <ggml_type type, int J, bool fallback>
static __device__ __forceinline__ void pt2_load_tiles(const char * __restrict__ x, int * __restrict__ x_tile,
                                                      const int kbx0, const int i_max, const int stride) {
    using tile_x = pt2_tile<type, J, fallback>;
    constexpr int bs = ggml_cuda_type_traits<type>::bs;
    constexpr int warp_size = ggml_cuda_get_physical_warp_size();
    constexpr int nwarps = ggml_cuda_mmq_get_nthreads(type, J, fallback) / warp_size;
    constexpr int nblocks = MMQ_ITER_K / QK_PT2;
    // 8 threads per block of weights. The rows of a warp are two apart: their stores then go to
    // different banks.
    constexpr int nrows = warp_size / 8;
    static_assert(tile_x::I() % (2 * nrows) == 0, "bad I");

    const int word = threadIdx.x % 8;

#pragma unroll
    for (int i0 = 0; i0 < tile_x::I(); i0 += nrows * nwarps) {
        const int n = i0 / nrows + threadIdx.y;
        int i = (n / 2) * (2 * nrows) + n % 2 + 2 * (threadIdx.x / 8);
        if (tile_x::I() % (nrows * nwarps) != 0 && i >= tile_x::I()) {
            break;
        }
        if (fallback) {
            i = min(i, i_max);
        }
        const char * row = x + (int64_t) (kbx0 + i * stride) * bs;

#pragma unroll
        for (int kb = 0; kb < nblocks; ++kb) {
            const char * block = row + kb * bs;
            int * to = x_tile + i * tile_x::stride() + kb * (QK_PT2 / 4);
            if constexpr (type == GGML_TYPE_TQ2_1) {
                const uint32_t q = ((const uint32_t *) block)[1 + word];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    to[8 * k + word] = (q >> 2 * k) & 0x03030303;
                }
            } else if (word < 6) {
                // blocks are only 2-byte aligned
                const uint16_t * half_word = (const uint16_t *) (block + 4) + 2 * word;
                int digits[5];
                pt2_digits_tq1_1(half_word[0] | half_word[1] << 16, digits);
#pragma unroll
                for (int k = 0; k < 5; ++k) {
                    to[6 * k + word] = digits[k];
                }
            } else {
                to[30 + word - 6] = pt2_tail_digits_tq1_1(*(const uint16_t *) (block + 28), word - 6);
            }
        }
    }

    // alpha and mu
    constexpr int per_block = tile_x::one_dm_per_block ? 1 : QK_PT2 / QK8_1;
    constexpr int per_row = nblocks * per_block;
    static_assert(warp_size % per_row == 0, "bad warp size");
    constexpr int rows_dm = nwarps * warp_size / per_row;
#pragma unroll
    for (int i0 = 0; i0 < tile_x::I(); i0 += rows_dm) {
        const int thread = threadIdx.y * warp_size + threadIdx.x;
        const int entry = thread % per_row;
        int i = i0 + thread / per_row;
        if (tile_x::I() % rows_dm != 0 && i >= tile_x::I()) {
            break;
        }
        if (fallback) {
            i = min(i, i_max);
        }
        const half * scales = (const half *) (x + (int64_t) (kbx0 + i * stride + entry / per_block) * bs);
        const half alpha = scales[0];
        const half mu = scales[1];
        ((half2 *) x_tile)[tile_x::dm(i) + entry] =
            tile_x::one_dm_per_block ? make_half2(alpha, mu)
                                     : make_half2(alpha, __float2half(__half2float(mu) - __half2float(alpha)));
    }
}

// Upstream's dot products apply the scales of weights and activations to every product of 32
// columns, which costs more than the tensor cores' own work. Here alpha and mu wait for the block's
// end, and the sums come out of the tensor cores as floats: 2^23 + 2^22 + n has n in its last bits.
template <ggml_type type, int J, bool fallback>
static __device__ __forceinline__ void pt2_vec_dot_mma(const int * __restrict__ x, const int * __restrict__ y,
                                                       float * __restrict__ sum, const int k00) {
#if defined(TURING_MMA_AVAILABLE)
    typedef tile<16, 8, int> tile_A;
    typedef tile<8, 8, int> tile_B;
    typedef tile<16, 8, int> tile_C;
    using tile_x = pt2_tile<type, J, fallback>;
    constexpr int ngroups = MMQ_TILE_NE_K / QI8_1;
    constexpr int ntx = ggml_cuda_mmq_get_rows_per_warp(type, J, fallback) / tile_C::I;
    constexpr int zero = 0x4B400000;
    constexpr float zero_f = 12582912.0f;

    y += (threadIdx.y % ntx) * (tile_C::J * MMQ_TILE_Y_K);
    const int i0 = (threadIdx.y / ntx) * (ntx * tile_C::I);

    tile_A A[ntx][ngroups];
    float alpha[ntx][tile_C::ne / 2];
    float offset[ntx][tile_C::ne / 2];
#pragma unroll
    for (int n = 0; n < ntx; ++n) {
#pragma unroll
        for (int g = 0; g < ngroups; ++g) {
            load_ldmatrix(A[n][g], x + (i0 + n * tile_A::I) * tile_x::stride() + k00 + g * QI8_1, tile_x::stride());
        }
#pragma unroll
        for (int l = 0; l < tile_C::ne / 2; ++l) {
            const int i = i0 + n * tile_C::I + tile_C::get_i(2 * l);
            const float2 dm = __half22float2(((const half2 *) x)[tile_x::dm(i) + k00 / MMQ_TILE_NE_K]);
            alpha[n][l] = dm.x;
            offset[n][l] = dm.y - dm.x;
        }
    }

#pragma unroll
    for (int j0 = 0; j0 < J; j0 += ntx * tile_C::J) {
        tile_B B[ngroups];
        float d[2][ngroups];
        float s[2];
#pragma unroll
        for (int g = 0; g < ngroups; ++g) {
            load_generic(B[g], y + 4 + j0 * MMQ_TILE_Y_K + g * QI8_1, MMQ_TILE_Y_K);
        }
#pragma unroll
        for (int l = 0; l < 2; ++l) {
            const int4 raw = *(const int4 *) (y + (j0 + tile_C::get_j(l)) * MMQ_TILE_Y_K);
            const int words[ngroups] = { raw.x, raw.y, raw.z, raw.w };
            s[l] = 0.0f;
#pragma unroll
            for (int g = 0; g < ngroups; ++g) {
                const float2 ds = __half22float2(*(const half2 *) &words[g]);
                d[l][g] = ds.x;
                s[l] += ds.y;
            }
        }

#pragma unroll
        for (int n = 0; n < ntx; ++n) {
            float block[tile_C::ne] = { 0.0f };
#pragma unroll
            for (int g = 0; g < ngroups; ++g) {
                tile_C C;
#pragma unroll
                for (int l = 0; l < tile_C::ne; ++l) {
                    C.x[l] = zero;
                }
                mma(C, A[n][g], B[g]);
#pragma unroll
                for (int l = 0; l < tile_C::ne; ++l) {
                    block[l] += d[l % 2][g] * (__int_as_float(C.x[l]) - zero_f);
                }
            }
#pragma unroll
            for (int l = 0; l < tile_C::ne; ++l) {
                float & out = sum[(j0 / tile_C::J + n) * tile_C::ne + l];
                out += alpha[n][l / 2] * block[l];
                out += offset[n][l / 2] * s[l % 2];
            }
        }
    }
#else
    GGML_UNUSED_VARS(x, y, sum, k00);
    NO_DEVICE_CODE;
#endif // defined(TURING_MMA_AVAILABLE)
}

template <ggml_type type, int J, bool fallback>
static constexpr __device__ ggml_cuda_mmq_util_funcs pt2_mmq_util_funcs() {
#if defined(TURING_MMA_AVAILABLE)
    return ggml_cuda_mmq_util_funcs(-1, pt2_load_tiles<type, J, fallback>, pt2_vec_dot_mma<type, J, fallback>,
                                    ggml_cuda_mmq_write_back_mma<type, J, fallback>);
#elif defined(AMD_MFMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
    return ggml_cuda_mmq_util_funcs(-1, pt2_load_tiles<type, J, fallback>,
                                    ggml_cuda_mmq_vec_dot_q8_1_q8_1_mma<type, J, fallback>,
                                    ggml_cuda_mmq_write_back_mma<type, J, fallback>);
#else
    return ggml_cuda_mmq_util_funcs(VDR_Q5_1_Q8_1_MMQ, pt2_load_tiles<type, J, fallback>,
                                    ggml_cuda_mmq_vec_dot_q8_1_q8_1_dp4a<type, J, fallback>,
                                    ggml_cuda_mmq_write_back_dp4a<type, J, fallback>);
#endif
}
