// Matvec of one column on Hopper, compiled for sm_90a alone as pt2-hopper.cu is.
//
// Every multiprocessor has one thread block, with an equal share of the rows. A lane has a whole block of 128 columns,
// the same one of every row, so that its activations are loaded once and stay in registers; a row of more than 32
// blocks is split between warps. Each warp has a ring of stages that bulk copies fill with its pieces of rows, first
// while the kernel before is still running.
#include "pt2-barrier.cuh"
#include "pt2-hopper.cuh"

#define PT2_HOPPER_VEC_WARPS      12
#define PT2_HOPPER_VEC_STAGES     3
#define PT2_HOPPER_VEC_PIECES     2    // in a stage: of two rows, or of a row of weights and the same one of the gate
#define PT2_HOPPER_VEC_MIN_BLOCKS 7500 // for a multiprocessor, unless there are two matrices
#define PT2_HOPPER_VEC_MIN_LANES  24   // with fewer that have a block, pt2-mmvq.cu is as fast, and with TQ1_1 faster

static constexpr int COPY_UNIT = 16; // bulk copies begin and end at multiples

// What the blocks of all lanes take, wherever in memory they begin and end.
static constexpr __host__ __device__ int piece_size(const ggml_type type) {
    const int blocks = WARP_SIZE * (type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1));
    return (blocks + COPY_UNIT - 1) / COPY_UNIT * COPY_UNIT + 2 * COPY_UNIT;
}

template <ggml_type type> struct __align__(128) hopper_vec_shared {
    char rings[PT2_HOPPER_VEC_WARPS][PT2_HOPPER_VEC_STAGES][PT2_HOPPER_VEC_PIECES][piece_size(type)];
    uint64_t barriers[PT2_HOPPER_VEC_WARPS][PT2_HOPPER_VEC_STAGES];
    // behind it: float sums[rows][matrices][split]
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A lane's activations, all parts of one block, and that block of a row.
template <ggml_type type> struct lane_block {
    using lanes = lane_part<type>;
    int y[lanes::parts][lanes::ints];
    float d[lanes::planes];
    float s;

    // valid: or else zeros
    __device__ __forceinline__ void load(const mmv_args & args, const int block, const bool valid) {
        s = 0.0f;
#pragma unroll
        for (int part = 0; part < lanes::parts; ++part) {
#pragma unroll
            for (int i = 0; i < lanes::ints / 4; ++i) {
                const int4 v = *(const int4 *) (args.y + pt2_vec_offset(type, block, part, i));
                ((int4 *) y[part])[i] = valid ? v : make_int4(0, 0, 0, 0);
            }
            s += valid ? args.ys[block].s[lanes::sum_of(part)] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < lanes::planes; ++k) {
            d[k] = args.ys[block].d[k];
        }
    }

    __device__ __forceinline__ float dot(const char * block) const {
        lanes w;
        int dots[lanes::planes] = { 0 };
#pragma unroll
        for (int part = 0; part < lanes::parts; ++part) {
            int u[lanes::ints];
            w.load(block, part);
            w.digits(u, part);
#pragma unroll
            for (int i = 0; i < lanes::ints; ++i) {
                dots[lanes::plane(i)] = pt2_dot(u[i], y[part][i], dots[lanes::plane(i)]);
            }
        }
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < lanes::planes; ++k) {
            sum += lanes::plane_scale(d, k) * (float) dots[k];
        }
        const float2 scales = __half22float2(w.scales);
        return scales.x * sum + (scales.y - scales.x) * s;
    }
};

#endif // defined(__CUDA_ARCH_FEAT_SM90_ALL)

