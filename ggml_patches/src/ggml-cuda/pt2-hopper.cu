// Matmul for many columns on Hopper (compute capability 9.0), compiled for sm_90a alone: its warp-group instructions
// are in no other architecture.
//
// A thread block multiplies 128 rows with N columns, a pair of weights' blocks after the other. Each of its two warp
// groups has 64 rows. The activations come as whole tiles of shared memory, already in the layout that the tensor
// cores read, by one bulk copy each into a ring of stages; the weights as they are in memory, each warp its own rows.
// Digits are unpacked in registers, which is where the tensor cores take their first operand from.
//
// Activations have one scale for 128 columns here, as on CPUs; the other kernels have one for 32. The float operations
// for each block of each result, not the tensor cores, bind this kernel. What is left of them is the integers'
// conversion, one product and one multiply-add. The offsets' part of the results, mu - alpha times the activations'
// sums, is a small matmul of its own in tf32. alpha and mu are exact there, and the sums come in two parts.
//
// When there are too few tiles for the GPU, a cluster of thread blocks shares one: each takes a part of the blocks, and
// the results come together through distributed shared memory, always in the same order.
#include "pt2-hopper.cuh"

#include "pt2-barrier.cuh"
#include "pt2-group.cuh"

#define PT2_HOPPER_THREADS     256
#define PT2_HOPPER_WARPS       (PT2_HOPPER_THREADS / WARP_SIZE)
#define PT2_HOPPER_ROWS        128
#define PT2_HOPPER_STAGES      4
#define PT2_HOPPER_ROW_STAGES  3
#define PT2_HOPPER_MAX_CLUSTER 4

// A pair of blocks of N columns.
template <int N> struct __align__(1024) hopper_tile {
    int8_t qs[2][N][QK_PT2]; // with the 128-byte swizzle
    float d[2][N];
    float s[N][8]; // of each block the sum of the dequantized activations in two parts for tf32, then their negatives
};

template <int N> struct hopper_shared {
    hopper_tile<N> tiles[PT2_HOPPER_STAGES];
    char rows[PT2_HOPPER_ROW_STAGES][PT2_HOPPER_WARPS][16 * 2 * sizeof(block_tq2_1)];
    uint64_t full[PT2_HOPPER_STAGES];
    uint64_t empty[PT2_HOPPER_STAGES];
};

struct hopper_args {
    pt2_group group;
    const void * y; // tiles
    int pairs, ncols, cluster;
    int64_t nb01, nb02, nb03;
    uint3 ne12, r2, r3;
    int64_t s2, s3;
};

// A tile's place and the operands' places in it ---------------------------------------------------------------------

// The column of a block whose digit is at place i of what the tensor cores see. Thread t of four has bytes 4t to 4t+3
// of every 16. TQ2_1: columns in their order. TQ1_1: of its 24 bytes with five digits a thread has six, four of which
// make five words, the other two and one digit each of the last two bytes three more.
static __device__ __forceinline__ int hopper_column(const ggml_type type, const int i) {
    if (type == GGML_TYPE_TQ2_1) {
        return i;
    }
    const int word = i / 16;
    const int t = i % 16 / 4;
    const int j = i % 4;
    if (word < 5) {
        return 24 * word + 6 * t + j;
    }
    const int digit = 2 * (word - 5) + j / 2;
    return digit < 5 ? 24 * digit + 6 * t + 4 + j % 2 : 120 + 2 * t + j % 2;
}

template <ggml_type type, int N>
static __global__ void quantize_hopper(const float * __restrict__ x, const int32_t * __restrict__ perm,
                                       hopper_tile<N> * __restrict__ y, const int nblocks, const uint3 ne12,
                                       const int64_t s1, const int64_t s2, const int64_t s3) {
    const int lane = threadIdx.x;
    const uint2 i32 = fast_div_modulo(blockIdx.y, ne12);
    x += i32.x * s3 + i32.y * s2 + blockIdx.x * s1;
    const int ntiles = (gridDim.x + N - 1) / N;
    y += ((int64_t) blockIdx.y * ntiles + blockIdx.x / N) * (nblocks / 2);
    const int col = blockIdx.x % N;
    // one thread block for a column, whose values the first-level cache holds while they are gathered
    for (int ib = threadIdx.y; ib < nblocks; ib += blockDim.y) {
        float v[4];
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = QK_PT2 * ib + hopper_column(type, 4 * lane + i);
            v[i] = x[perm ? perm[column] : column];
            largest = fmaxf(largest, fabsf(v[i]));
        }
        const float d = warp_reduce_max(largest) / 127.0f;
        const float inverse = d > 0.0f ? 1.0f / d : 0.0f;
        int q[4];
        int sum = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            q[i] = max(-127, min(127, __float2int_rn(v[i] * inverse)));
            sum += q[i];
        }
        const float s = d * (float) warp_reduce_sum(sum);
        hopper_tile<N> & tile = y[ib / 2];
        char4 * to = (char4 *) (tile.qs[ib % 2][col] + (lane / 4 ^ col % 8) * 16);
        to[lane % 4] = make_char4(q[0], q[1], q[2], q[3]);
        if (lane == 0) {
            const float high = __int_as_float(__float_as_int(s) & 0xFFFFE000);
            tile.d[ib % 2][col] = d;
            *(float4 *) (tile.s[col] + ib % 2 * 4) = make_float4(high, s - high, -high, high - s);
        }
    }
}

