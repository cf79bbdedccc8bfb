// What the matvecs share: pt2-mmvq.cu, and for one column on Hopper pt2-hopper-vec.cu.
#pragma once

#include "pt2-cuda.cuh"
#include "pt2-group.cuh"
#include "unary.cuh"

struct mmv_args {
    pt2_group group;           // the weights and where the results go, more than one only for matrices
    const char * gate;         // weights of the gate, or NULL
    const int8_t * y;          // quantized activations
    const int8_t * y_gate;     // the same in the gate's column order
    const pt2_vec_scales * ys; // their scales
    const pt2_vec_scales * ys_gate;
    const int32_t * ids; // experts, or NULL
    const float * gate_bias;
    int nblocks;              // per row
    int nblocks_y;            // per row of y, with padding
    int64_t nb01, nb02, nb03; // bytes
    uint3 ne12;               // channels of y, for ids rows of y per token
    uint3 r2, r3;             // channels and samples of y for one of x
    int64_t stride_y;         // rows of y from one channel, for ids one token, to the next
    int64_t s2, s3;           // of dst and biases, in elements, as s1 is; for ids s1 is a slot's, s2 a token's
    int64_t ids_stride;       // from token to token
    int64_t s_bias;           // from expert to expert
    ggml_glu_op glu_op;
    float glu_limit;
};

// What one lane does with its part of a block.
template <ggml_type type> struct lane_part;

// Words 2*part and 2*part + 1 of all four planes.
template <> struct lane_part<GGML_TYPE_TQ2_1> {
    static constexpr int parts = pt2_vec_parts(GGML_TYPE_TQ2_1);
    static constexpr int steps = 4; // loaded at once
    static constexpr int ints = 8;  // of activations
    static constexpr int planes = 4;

    int q[2];
    half2 scales;

    __device__ __forceinline__ void load(const char * at, const int part) {
        const int * block = (const int *) at;
        scales = *(const half2 *) block;
        q[0] = block[1 + 2 * part];
        q[1] = block[2 + 2 * part];
    }

    // The digits stay where they are in their bytes, the activations' scales make up for it.
    __device__ __forceinline__ void digits(int (&u)[ints], const int part) const {
#pragma unroll
        for (int k = 0; k < planes; ++k) {
            u[2 * k + 0] = q[0] & (0x03030303 << 2 * k);
            u[2 * k + 1] = q[1] & (0x03030303 << 2 * k);
#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
            if (k == 3) { // as signed bytes they would not fit
                u[6] = (q[0] >> 6) & 0x03030303;
                u[7] = (q[1] >> 6) & 0x03030303;
            }
#endif
        }
        GGML_UNUSED(part);
    }

    static __device__ __forceinline__ float plane_scale(const float * d, const int k) {
#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
        return k == 3 ? 64.0f * d[k] : d[k];
#else
        return d[k];
#endif
    }

    // The plane of an int of activations.
    static constexpr __device__ int plane(const int i) {
        return i / 2;
    }
    static constexpr __device__ int sum_of(const int part) {
        return part / 2;
    }
};

// Words 3*part to 3*part + 2 of all five planes, and two of the tail's four planes.
template <> struct lane_part<GGML_TYPE_TQ1_1> {
    static constexpr int parts = pt2_vec_parts(GGML_TYPE_TQ1_1);
    static constexpr int steps = 2;
    static constexpr int ints = 16;
    static constexpr int planes = 6;

    uint32_t q[3];
    uint32_t tail;
    half2 scales;

    // Blocks are 30 bytes: every other one starts in the middle of a word.
    __device__ __forceinline__ void load(const char * block, const int part) {
        const char * at = block + 4 + 12 * part;
        const int odd = (uintptr_t) at % 4;
        const int shift = 8 * odd;
        const uint32_t * word = (const uint32_t *) (at - odd);
        uint32_t w[4] = { word[0], word[1], word[2], 0 };
        if (shift) {
            w[3] = word[3];
        }
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            q[i] = __funnelshift_r(w[i], w[i + 1], shift);
        }
        const half * head = (const half *) block;
        scales = make_half2(head[0], head[1]);
        tail = *(const uint16_t *) (block + 28);
    }

    __device__ __forceinline__ void digits(int (&u)[ints], const int part) const {
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            int d[5];
            pt2_digits_tq1_1(q[i], d);
#pragma unroll
            for (int k = 0; k < 5; ++k) {
                u[3 * k + i] = d[k];
            }
        }
        u[15] = pt2_tail_digits_tq1_1(tail, part);
    }

    static __device__ __forceinline__ float plane_scale(const float * d, const int k) {
        return d[k];
    }
    static constexpr __device__ int plane(const int i) {
        return i / 3;
    }
    static constexpr __device__ int sum_of(const int part) {
        return part;
    }
};

static __device__ __forceinline__ float glu(const mmv_args & args, const float gate, const float x) {
    switch (args.glu_op) {
    case GGML_GLU_OP_SWIGLU:
        return x * ggml_cuda_op_silu_single(gate);
    case GGML_GLU_OP_GEGLU:
        return x * ggml_cuda_op_gelu_single(gate);
    case GGML_GLU_OP_SWIGLU_OAI:
        return ggml_cuda_op_swiglu_oai_single(gate, x);
    case GGML_GLU_OP_SWIGLU_CLAMP:
        return ggml_cuda_op_swiglu_clamp_single(gate, x, args.glu_limit);
    default:
        return x * gate;
    }
}

// A result from the sums of a row of weights, and of the gate's.
template <bool gated>
static __device__ __forceinline__ float finish(const mmv_args & args, const pt2_product & product, float x,
                                               const float gate, const int64_t at_bias) {
    if (product.bias) {
        x += product.bias[at_bias];
    }
    if constexpr (gated) {
        x = glu(args, gate + (args.gate_bias ? args.gate_bias[at_bias] : 0.0f), x);
    }
    return x;
}