// split: warps for a row; width: blocks of a row for each of them.
template <ggml_type type, bool gated>
__launch_bounds__(PT2_HOPPER_VEC_WARPS * WARP_SIZE, 1) static __global__
    void mul_mat_vec_hopper(const mmv_args args, const int nrows, const int split, const int width) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int matrices = gated ? 2 : 1;
    constexpr int rows = PT2_HOPPER_VEC_PIECES / matrices; // in a stage
    constexpr int bs = ggml_cuda_type_traits<type>::bs;
    static_assert(PT2_HOPPER_VEC_PIECES == 2, "half a warp sums each");

    extern __shared__ char shared_memory[];
    hopper_vec_shared<type> & shared = *(hopper_vec_shared<type> *) shared_memory;
    float * const sums = (float *) (&shared + 1);
    const int lane = threadIdx.x;
    const int warp = threadIdx.y;

    const int first_row = (int64_t) nrows * blockIdx.x / gridDim.x;
    const int end_row = (int64_t) nrows * (blockIdx.x + 1) / gridDim.x;

    // this warp's columns, and what it has of the rows: one after the other of `groups`
    const int slice = warp % split;
    const int first_block = slice * width;
    const int nblocks = min(width, args.nblocks - first_block);
    const int groups = PT2_HOPPER_VEC_WARPS / split;
    const auto row_of = [&](const int stage, const int piece) {
        return first_row + (stage * groups + warp / split) * rows + piece / matrices;
    };
    const int count =
        warp / split < groups ? max(0, (end_row - row_of(0, 0) + groups * rows - 1) / (groups * rows)) : 0;

    // Rows are wherever they are in memory, of which whole units are copied.
    const auto ahead_of_piece = [&](const int row) {
        return ((uint32_t) row * (uint32_t) args.nb01 + first_block * bs) % COPY_UNIT;
    };
    const auto fill = [&](const int stage, const int slot) {
        if (lane < PT2_HOPPER_VEC_PIECES) {
            const int row = min(row_of(stage, lane), end_row - 1);
            const pt2_product & product = args.group.of(row);
            const char * x = gated && lane % matrices == 1 ? args.gate : product.x;
            const uint32_t ahead = ahead_of_piece(row);
            const uint32_t bytes = (ahead + nblocks * bs + COPY_UNIT - 1) / COPY_UNIT * COPY_UNIT;
            copy_bulk(shared.rings[warp][slot][lane],
                      x + (row - product.first_block) * args.nb01 + first_block * bs - ahead, bytes,
                      &shared.barriers[warp][slot]);
        }
    };

    if (lane < PT2_HOPPER_VEC_STAGES) {
        barrier_init(&shared.barriers[warp][lane], PT2_HOPPER_VEC_PIECES);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
    for (int stage = 0; stage < min(PT2_HOPPER_VEC_STAGES, count); ++stage) {
        fill(stage, stage);
    }
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();

    // Lanes without a block multiply another's with zeros.
    const bool valid = lane < nblocks;
    lane_block<type> activations;
    activations.load(args, valid ? first_block + lane : 0, valid);
    const int at = min(lane, nblocks - 1) * bs;

    const bool upper = lane >= WARP_SIZE / 2; // of the lanes, which sum up the second piece
    int slot = 0;
    int phase = 0;
    for (int stage = 0; stage < count; ++stage) {
        barrier_wait(&shared.barriers[warp][slot], phase);
        float v[PT2_HOPPER_VEC_PIECES];
#pragma unroll
        for (int i = 0; i < PT2_HOPPER_VEC_PIECES; ++i) {
            const int row = min(row_of(stage, i), end_row - 1);
            v[i] = activations.dot(shared.rings[warp][slot][i] + ahead_of_piece(row) + at);
        }
        __syncwarp();
        if (stage + PT2_HOPPER_VEC_STAGES < count) {
            fill(stage + PT2_HOPPER_VEC_STAGES, slot);
        }
        if (++slot == PT2_HOPPER_VEC_STAGES) {
            slot = 0;
            phase ^= 1;
        }
        const float others = __shfl_xor_sync(0xFFFFFFFF, upper ? v[0] : v[1], WARP_SIZE / 2);
        const float sum = warp_reduce_sum<WARP_SIZE / 2>((upper ? v[1] : v[0]) + others);
        const int row = row_of(stage, upper);
        if (lane % (WARP_SIZE / 2) == 0 && row < end_row) {
            sums[((row - first_row) * matrices + (upper ? matrices - 1 : 0)) * split + slice] = sum;
        }
    }
    __syncthreads();

    for (int row = first_row + warp * WARP_SIZE + lane; row < end_row; row += PT2_HOPPER_VEC_WARPS * WARP_SIZE) {
        float total[matrices] = { 0.0f };
#pragma unroll
        for (int m = 0; m < matrices; ++m) {
            for (int i = 0; i < split; ++i) {
                total[m] += sums[((row - first_row) * matrices + m) * split + i];
            }
        }
        const pt2_product & product = args.group.of(row);
        const int of_product = row - product.first_block;
        product.dst[of_product] = finish<gated>(args, product, total[0], total[matrices - 1], of_product);
    }
#else
    GGML_UNUSED_VARS(args, nrows, split, width);
    NO_DEVICE_CODE;
#endif // defined(__CUDA_ARCH_FEAT_SM90_ALL)
}

