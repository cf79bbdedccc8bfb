// Matmul of TQ2_1 for many columns on NVIDIA GPUs since Ampere; what it does not take goes to
// upstream's matmul (pt2-mmq.cuh).
//
// A tile is 128 rows times 128 columns, block of weights after block of weights, which cp.async brings
// as they are into a ring of stages. The tensor cores' operands are made of the
// packed digits in registers: plane k of the bytes, shifted to the top, is 64 times the digits of
// columns 32k to 32k + 31. The products come out as floats: the accumulators start as 2^23 + 2^22,
// so that their bits read as that plus 64 times the product; what this adds to the sum over the
// activations' four scales is known when these are quantized, and the sum starts with its negative.
// At 64 times the product a float's rounding of the large number is far below the activations' own.
// That leaves one multiply-add per 32 products, and two per 128 for alpha and mu.
#include "pt2-cuda.cuh"

#define PT2_MM_THREADS 256
#define PT2_MM_STAGES  4
#define PT2_MM_TILE    128

static constexpr int MM_ACC_BITS = 0x4B400000;
static constexpr float MM_ACC = 12582912.0f;

struct mm_column {
    int8_t qs[QK_PT2];
    int8_t padding[16]; // 8 columns are in different banks
};

// of a tile's columns
struct mm_scales {
    float d[4][PT2_MM_TILE];  // 1/64 of the activations' scales
    float start[PT2_MM_TILE]; // minus MM_ACC times their sum
    float s[PT2_MM_TILE];     // the sum of the dequantized activations
};

struct mm_stage {
    mm_column y[PT2_MM_TILE];
    mm_scales scales;
    block_tq2_1 x[PT2_MM_TILE];
};

struct mm_args {
    const char * x;
    const mm_column * y;
    const mm_scales * scales; // of every tile's columns
    float * dst;
    int nblocks, nrows, ncols, ncols_padded;
    int64_t nb01, nb02, nb03;
    uint3 ne12, r2, r3;
    int64_t s1, s2, s3;
};

static __global__ void quantize_mm(const float * __restrict__ x, const int32_t * __restrict__ perm,
                                   mm_column * __restrict__ y, mm_scales * __restrict__ scales, const int nblocks,
                                   const int ncols_padded, const uint3 ne12, const int64_t s1, const int64_t s2,
                                   const int64_t s3) {
    const int ib = blockIdx.y * blockDim.y + threadIdx.y;
    if (ib >= nblocks) {
        return;
    }
    const int lane = threadIdx.x;
    const uint2 i32 = fast_div_modulo(blockIdx.z, ne12);
    x += i32.x * s3 + i32.y * s2 + blockIdx.x * s1;
    const int column = QK_PT2 * ib + 4 * lane;
    const int4 at = perm ? *(const int4 *) (perm + column) : make_int4(column, column + 1, column + 2, column + 3);
    const float v[4] = { x[at.x], x[at.y], x[at.z], x[at.w] };

    float max = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
#pragma unroll
    for (int offset = 4; offset > 0; offset >>= 1) {
        max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFF, max, offset, WARP_SIZE));
    }
    const float d = max / 127.0f;
    const float inverse = d > 0.0f ? 1.0f / d : 0.0f;
    int q[4];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        q[i] = __float2int_rn(v[i] * inverse);
        sum += q[i];
    }
#pragma unroll
    for (int offset = 4; offset > 0; offset >>= 1) {
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, offset, WARP_SIZE);
    }
    const float d64 = d / 64.0f;
    float d_total = d64;
    float s_total = d * (float) sum;
#pragma unroll
    for (int offset = 8; offset < WARP_SIZE; offset <<= 1) {
        d_total += __shfl_xor_sync(0xFFFFFFFF, d_total, offset, WARP_SIZE);
        s_total += __shfl_xor_sync(0xFFFFFFFF, s_total, offset, WARP_SIZE);
    }

    const int64_t to = ((int64_t) blockIdx.z * nblocks + ib) * ncols_padded + blockIdx.x;
    ((char4 *) y[to].qs)[lane] = make_char4(q[0], q[1], q[2], q[3]);
    scales += to / PT2_MM_TILE;
    const int col = to % PT2_MM_TILE;
    if (lane % 8 == 0) {
        scales->d[lane / 8][col] = d64;
    }
    if (lane == 0) {
        scales->start[col] = -MM_ACC * d_total;
        scales->s[col] = s_total;
    }
}

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
#define PT2_MM_AVAILABLE

template <int bytes> static __device__ __forceinline__ void copy_async(void * to, const void * from) {
    const uint32_t shared = __cvta_generic_to_shared(to);
    if constexpr (bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from));
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(bytes));
    }
}

static __device__ __forceinline__ void load_matrices(int (&m)[4], const void * row) {
    const uint32_t shared = __cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared));
}

// 16 rows of unsigned times 8 columns of signed bytes, 32 of them.
static __device__ __forceinline__ void multiply(int (&c)[4], const int (&a)[4], const int b0, const int b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, "
        "%10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(MM_ACC_BITS));
}
#endif

