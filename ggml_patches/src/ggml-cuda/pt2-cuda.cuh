// The ternary types on CUDA (and HIP): what the hooks in upstream's files refer to.
//
// Up to 8 columns go to a matvec (pt2-mmvq.cu), more to a matmul: one for Hopper (pt2-hopper.cu), one
// for Ampere and newer (pt2-matmul.cu), or upstream's with our tile loader (pt2-mmq.cuh). All quantize
// the activations first and gather their columns on the way. Nothing is dequantized for cuBLAS.
#pragma once

#include "common.cuh"
#include "ggml-pt2.h"

static constexpr __host__ __device__ bool pt2_is_ternary(ggml_type type) {
    return type == GGML_TYPE_TQ1_1 || type == GGML_TYPE_TQ2_1;
}

template <> struct ggml_cuda_type_traits<GGML_TYPE_TQ1_1> {
    static constexpr int qk = QK_PT2;
    static constexpr int bs = sizeof(block_tq1_1);
};

template <> struct ggml_cuda_type_traits<GGML_TYPE_TQ2_1> {
    static constexpr int qk = QK_PT2;
    static constexpr int bs = sizeof(block_tq2_1);
};

// For the matmul's table of tile sizes a ternary type is one that keeps a scale and an offset.
static constexpr __host__ __device__ ggml_type pt2_mmq_config_type(ggml_type type) {
    return pt2_is_ternary(type) ? GGML_TYPE_Q5_1 : type;
}

// Four digits (unsigned bytes) times four activations (signed bytes).
static __device__ __forceinline__ int pt2_dot(const int digits, const int x, int sum) {
#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && __CUDA_ARCH__ >= GGML_CUDA_CC_DP4A
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(digits), "r"(x));
    return sum;
#else
    return ggml_cuda_dp4a(digits, x, sum);
#endif
}

// TQ1_1: the five digits of each of four bytes, d[k] has digit k in the bytes' order. A byte times
// 3^(k+1) fits into 16 bits, whose upper half is then the number that the first k+1 digits make:
// 3 times the one before it plus digit k, in every byte, without a carry between bytes.
static __device__ __forceinline__ void pt2_digits_tq1_1(const uint32_t bytes, int (&d)[5]) {
    const uint32_t even = bytes & 0x00FF00FF;
    const uint32_t odd = (bytes >> 8) & 0x00FF00FF;
    uint32_t before = 0;
    uint32_t power = 1;
#pragma unroll
    for (int k = 0; k < 5; ++k) {
        power *= 3;
        const uint32_t number = __byte_perm(even * power, odd * power, 0x7351);
        d[k] = number - 3 * before;
        before = number;
    }
}

// TQ1_1: digits 2h and 2h+1 of the last two bytes of a block, columns 120 + 4h to 123 + 4h.
static __device__ __forceinline__ int pt2_tail_digits_tq1_1(const uint32_t two_bytes, const int h) {
    uint32_t fraction = (two_bytes & 0xFF) | (two_bytes & 0xFF00) << 8;
    fraction = (fraction * (h == 0 ? 1 : 9)) & 0x00FF00FF;
    const uint32_t first = fraction * 3;
    const uint32_t second = (first & 0x00FF00FF) * 3;
    return __byte_perm(first, second, 0x7531);
}

// in ggml_backend_cuda_device_supports_op, for src[0] of a ternary type
bool ggml_cuda_pt2_supports_op(const ggml_tensor * op);

// in ggml_cuda_mul_mat, ggml_cuda_mul_mat_id, and for fused nodes ggml_cuda_mul_mat_vec_q
void ggml_cuda_pt2_mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_pt2_mul_mat_vec(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1,
                               ggml_tensor * dst, const ggml_cuda_mm_fusion_args_host * fusion);

// The matmul for many columns; false: this one is not for it.
bool pt2_mul_mat_many(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// in get_rows_cuda and ggml_cuda_cpy
void ggml_cuda_pt2_get_rows(const void * src0_d, ggml_type src0_type, const int32_t * src1_d, void * dst_d,
                            ggml_type dst_type, int64_t ne00, size_t nb01, size_t nb02, size_t nb03, int64_t ne10,
                            int64_t ne11, int64_t ne12, size_t nb10, size_t nb11, size_t nb12, size_t nb1, size_t nb2,
                            size_t nb3, cudaStream_t stream);
void ggml_cuda_pt2_cpy(const ggml_tensor * src, ggml_tensor * dst, cudaStream_t stream);

// Activations for the matvec: for 32 lanes at a time, 16 bytes for one lane after the other as
// often as it takes, so that every load of a warp is of consecutive bytes. Rows are padded
// to whole such groups with zeros. pt2_vec_scales are as many as there are blocks with padding.
static constexpr int PT2_VEC_LANES = 32;

static constexpr __host__ __device__ int pt2_vec_parts(ggml_type type) { // lanes of the matvec per block
    return type == GGML_TYPE_TQ2_1 ? 4 : 2;
}

static constexpr __host__ __device__ int64_t pt2_vec_padded_blocks(ggml_type type, int64_t nblocks) {
    const int group = PT2_VEC_LANES / pt2_vec_parts(type);
    return (nblocks + group - 1) / group * group;
}

// Where bytes 16*i to 16*i + 15 of a lane's part of a block are.
static constexpr __host__ __device__ int64_t pt2_vec_offset(ggml_type type, int64_t ib, int part, int i) {
    const int parts = pt2_vec_parts(type);
    const int group = PT2_VEC_LANES / parts;
    return ib / group * (group * QK_PT2) + i * (16 * PT2_VEC_LANES) + (ib % group * parts + part) * 16;
}

struct pt2_vec_scales {
    float d[6]; // one per digit plane, TQ1_1's tail is the sixth; TQ2_1: four, times 4^-plane
    float s[2]; // over all lanes of the matvec, they add up to the sum of the dequantized activations
};
static_assert(sizeof(pt2_vec_scales) == 32, "read as two vectors of four");

// in ggml_cuda_mul_mat_q: block_q8_1_mmq with scale and sum. ids as in upstream's functions for the
// same; n_scatter > 0: each row is written n_scatter times, to the rows ids says.
void pt2_quantize_mmq(const float * x, const ggml_tensor * perm, const int32_t * ids, int n_scatter, void * y,
                      int64_t ne00, int64_t s01, int64_t s02, int64_t s03, int64_t ne0, int64_t ne1, int64_t ne2,
                      int64_t ne3, int64_t nrows, cudaStream_t stream);