// What a thread holds of a block of two rows, 8 apart. After unpack, a[k][i] are four digits for the k-th of four
// instructions: of row i % 2, bytes 16 * (i / 2) + 4t to + 3 of its 32.
template <ggml_type type> struct hopper_weights;

template <> struct hopper_weights<GGML_TYPE_TQ2_1> {
    half2 scales[2];
    uint32_t words[2][2];

    __device__ __forceinline__ void load(const char * const (&rows)[2], const int t) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            scales[r] = *(const half2 *) rows[r];
            words[r][0] = ((const uint32_t *) rows[r])[1 + t];
            words[r][1] = ((const uint32_t *) rows[r])[5 + t];
        }
    }

    __device__ __forceinline__ void unpack(uint32_t (&a)[4][4], const int) const {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[k][i] = (words[i % 2][i / 2] >> 2 * k) & 0x03030303;
            }
        }
    }
};

template <> struct hopper_weights<GGML_TYPE_TQ1_1> {
    half2 scales[2];
    uint32_t first[2]; // four bytes of a row
    uint32_t second;   // the other two, of both rows
    uint32_t last;     // the last two, of both rows

    __device__ __forceinline__ void load(const char * const (&rows)[2], const int t) {
        second = last = 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) { // blocks are 2-byte aligned
            const uint16_t * halves = (const uint16_t *) rows[r];
            scales[r] = make_half2(((const half *) rows[r])[0], ((const half *) rows[r])[1]);
            first[r] = halves[2 + 3 * t] | (uint32_t) halves[3 + 3 * t] << 16;
            second |= (uint32_t) halves[4 + 3 * t] << 16 * r;
            last |= (uint32_t) halves[14] << 16 * r;
        }
    }

    __device__ __forceinline__ void unpack(uint32_t (&a)[4][4], const int t) const {
        int digits[5];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            pt2_digits_tq1_1(first[r], digits);
#pragma unroll
            for (int k = 0; k < 5; ++k) {
                a[k / 2][k % 2 * 2 + r] = digits[k];
            }
        }
        pt2_digits_tq1_1(second, digits);
        // digit t of the last bytes: what is left of them after t digits, times 3
        const uint32_t power = t == 0 ? 1 : t == 1 ? 3 : t == 2 ? 9 : 27;
        const uint32_t even = ((last & 0x00FF00FF) * power & 0x00FF00FF) * 3;
        const uint32_t odd = ((last >> 8 & 0x00FF00FF) * power & 0x00FF00FF) * 3;
        const uint32_t lasts = __byte_perm(even, odd, 0x7351);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = r == 0 ? 0x5410 : 0x7632;
            a[2][2 + r] = __byte_perm(digits[0], digits[1], row);
            a[3][r] = __byte_perm(digits[2], digits[3], row);
            a[3][2 + r] = __byte_perm(digits[4], lasts, row);
        }
    }
};

// Instructions ------------------------------------------------------------------------------------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

static __device__ __forceinline__ void copy_word(const uint32_t to, const void * from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

static __device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

static __device__ __forceinline__ float4 load_from_cluster(const uint32_t address, const int rank) {
    uint32_t there;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(there));
    return v;
}

// Of rows of 128 bytes in the 128-byte swizzle, eight of which are 1024 bytes.
static __device__ __forceinline__ uint64_t matrix_descriptor(const void * p) {
    return (uint64_t) (shared_address(p) >> 4) | (uint64_t) 1 << 16 | (uint64_t) (1024 >> 4) << 32 | (uint64_t) 1 << 62;
}