template <ggml_type type, bool gated> static bool launch(mmv_args args, cudaStream_t stream) {
    const ggml_cuda_device_info::cuda_device_info & device = ggml_cuda_info().devices[ggml_cuda_get_device()];
    const int split = (args.nblocks + WARP_SIZE - 1) / WARP_SIZE;
    const int width = (args.nblocks + split - 1) / split;
    const int nrows = args.group.place(1);
    const int most_rows = (nrows + device.nsm - 1) / device.nsm; // of a thread block
    const size_t needed = sizeof(hopper_vec_shared<type>) + (gated ? 2 : 1) * most_rows * split * sizeof(float);
    // With less than half of what a multiprocessor has, it could get two thread blocks, and another none.
    const size_t shared = std::max(needed, device.smpbo / 2 + 1024);
    // What can be on its way all at once is faster by pt2-mmvq.cu.
    const bool small = !gated && int64_t(nrows) * args.nblocks < PT2_HOPPER_VEC_MIN_BLOCKS * int64_t(device.nsm);
    if (small || width < PT2_HOPPER_VEC_MIN_LANES || split > PT2_HOPPER_VEC_WARPS || shared > device.smpbo) {
        return false;
    }
    const auto kernel = mul_mat_vec_hopper<type, gated>;
    CUDA_SET_SHARED_MEMORY_LIMIT(kernel, device.smpbo);
    const ggml_cuda_kernel_launch_params params(dim3(device.nsm, 1, 1), dim3(WARP_SIZE, PT2_HOPPER_VEC_WARPS, 1),
                                                shared, stream);
    ggml_cuda_kernel_launch(kernel, params, args, nrows, split, width);
    return true;
}

bool pt2_mul_mat_vec_hopper(const ggml_type type, const mmv_args & args, cudaStream_t stream) {
    const bool hopper = ggml_cuda_info().devices[ggml_cuda_get_device()].cc == GGML_CUDA_CC_HOPPER;
    const bool shares_y = args.y == args.y_gate;
    // Units that are copied must not reach beyond the weights.
    const auto in_units = [&](const char * x, const int64_t nrows) {
        return (uintptr_t) x % COPY_UNIT == 0 && nrows * args.nb01 % COPY_UNIT == 0;
    };
    const auto fits = [&](const pt2_product & product) { return in_units(product.x, product.nrows); };
    if (!hopper || args.ids || !shares_y || args.nb01 != int64_t(args.nblocks * ggml_type_size(type)) ||
        !std::all_of(args.group.products, args.group.products + args.group.n, fits) || !in_units(args.gate, 0)) {
        return false;
    }
    if (type == GGML_TYPE_TQ2_1) {
        return args.gate ? launch<GGML_TYPE_TQ2_1, true>(args, stream) : launch<GGML_TYPE_TQ2_1, false>(args, stream);
    }
    return args.gate ? launch<GGML_TYPE_TQ1_1, true>(args, stream) : launch<GGML_TYPE_TQ1_1, false>(args, stream);
}