__launch_bounds__(PT2_MM_THREADS, 1) static __global__ void mul_mat(const mm_args args) {
#if defined(PT2_MM_AVAILABLE)
    constexpr int MT = 2; // 16 rows each, per warp
    constexpr int NT = 8; // 8 columns each, per warp
    constexpr int x_words = sizeof(block_tq2_1) / sizeof(int);
    extern __shared__ __align__(16) char stages_shared[];
    mm_stage * stages = (mm_stage *) stages_shared;

    const int thread = threadIdx.x;
    const int lane = thread % 32;
    const int warp = thread / 32;
    const int row0 = blockIdx.y * PT2_MM_TILE;
    const int col0 = blockIdx.x * PT2_MM_TILE;
    const uint2 i32 = fast_div_modulo(blockIdx.z, args.ne12);

    const char * x = args.x + fastdiv(i32.y, args.r2) * args.nb02 + fastdiv(i32.x, args.r3) * args.nb03;
    const int64_t y0 = (int64_t) blockIdx.z * args.nblocks * args.ncols_padded + col0;

    // rows of blocks are only 4-byte aligned: they are copied word by word
    constexpr int x_copies = (PT2_MM_TILE * x_words + PT2_MM_THREADS - 1) / PT2_MM_THREADS;
    uint32_t x_offset[x_copies];
#pragma unroll
    for (int i = 0; i < x_copies; ++i) {
        const int word = i * PT2_MM_THREADS + thread;
        x_offset[i] = min(word / x_words, args.nrows - 1 - row0) * (uint32_t) args.nb01 + word % x_words * sizeof(int);
    }
    x += row0 * args.nb01;

    const auto load = [&](const int ib) {
        if (ib < args.nblocks) {
            mm_stage & stage = stages[ib % PT2_MM_STAGES];
            const char * y = (const char *) (args.y + y0 + (int64_t) ib * args.ncols_padded);
#pragma unroll
            for (int i0 = 0; i0 < (int) sizeof(stage.y); i0 += 16 * PT2_MM_THREADS) {
                const int i = i0 + 16 * thread;
                if (i < (int) sizeof(stage.y)) {
                    copy_async<16>((char *) stage.y + i, y + i);
                }
            }
            if (16 * thread < (int) sizeof(stage.scales)) {
                copy_async<16>((char *) &stage.scales + 16 * thread,
                               (const char *) (args.scales + (y0 + (int64_t) ib * args.ncols_padded) / PT2_MM_TILE) +
                                   16 * thread);
            }
#pragma unroll
            for (int i = 0; i < x_copies; ++i) {
                const int word = i * PT2_MM_THREADS + thread;
                if (word < PT2_MM_TILE * x_words) {
                    copy_async<4>((int *) stage.x + word, x + x_offset[i] + ib * sizeof(block_tq2_1));
                }
            }
        }
        asm volatile("cp.async.commit_group;");
    };

#pragma unroll
    for (int ib = 0; ib < PT2_MM_STAGES - 1; ++ib) {
        load(ib);
    }

    const int warp_row = warp / (PT2_MM_TILE / (8 * NT)) * (16 * MT);
    const int warp_col = warp % (PT2_MM_TILE / (8 * NT)) * (8 * NT);
    float out[MT][NT][4] = { { { 0.0f } } };

    for (int ib = 0; ib < args.nblocks; ++ib) {
        asm volatile("cp.async.wait_group %0;" ::"n"(PT2_MM_STAGES - 2));
        __syncthreads();
        load(ib + PT2_MM_STAGES - 1); // into the stage that everybody has left
        const mm_stage & stage = stages[ib % PT2_MM_STAGES];

        const block_tq2_1 * rows = stage.x + warp_row + lane / 4;
        int q[MT][2][2];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int * words = (const int *) rows[16 * m + 8 * h].qs;
                q[m][h][0] = words[lane % 4];
                q[m][h][1] = words[lane % 4 + 4];
            }
        }
        // this lane's two columns in every tile of 8
        const int j0 = warp_col + 2 * (lane % 4);
        float block[MT][NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const float2 start = *(const float2 *) (stage.scales.start + j0 + 8 * n);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                block[m][n][0] = block[m][n][2] = start.x;
                block[m][n][1] = block[m][n][3] = start.y;
            }
        }
#pragma unroll
        for (int g = 0; g < 4; ++g) {
            int a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    a[m][i] = (q[m][i % 2][i / 2] << (6 - 2 * g)) & 0xC0C0C0C0;
                }
            }