// Keeps the compiler from moving what makes or uses these registers across this place: around the tensor cores'
// instructions it would then wait for each of them.
template <int n> static __device__ __forceinline__ void pin(int (&r)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
        asm volatile("" : "+r"(r[i])::"memory");
    }
}

template <int n> static __device__ __forceinline__ void pin(float (&r)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
        asm volatile("" : "+f"(r[i])::"memory");
    }
}

static __device__ __forceinline__ void pin(uint32_t (&r)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        asm volatile("" : "+r"(r[i / 4][i % 4])::"memory");
    }
}

static __device__ __forceinline__ void tensor_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void tensor_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int pending> static __device__ __forceinline__ void tensor_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// 64 rows of 32 digits times as many columns of activations as c has room for; add: onto what is there.
static __device__ __forceinline__ void multiply(int (&c)[32], const uint32_t (&a)[4], const uint64_t b, const int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
        "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, "
        "%35}, %36, add;\n}\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]), "+r"(c[4]), "+r"(c[5]), "+r"(c[6]), "+r"(c[7]), "+r"(c[8]),
          "+r"(c[9]), "+r"(c[10]), "+r"(c[11]), "+r"(c[12]), "+r"(c[13]), "+r"(c[14]), "+r"(c[15]), "+r"(c[16]),
          "+r"(c[17]), "+r"(c[18]), "+r"(c[19]), "+r"(c[20]), "+r"(c[21]), "+r"(c[22]), "+r"(c[23]), "+r"(c[24]),
          "+r"(c[25]), "+r"(c[26]), "+r"(c[27]), "+r"(c[28]), "+r"(c[29]), "+r"(c[30]), "+r"(c[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

static __device__ __forceinline__ void multiply(int (&c)[16], const uint32_t (&a)[4], const uint64_t b, const int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
        "%14, %15}, {%16, %17, %18, %19}, %20, add;\n}\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]), "+r"(c[4]), "+r"(c[5]), "+r"(c[6]), "+r"(c[7]), "+r"(c[8]),
          "+r"(c[9]), "+r"(c[10]), "+r"(c[11]), "+r"(c[12]), "+r"(c[13]), "+r"(c[14]), "+r"(c[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// 16 rows times 8 columns, 8 products each. Has the results where the one above has those of 8 columns.
static __device__ __forceinline__ void multiply_add_tf32(float * c, const float (&a)[4], const float b0,
                                                         const float b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_int(a[0])), "r"(__float_as_int(a[1])), "r"(__float_as_int(a[2])), "r"(__float_as_int(a[3])),
          "r"(__float_as_int(b0)), "r"(__float_as_int(b1)));
}

#endif

// The matmul --------------------------------------------------------------------------------------------------------

template <ggml_type type, int N>
__launch_bounds__(PT2_HOPPER_THREADS, N == 64 ? 2 : 1) static __global__ void mul_mat_hopper(const hopper_args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int HALF = N / 2;
    constexpr int ACCS = HALF / 2;  // registers of a half's results
    constexpr int TILES = ACCS / 4; // of 8 columns, in a half
    extern __shared__ __align__(1024) char shared_bytes[];
    hopper_shared<N> & shared = *(hopper_shared<N> *) shared_bytes;
    using weights = hopper_weights<type>;

    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
    const int t = lane % 4;
    const pt2_product & product = args.group.of(blockIdx.y);
    const int row0 = (blockIdx.y - product.first_block) * PT2_HOPPER_ROWS;
    const int col0 = blockIdx.x * N;
    const int rank = blockIdx.z % args.cluster;
    const int channel = blockIdx.z / args.cluster;
    const uint2 i32 = fast_div_modulo(channel, args.ne12);
    const int first_pair = args.pairs * rank / args.cluster;
    const int count = args.pairs * (rank + 1) / args.cluster - first_pair;

    if (threadIdx.x == 0) {
        for (int i = 0; i < PT2_HOPPER_STAGES; ++i) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], PT2_HOPPER_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    const hopper_tile<N> * y =
        (const hopper_tile<N> *) args.y + ((int64_t) channel * gridDim.x + blockIdx.x) * args.pairs + first_pair;
    const auto load_tile = [&](const int p) {
        const int stage = p % PT2_HOPPER_STAGES;
        copy_bulk(&shared.tiles[stage], y + p, sizeof(hopper_tile<N>), &shared.full[stage]);
    };
    if (threadIdx.x == 0) {
        for (int p = 0; p < min(PT2_HOPPER_STAGES, count); ++p) {
            load_tile(p);
        }
    }

    // This warp's 16 rows of a pair of blocks, word by word: rows are no more aligned than that.
    constexpr int words = 2 * ggml_cuda_type_traits<type>::bs / sizeof(int);
    constexpr int copies = (16 * words + WARP_SIZE - 1) / WARP_SIZE;
    const char * x = product.x + fastdiv(i32.y, args.r2) * args.nb02 + fastdiv(i32.x, args.r3) * args.nb03 +
                     row0 * args.nb01 + first_pair * words * sizeof(int);
    uint32_t x_offset[copies];
#pragma unroll
    for (int i = 0; i < copies; ++i) {
        const int word = WARP_SIZE * i + lane;
        const int row = min(16 * warp + word / words, product.nrows - 1 - row0);
        x_offset[i] = row * (uint32_t) args.nb01 + word % words * sizeof(int);
    }
    const auto load_rows = [&](const int p) {
        if (p < count) {
            const uint32_t to = shared_address(shared.rows[p % PT2_HOPPER_ROW_STAGES][warp]) + sizeof(int) * lane;
#pragma unroll
            for (int i = 0; i < copies; ++i) {
                if (16 * words % WARP_SIZE == 0 || WARP_SIZE * i + lane < 16 * words) {
                    copy_word(to + WARP_SIZE * sizeof(int) * i, x + x_offset[i]);
                }
            }
            x += words * sizeof(int);
        }
        asm volatile("cp.async.commit_group;");
    };

    weights next; // the block after the one that is multiplied
    uint32_t digits0[4][4], digits1[4][4];
    const auto read_block = [&](const int p, const int b) {
        const char * row = shared.rows[p % PT2_HOPPER_ROW_STAGES][warp] + lane / 4 * words * sizeof(int) +
                           b * ggml_cuda_type_traits<type>::bs;
        next.load({ row, row + 8 * words * sizeof(int) }, t);
    };
    const auto next_pair = [&](const int p) {
        asm volatile("cp.async.wait_group %0;" ::"n"(PT2_HOPPER_ROW_STAGES - 2) : "memory");
        __syncwarp();
        load_rows(p + PT2_HOPPER_ROW_STAGES - 1);
        read_block(p, 0);
        next.unpack(digits0, t);
    };

    int acc0[ACCS], acc1[ACCS]; // integer sums of both halves of the columns
    float out[2][ACCS] = { { 0.0f } };
    const auto load_scales = [&](float2(&d)[TILES], const float * from) {
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            d[n] = *(const float2 *) (from + 8 * n + 2 * t);
        }
    };
    const auto finish = [&](int(&acc)[ACCS], const float2(&d)[TILES], const float2 alpha, float(&out)[ACCS]) {
        pin(acc);
#pragma unroll
        for (int i = 0; i < ACCS; ++i) {
            const float product = (float) acc[i] * (i % 2 ? d[i / 4].y : d[i / 4].x);
            out[i] += (i % 4 < 2 ? alpha.x : alpha.y) * product;
        }
        pin(out);
    };
    float offsets[4]; // of this thread's two rows in both blocks: mu or alpha
    // Block b of a pair; prepare makes the digits of the next one.
    const auto multiply_block = [&](const hopper_tile<N> & tile, const int b, uint32_t(&digits)[4][4],
                                    const auto & prepare) {
        const float2 dm0 = __half22float2(next.scales[0]);
        const float2 dm1 = __half22float2(next.scales[1]);
        const float2 alpha = make_float2(dm0.x, dm1.x);
        offsets[2 * b] = t < 2 ? dm0.y : dm0.x;
        offsets[2 * b + 1] = t < 2 ? dm1.y : dm1.x;

        pin(acc0);
        pin(acc1);
        pin(digits);
        tensor_fence();
        const uint64_t half0 = matrix_descriptor(tile.qs[b][0]);
        const uint64_t half1 = matrix_descriptor(tile.qs[b][HALF]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            multiply(acc0, digits[k], half0 + 2 * k, k > 0);
        }
        tensor_commit();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            multiply(acc1, digits[k], half1 + 2 * k, k > 0);
        }
        tensor_commit();

        float2 d0[TILES], d1[TILES];
        load_scales(d0, tile.d[b]);
        tensor_wait<1>();
        load_scales(d1, tile.d[b] + HALF);
        finish(acc0, d0, alpha, out[0]);
        tensor_wait<0>();
        prepare();
        finish(acc1, d1, alpha, out[1]);
    };

    for (int p = 0; p < PT2_HOPPER_ROW_STAGES - 1; ++p) {
        load_rows(p);
    }
    next_pair(0);
#pragma unroll 1
    for (int p = 0; p < count; ++p) {
        const int stage = p % PT2_HOPPER_STAGES;
        const hopper_tile<N> & tile = shared.tiles[stage];
        barrier_wait(&shared.full[stage], p / PT2_HOPPER_STAGES % 2);
        multiply_block(tile, 0, digits0, [&] {
            read_block(p, 1);
            next.unpack(digits1, t);
        });
        multiply_block(tile, 1, digits1, [&] { next_pair(p + 1); });
#pragma unroll
        for (int n = 0; n < 2 * TILES; ++n) {
            const float * s = tile.s[8 * n + lane / 4] + t;
            multiply_add_tf32(&out[n / TILES][n % TILES * 4], offsets, s[0], s[4]);
        }
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(&shared.empty[stage]);
        }
        // the stage of the pair before: the other warps have left it, or soon will
        const int refill = p - 1 + PT2_HOPPER_STAGES;
        if (threadIdx.x == 0 && p > 0 && refill < count) {
            barrier_wait(&shared.empty[(p - 1) % PT2_HOPPER_STAGES], (p - 1) / PT2_HOPPER_STAGES % 2);
            load_tile(refill);
        }
    }

    float * dst = product.dst + i32.x * args.s3 + i32.y * args.s2;
    const auto each_result = [&](const auto & function) { // function(row, column in the tile, value)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < ACCS; ++i) {
                function(16 * warp + lane / 4 + i % 4 / 2 * 8, half * HALF + i / 4 * 8 + 2 * t + i % 2, out[half][i]);
            }
        }
    };
    if (args.cluster == 1) {
        each_result([&](const int row, const int col, const float value) {
            if (row0 + row < product.nrows && col0 + col < args.ncols) {
                dst[(col0 + col) * product.s1 + row0 + row] = value;
            }
        });
        return;
    }

    constexpr int stride = PT2_HOPPER_ROWS + 4;
    float * sums = (float *) shared_bytes;
    __syncthreads(); // everybody is done with the stages
    each_result([&](const int row, const int col, const float value) { sums[col * stride + row] = value; });
    cluster_sync();
    for (int col = rank * PT2_HOPPER_WARPS + warp; col < min(N, args.ncols - col0);
         col += args.cluster * PT2_HOPPER_WARPS) {
        const uint32_t from = shared_address(sums + col * stride + 4 * lane);
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int other = 0; other < args.cluster; ++other) {
            const float4 v = load_from_cluster(from, other);
            total = make_float4(total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w);
        }
        const float values[4] = { total.x, total.y, total.z, total.w };
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (row0 + 4 * lane + i < product.nrows) {
                dst[(col0 + col) * product.s1 + row0 + 4 * lane + i] = values[i];
            }
        }
    }
    cluster_sync(); // the others may still read
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif
}

