// Activations of one block to 8 bits, four columns for each lane of a warp. Scales belong to 32 columns, or to the
// digit planes of a TQ1_1 block (24 columns).
#pragma once

#include "pt2-cuda.cuh"

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

// (Upstream's sum of integers is of whole warps, whatever the width, since Ampere.)
static __device__ __forceinline__ int sum_of_eight(int v) {
#pragma unroll
    for (int offset = 4; offset > 0; offset >>= 1) {
        v += __shfl_xor_sync(0xFFFFFFFF, v, offset, WARP_SIZE);
    }
    return v;
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

// For the matvec: block ib of a row, qs and scales are the row's.
template <ggml_type type>
static __device__ __forceinline__ void store_quantized(const float4 x, const int lane, const int ib, int8_t * qs,
                                                       pt2_vec_scales * scales) {
    // this lane's columns are an int of the matvec's lane part
    const auto store = [&](const int part, const int i, const char4 q) {
        *(char4 *) (qs + pt2_vec_offset(type, ib, part, i / 4) + i % 4 * 4) = q;
    };

    if constexpr (type == GGML_TYPE_TQ2_1) {
        // a lane of the matvec: two ints of every plane
        const int plane = lane / 8;
        const float d = warp_reduce_max<8>(abs_max(x)) / 127.0f;
        const char4 q = quantize(x, d);
        const int s = sum_of_eight(sum(q));
        const float own = (float) s * d;
        const float other = __shfl_xor_sync(0xFFFFFFFF, own, 8, WARP_SIZE);
        store(lane % 8 / 2, 2 * plane + lane % 2, q);
        if (lane % 8 == 0) {
            scales[ib].d[plane] = d / (1 << 2 * plane);
            if (plane % 2 == 0) {
                scales[ib].s[plane / 2] = 0.5f * (own + other); // two lanes of the matvec add it
            }
        }
    } else {
        // a lane of the matvec: three ints of every plane and one of the tail
        const bool tail = lane >= 30;
        const int plane = lane / 6;
        const int word = lane % 6;
        const int first = 6 * plane;
        const int n = tail ? 2 : 6;
        const float d = max_of_lanes(abs_max(x), first, n) / 127.0f;
        const char4 q = quantize(x, d);
        const float s = (float) sum_of_lanes(sum(q), first, n) * d;
        store(tail ? word : word / 3, tail ? 15 : 3 * plane + word % 3, q);
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            total += __shfl_sync(0xFFFFFFFF, s, 6 * i, WARP_SIZE);
        }
        if (word == 0) {
            scales[ib].d[plane] = d;
        }
        if (lane < 2) {
            scales[ib].s[lane] = 0.5f * total;
        }
    }
}