#pragma unroll
            for (int n0 = 0; n0 < NT; n0 += 2) {
                int b[4]; // both halves of two tiles' 32 bytes
                load_matrices(b, stage.y[warp_col + 8 * n0 + lane / 16 * 8 + lane % 8].qs + 32 * g + lane / 8 % 2 * 16);
#pragma unroll
                for (int n = n0; n < n0 + 2; ++n) {
                    const float2 d = *(const float2 *) (stage.scales.d[g] + j0 + 8 * n);
#pragma unroll
                    for (int m = 0; m < MT; ++m) {
                        int c[4];
                        multiply(c, a[m], b[2 * (n - n0)], b[2 * (n - n0) + 1]);
#pragma unroll
                        for (int l = 0; l < 4; ++l) {
                            block[m][n][l] += (l % 2 ? d.y : d.x) * __int_as_float(c[l]);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const float2 dm0 = __half22float2(*(const half2 *) &rows[16 * m]);
            const float2 dm1 = __half22float2(*(const half2 *) &rows[16 * m + 8]);
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const float2 s = *(const float2 *) (stage.scales.s + j0 + 8 * n);
#pragma unroll
                for (int l = 0; l < 4; ++l) {
                    const float2 dm = l < 2 ? dm0 : dm1;
                    out[m][n][l] += dm.x * block[m][n][l];
                    out[m][n][l] += (dm.y - dm.x) * (l % 2 ? s.y : s.x);
                }
            }
        }
    }

    float * dst = args.dst + i32.x * args.s3 + i32.y * args.s2;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int l = 0; l < 4; ++l) {
                const int row = row0 + warp_row + 16 * m + 8 * (l / 2) + lane / 4;
                const int col = col0 + warp_col + 8 * n + 2 * (lane % 4) + l % 2;
                if (row < args.nrows && col < args.ncols) {
                    dst[col * args.s1 + row] = out[m][n][l];
                }
            }
        }
    }
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif
}

bool pt2_mul_mat_many(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * perm = ggml_mul_mat_get_perm(dst);
    const auto & device = ggml_cuda_info().devices[ggml_cuda_get_device()];
    const int64_t channels = src1->ne[2] * src1->ne[3];
    const dim3 grid((src1->ne[1] + PT2_MM_TILE - 1) / PT2_MM_TILE, (src0->ne[1] + PT2_MM_TILE - 1) / PT2_MM_TILE,
                    channels);
    // unless its tiles keep the processors busy, upstream's matmul, which cuts tiles, is faster
    const int64_t ntiles = (int64_t) grid.x * grid.y * grid.z;
    const int64_t nwaves = (ntiles + device.nsm - 1) / device.nsm;
    const bool busy = 4 * ntiles >= 3 * nwaves * device.nsm;
    if (src0->type != GGML_TYPE_TQ2_1 || dst->op != GGML_OP_MUL_MAT || src1->ne[1] <= PT2_MM_TILE / 2 || !busy ||
        grid.y > 65535 || grid.z > 65535 || !GGML_CUDA_CC_IS_NVIDIA(device.cc) ||
        ggml_cuda_highest_compiled_arch(device.cc) < GGML_CUDA_CC_AMPERE ||
        sizeof(mm_stage) * PT2_MM_STAGES > device.smpbo) {
        return false;
    }
    cudaStream_t stream = ctx.stream();

    mm_args args = {};
    args.nblocks = src0->ne[0] / QK_PT2;
    args.nrows = src0->ne[1];
    args.ncols = src1->ne[1];
    args.ncols_padded = grid.x * PT2_MM_TILE;
    const int64_t n = channels * args.nblocks * args.ncols_padded;
    ggml_cuda_pool_alloc<char> y(ctx.pool(), n * sizeof(mm_column) + n / PT2_MM_TILE * sizeof(mm_scales));
    args.x = (const char *) src0->data;
    args.y = (const mm_column *) y.get();
    args.scales = (const mm_scales *) (args.y + n);
    args.dst = (float *) dst->data;
    args.nb01 = src0->nb[1];
    args.nb02 = src0->nb[2];
    args.nb03 = src0->nb[3];
    args.ne12 = init_fastdiv_values(src1->ne[2]);
    args.r2 = init_fastdiv_values(src1->ne[2] / src0->ne[2]);
    args.r3 = init_fastdiv_values(src1->ne[3] / src0->ne[3]);
    args.s1 = dst->nb[1] / sizeof(float);
    args.s2 = dst->nb[2] / sizeof(float);
    args.s3 = dst->nb[3] / sizeof(float);

    quantize_mm<<<dim3(args.ncols, (args.nblocks + 3) / 4, channels), dim3(WARP_SIZE, 4, 1), 0, stream>>>(
        (const float *) src1->data, perm ? (const int32_t *) perm->data : nullptr, (mm_column *) y.get(),
        (mm_scales *) args.scales, args.nblocks, args.ncols_padded, args.ne12, src1->nb[1] / sizeof(float),
        src1->nb[2] / sizeof(float), src1->nb[3] / sizeof(float));
    CUDA_CHECK(cudaGetLastError());
    const int shared = sizeof(mm_stage) * PT2_MM_STAGES;
    CUDA_SET_SHARED_MEMORY_LIMIT(mul_mat, shared);
    mul_mat<<<grid, PT2_MM_THREADS, shared, stream>>>(args);
    CUDA_CHECK(cudaGetLastError());
    return true;
}