// Launching ---------------------------------------------------------------------------------------------------------

static pt2_cluster_launch in_clusters(const dim3 tiles, const int cluster, const size_t shared, cudaStream_t stream) {
    const dim3 grid(tiles.x, tiles.y, tiles.z * cluster);
    return pt2_cluster_launch({ grid, dim3(PT2_HOPPER_THREADS), shared, stream }, dim3(1, 1, cluster));
}

// How many thread blocks should share a tile. A pair of blocks counts as one, bringing the parts together as two.
template <ggml_type type, int N> static int choose_cluster(const dim3 tiles, const int pairs, const size_t shared) {
    static int at_once[GGML_CUDA_MAX_DEVICES][PT2_HOPPER_MAX_CLUSTER + 1] = {}; // clusters of so many; 0: not asked yet
    int(&clusters)[PT2_HOPPER_MAX_CLUSTER + 1] = at_once[ggml_cuda_get_device()];
    int best = 1;
    int64_t best_cost = INT64_MAX;
    for (int size = 1; size <= std::min(PT2_HOPPER_MAX_CLUSTER, pairs); ++size) {
        if (clusters[size] == 0) {
            const pt2_cluster_launch launch = in_clusters(dim3(1, 1, 1), size, shared, nullptr);
            CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters[size], mul_mat_hopper<type, N>, &launch.config));
        }
        const int64_t ntiles = (int64_t) tiles.x * tiles.y * tiles.z;
        const int64_t waves = (ntiles + clusters[size] - 1) / clusters[size];
        const int64_t cost = waves * ((pairs + size - 1) / size) + (size > 1 ? 2 : 0);
        if (cost < best_cost) {
            best_cost = cost;
            best = size;
        }
    }
    return best;
}

template <ggml_type type, int N>
static void mul_mat_in_tiles(ggml_backend_cuda_context & ctx, ggml_tensor * const * dsts, const int n) {
    const ggml_tensor * dst = dsts[0];
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * perm = ggml_mul_mat_get_perm(dst);
    cudaStream_t stream = ctx.stream();
    const int nblocks = src0->ne[0] / QK_PT2;
    const int64_t channels = src1->ne[2] * src1->ne[3];

    hopper_args args = {};
    for (int i = 0; i < n; ++i) {
        args.group.add(dsts[i]->src[0], dsts[i]);
    }
    const dim3 tiles((src1->ne[1] + N - 1) / N, args.group.place(PT2_HOPPER_ROWS), channels);

    ggml_cuda_pool_alloc<char> y(ctx.pool(), channels * tiles.x * (nblocks / 2) * sizeof(hopper_tile<N>));
    const uint3 ne12 = init_fastdiv_values(src1->ne[2]);
    quantize_hopper<type, N><<<dim3(src1->ne[1], channels, 1), dim3(WARP_SIZE, 16, 1), 0, stream>>>(
        (const float *) src1->data, perm ? (const int32_t *) perm->data : nullptr, (hopper_tile<N> *) y.get(), nblocks,
        ne12, src1->nb[1] / sizeof(float), src1->nb[2] / sizeof(float), src1->nb[3] / sizeof(float));
    CUDA_CHECK(cudaGetLastError());

    args.y = y.get();
    args.pairs = nblocks / 2;
    args.ncols = src1->ne[1];
    args.nb01 = src0->nb[1];
    args.nb02 = src0->nb[2];
    args.nb03 = src0->nb[3];
    args.ne12 = ne12;
    args.r2 = init_fastdiv_values(src1->ne[2] / src0->ne[2]);
    args.r3 = init_fastdiv_values(src1->ne[3] / src0->ne[3]);
    args.s2 = dst->nb[2] / sizeof(float);
    args.s3 = dst->nb[3] / sizeof(float);

    constexpr size_t shared = std::max(sizeof(hopper_shared<N>), N * (PT2_HOPPER_ROWS + 4) * sizeof(float));
    const auto kernel = mul_mat_hopper<type, N>;
    CUDA_SET_SHARED_MEMORY_LIMIT(kernel, shared);
    args.cluster = choose_cluster<type, N>(tiles, args.pairs, shared);
    const pt2_cluster_launch launch = in_clusters(tiles, args.cluster, shared, stream);
    CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, args));
}

template <ggml_type type>
static void mul_mat_of_type(ggml_backend_cuda_context & ctx, ggml_tensor * const * dsts, const int n) {
    if (dsts[0]->ne[1] <= 64) {
        mul_mat_in_tiles<type, 64>(ctx, dsts, n);
    } else {
        mul_mat_in_tiles<type, 128>(ctx, dsts, n);
    }
}

static bool fits(const ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    return dst->op == GGML_OP_MUL_MAT && src0->ne[0] % (2 * QK_PT2) == 0 && src0->nb[1] % sizeof(int) == 0 &&
           PT2_HOPPER_ROWS * src0->nb[1] < INT32_MAX && (uintptr_t) src0->data % sizeof(int) == 0 &&
           src1->ne[2] * src1->ne[3] * PT2_HOPPER_MAX_CLUSTER < 65536 &&
           src0->ne[1] <= 65535 / PT2_GROUP * PT2_HOPPER_ROWS;
}

bool pt2_mul_mat_hopper(ggml_backend_cuda_context & ctx, ggml_tensor * const * dsts, const int n) {
    if (ggml_cuda_info().devices[ggml_cuda_get_device()].cc != GGML_CUDA_CC_HOPPER ||
        !std::all_of(dsts, dsts + n, fits)) {
        return false;
    }
    if (dsts[0]->src[0]->type == GGML_TYPE_TQ2_1) {
        mul_mat_of_type<GGML_TYPE_TQ2_1>(ctx, dsts, n);
    } else {
        mul_mat_of_type<GGML_TYPE_TQ1_1>(ctx, dsts, n);
    }
    return true;
}
