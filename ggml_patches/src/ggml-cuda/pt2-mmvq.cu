// Matvec: 1 to 8 columns of activations, or experts for up to 8 tokens.
//
// One to three warps compute a few rows, each a part of their blocks, and meet once, at the end. A block of 128 weights
// is spread over 4 lanes (TQ2_1) or 2 (TQ1_1), and the activations lie in memory in the order in which the lanes want
// them, so that all their loads are 16 bytes and coalesced. What a warp needs of its rows is loaded for several steps
// at once, the first time before the activations are even there.
#include "mmq.cuh"
#include "mmvq.cuh"
#include "pt2-hopper.cuh"
#include "pt2-mmvq.cuh"

#include <algorithm>
#include <tuple>

// A lane's activations of one block.
template <ggml_type type> struct lane_activations {
    int q[lane_part<type>::ints];
    float d[lane_part<type>::planes];
    float s;

    // y, ys: where this lane's part of the first of a group of blocks is
    __device__ __forceinline__ void load(const int8_t * y, const pt2_vec_scales * ys, const int part) {
        using lanes = lane_part<type>;
#pragma unroll
        for (int i = 0; i < lanes::ints / 4; ++i) {
            ((int4 *) q)[i] = *(const int4 *) (y + i * (16 * PT2_VEC_LANES));
        }
        const float4 d0 = *(const float4 *) ys->d;
        d[0] = d0.x;
        d[1] = d0.y;
        d[2] = d0.z;
        d[3] = d0.w;
        if constexpr (lanes::planes == 6) {
            const float2 d1 = *(const float2 *) (ys->d + 4);
            d[4] = d1.x;
            d[5] = d1.y;
        }
        s = ys->s[lanes::sum_of(part)];
    }
};

template <ggml_type type>
static __device__ __forceinline__ float dot(const int (&u)[lane_part<type>::ints], const float2 scales,
                                            const lane_activations<type> & y) {
    using lanes = lane_part<type>;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < lanes::planes; ++k) {
        int dot = 0;
#pragma unroll
        for (int i = 0; i < lanes::ints; ++i) {
            if (lanes::plane(i) == k) {
                dot = pt2_dot(u[i], y.q[i], dot);
            }
        }
        sum += lanes::plane_scale(y.d, k) * (float) dot;
    }
    return scales.x * sum + (scales.y - scales.x) * y.s;
}

// Sums of values over a warp: lanes i * PT2_VEC_LANES / n and behind it return that of value i. With each exchange a
// lane keeps half of the values that it had.
template <int n, int offset = PT2_VEC_LANES / 2>
static __device__ __forceinline__ float sums_of_warp(const float (&values)[n]) {
    if constexpr (n == 1) {
        return warp_reduce_sum<2 * offset>(values[0]);
    } else {
        const bool upper = threadIdx.x & offset;
        float half[n / 2];
#pragma unroll
        for (int i = 0; i < n / 2; ++i) {
            const float first = values[i];
            const float second = values[i + n / 2];
            const float others = __shfl_xor_sync(0xFFFFFFFF, upper ? first : second, offset, PT2_VEC_LANES);
            half[i] = (upper ? second : first) + others;
        }
        return sums_of_warp<n / 2, offset / 2>(half);
    }
}

static constexpr __host__ __device__ int power_of_two(const int at_least) {
    int n = 1;
    while (n < at_least) {
        n *= 2;
    }
    return n;
}

enum gate_mode { NO_GATE, GATE_SHARES_Y, GATE_HAS_Y };

// How the work is divided. rows: of a warp; split: warps for the same rows, each with a part of their blocks; resident:
// thread blocks that a multiprocessor must have registers for.
template <ggml_type type_, int ncols_, gate_mode gated_, int rows_, int split_, int resident_> struct mmv_shape {
    using lanes = lane_part<type_>;
    static constexpr ggml_type type = type_;
    static constexpr int ncols = ncols_;
    static constexpr gate_mode gated = gated_;
    static constexpr int rows = rows_;
    static constexpr int split = split_;
    static constexpr int resident = resident_;

    static constexpr int matrices = gated == NO_GATE ? 1 : 2;
    static constexpr int warps = split == 1 ? 4 : 2 * split;
    static constexpr int rows_of_block = warps / split * rows;

    // A warp's lanes have a group of blocks of a row. It loads so many groups of each row before it computes that they
    // take 24 registers (TQ1_1: 20), or less where activations take the others.
    static constexpr int group = PT2_VEC_LANES / lanes::parts;
    static constexpr int of_rows =
        rows * matrices <= 2 ? lanes::steps : (2 * lanes::steps + rows * matrices - 1) / (rows * matrices);
    static constexpr int steps = ncols == 1 ? of_rows : ncols <= 4 ? (lanes::steps + 1) / 2 : 1;
    static constexpr int pass = split * steps * group; // blocks of a row at a time
};

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
#define PT2_MMV_BOUNDS(shape) __launch_bounds__(shape::warps * PT2_VEC_LANES) // HIP means wavefronts by the other
#else
#define PT2_MMV_BOUNDS(shape) __launch_bounds__(shape::warps * PT2_VEC_LANES, shape::resident)
#endif

template <typename shape> PT2_MMV_BOUNDS(shape) static __global__ void mul_mat_vec(const mmv_args args) {
    constexpr ggml_type type = shape::type;
    constexpr gate_mode gated = shape::gated;
    constexpr int ncols = shape::ncols;
    constexpr int rows = shape::rows;
    constexpr int split = shape::split;
    constexpr int matrices = shape::matrices;
    constexpr int steps = shape::steps;
    constexpr int step = shape::group;
    constexpr int orders = gated == GATE_HAS_Y ? 2 : 1;
    constexpr int bs = ggml_cuda_type_traits<type>::bs;
    using lanes = lane_part<type>;

    ggml_cuda_pdl_lc();
    const pt2_product & product = args.group.of(blockIdx.x);
    const int row0 = (blockIdx.x - product.first_block) * shape::rows_of_block + threadIdx.y / split * rows;
    if (split == 1 && row0 >= product.nrows) {
        return;
    }
    const int first = threadIdx.y % split * (steps * step); // of this warp's blocks
    const int part = threadIdx.x % lanes::parts;
    const int ib0 = threadIdx.x / lanes::parts;

    int64_t x_offset;
    int64_t y_row;
    int64_t expert = 0;
    if (args.ids) {
        ggml_cuda_pdl_sync(); // the choice of experts comes from the kernel before
        expert = args.ids[blockIdx.y + blockIdx.z * args.ids_stride];
        x_offset = expert * args.nb02;
        y_row = blockIdx.z * args.stride_y + fastmodulo(blockIdx.y, args.ne12);
    } else {
        x_offset = fastdiv(blockIdx.y, args.r2) * args.nb02 + fastdiv(blockIdx.z, args.r3) * args.nb03;
        y_row = (blockIdx.z * args.ne12.z + blockIdx.y) * args.stride_y;
    }

    const int last_row = product.nrows - 1; // computed more than once, where there are not enough rows
    const int first_row = min(row0, last_row);
    const char * x[matrices];
    x[0] = product.x + x_offset + first_row * args.nb01;
    if constexpr (gated != NO_GATE) {
        x[1] = args.gate + x_offset + first_row * args.nb01;
    }
    uint32_t to_row[rows];
#pragma unroll
    for (int i = 0; i < rows; ++i) {
        to_row[i] = min(i, last_row - first_row) * (uint32_t) args.nb01;
    }

    // This lane's part of the group of blocks that begins at ib. Behind the row's end there are only
    // activations, and they are zeros: any weights will do, the row's last ones for example.
    lanes w[steps][matrices][rows];
    const auto load_weights = [&](const int ib) {
#pragma unroll
        for (int t = 0; t < steps; ++t) {
            const uint32_t at = min(ib + t * step + ib0, args.nblocks - 1) * bs;
#pragma unroll
            for (int m = 0; m < matrices; ++m) {
#pragma unroll
                for (int i = 0; i < rows; ++i) {
                    w[t][m][i].load(x[m] + (to_row[i] + at), part);
                }
            }
        }
    };

    load_weights(first);
    if (!args.ids) {
        ggml_cuda_pdl_sync();
    }

    const int8_t * y[orders];
    const pt2_vec_scales * ys[orders];
    y[0] = args.y + QK_PT2 * (y_row * args.nblocks_y + first) + 16 * threadIdx.x;
    ys[0] = args.ys + y_row * args.nblocks_y + first + ib0;
    if constexpr (gated == GATE_HAS_Y) {
        y[1] = args.y_gate + QK_PT2 * (y_row * args.nblocks_y + first) + 16 * threadIdx.x;
        ys[1] = args.ys_gate + y_row * args.nblocks_y + first + ib0;
    }

    // of a gate behind the others
    constexpr int nsums = power_of_two(matrices * ncols * rows);
    float sums[nsums] = { 0.0f };
    for (int ib = first; ib < args.nblocks;) { // the same in all lanes
#pragma unroll
        for (int t = 0; t < steps; ++t) {
            // Behind the row's end the last group counts as zeros, so that no branch keeps its loads from starting
            // early; many columns would be too much to compute in vain.
            const bool inside = t == 0 || ib + t * step < args.nblocks;
            if (ncols > 1 && !inside) {
                break;
            }
            const int to_group = inside ? t * step : args.nblocks_y - step - ib;
            int u[matrices][rows][lanes::ints];
            float2 scales[matrices][rows];
#pragma unroll
            for (int m = 0; m < matrices; ++m) {
#pragma unroll
                for (int i = 0; i < rows; ++i) {
                    w[t][m][i].digits(u[m][i], part);
                    scales[m][i] = inside ? __half22float2(w[t][m][i].scales) : make_float2(0.0f, 0.0f);
                }
            }
#pragma unroll
            for (int j = 0; j < ncols; ++j) {
                lane_activations<type> activations[orders];
#pragma unroll
                for (int o = 0; o < orders; ++o) {
                    const int to = j * args.nblocks_y + to_group;
                    activations[o].load(y[o] + to * QK_PT2, ys[o] + to, part);
                }
#pragma unroll
                for (int m = 0; m < matrices; ++m) {
#pragma unroll
                    for (int i = 0; i < rows; ++i) {
                        sums[(m * ncols + j) * rows + i] += dot<type>(u[m][i], scales[m][i], activations[m % orders]);
                    }
                }
            }
        }
        ib += shape::pass;
#pragma unroll
        for (int o = 0; o < orders; ++o) {
            y[o] += shape::pass * QK_PT2;
            ys[o] += shape::pass;
        }
        if (ib < args.nblocks) {
            load_weights(ib);
        }
    }

    constexpr int lanes_of_sum = PT2_VEC_LANES / nsums;
    const int i = threadIdx.x / lanes_of_sum;
    float sum = sums_of_warp(sums);
    if constexpr (split > 1) {
        __shared__ float of_warps[shape::warps][nsums];
        if (threadIdx.x % lanes_of_sum == 0) {
            of_warps[threadIdx.y][i] = sum;
        }
        __syncthreads();
        if (threadIdx.y % split != 0) {
            return;
        }
#pragma unroll
        for (int other = 1; other < split; ++other) {
            sum += of_warps[threadIdx.y + other][i];
        }
    }
    const float gate = gated == NO_GATE ? 0.0f : __shfl_xor_sync(0xFFFFFFFF, sum, PT2_VEC_LANES / 2, PT2_VEC_LANES);
    const int row = row0 + i % rows;
    if (threadIdx.x % lanes_of_sum != 0 || i >= ncols * rows || row >= product.nrows) {
        return;
    }
    const int64_t offset =
        args.ids ? blockIdx.y * product.s1 + blockIdx.z * args.s2 : blockIdx.y * args.s2 + blockIdx.z * args.s3;
    if constexpr (ncols == 1) { // upstream fuses nothing else
        sum =
            finish<(gated != NO_GATE)>(args, product, sum, gate, args.ids ? expert * args.s_bias + row : offset + row);
    }
    product.dst[offset + i / rows * product.s1 + row] = sum;
}

template <typename shape> static void launch(mmv_args args, const dim3 grid_yz, cudaStream_t stream) {
    const dim3 grid(args.group.place(shape::rows_of_block), grid_yz.y, grid_yz.z);
    const ggml_cuda_kernel_launch_params params(grid, dim3(PT2_VEC_LANES, shape::warps, 1), (size_t) 0, stream);
    ggml_cuda_kernel_launch(mul_mat_vec<shape>, params, args);
}

// The first of those that take the fewest waves of thread blocks and, among these, passes over a row: all weights of a
// wave are on their way before the activations are there. What is done in one pass leaves room for the next kernel.
template <typename... shapes> static void launch_best(mmv_args args, const dim3 grid_yz, cudaStream_t stream) {
    struct candidate {
        int64_t waves, passes;
        bool crowded;
        void (*launch)(mmv_args, dim3, cudaStream_t);
    };
    const int64_t nsm = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm;
    const auto of_shape = [&](const int rows_of_block, const int resident, const int pass, const auto launch) {
        const int64_t blocks = int64_t(args.group.place(rows_of_block)) * grid_yz.y * grid_yz.z;
        const int64_t at_once = resident * nsm;
        const int64_t passes = (args.nblocks + pass - 1) / pass;
        return candidate{ (blocks + at_once - 1) / at_once, passes, passes == 1 && 4 * blocks > 3 * at_once, launch };
    };
    const candidate all[] = { of_shape(shapes::rows_of_block, shapes::resident, shapes::pass, launch<shapes>)... };
    const auto better = [](const candidate & a, const candidate & b) {
        return std::tie(a.waves, a.passes, a.crowded) < std::tie(b.waves, b.passes, b.crowded);
    };
    std::min_element(std::begin(all), std::end(all), better)->launch(args, grid_yz, stream);
}

// The shapes are what was fastest on an H200 (benchmarks/results/cuda-shapes-h200.log).
template <ggml_type type, gate_mode gated>
static void launch_gated(const mmv_args & args, const dim3 grid_yz, cudaStream_t stream) {
    if constexpr (type == GGML_TYPE_TQ2_1) {
        launch<mmv_shape<type, 1, gated, 4, 2, gated == GATE_HAS_Y ? 6 : 7>>(args, grid_yz, stream);
    } else {
        launch<mmv_shape<type, 1, gated, 2, 1, gated == GATE_HAS_Y ? 5 : 6>>(args, grid_yz, stream);
    }
}

template <ggml_type type, int ncols>
static void launch_ungated(const mmv_args & args, const dim3 grid_yz, cudaStream_t stream) {
    if constexpr (ncols == 1 && type == GGML_TYPE_TQ2_1) {
        launch_best<mmv_shape<type, 1, NO_GATE, 8, 3, 4>, mmv_shape<type, 1, NO_GATE, 4, 2, 5>,
                    mmv_shape<type, 1, NO_GATE, 4, 3, 3>, mmv_shape<type, 1, NO_GATE, 4, 2, 6>,
                    mmv_shape<type, 1, NO_GATE, 8, 2, 6>>(args, grid_yz, stream);
    } else if constexpr (ncols == 1) {
        launch_best<mmv_shape<type, 1, NO_GATE, 4, 2, 4>, mmv_shape<type, 1, NO_GATE, 4, 2, 5>,
                    mmv_shape<type, 1, NO_GATE, 4, 3, 3>, mmv_shape<type, 1, NO_GATE, 4, 1, 4>>(args, grid_yz, stream);
    } else if constexpr (ncols <= 4 || type == GGML_TYPE_TQ2_1) {
        launch_best<mmv_shape<type, ncols, NO_GATE, 2, 1, 4>, mmv_shape<type, ncols, NO_GATE, 2, 2, 4>,
                    mmv_shape<type, ncols, NO_GATE, 2, 1, 5>>(args, grid_yz, stream);
    } else { // that need their registers
        launch_best<mmv_shape<type, ncols, NO_GATE, 2, 1, 4>, mmv_shape<type, ncols, NO_GATE, 2, 2, 4>>(args, grid_yz,
                                                                                                        stream);
    }
}

template <ggml_type type>
static void launch_for(const mmv_args & args, const int ncols, const dim3 grid_yz, cudaStream_t stream) {
    if (ncols == 1 && grid_yz.y * grid_yz.z == 1 && pt2_mul_mat_vec_hopper(type, args, stream)) {
        return;
    }
    if (args.gate) {
        GGML_ASSERT(ncols == 1);
        args.y == args.y_gate ? launch_gated<type, GATE_SHARES_Y>(args, grid_yz, stream)
                              : launch_gated<type, GATE_HAS_Y>(args, grid_yz, stream);
        return;
    }
    switch (ncols) {
    case 1:
        launch_ungated<type, 1>(args, grid_yz, stream);
        break;
    case 2:
        launch_ungated<type, 2>(args, grid_yz, stream);
        break;
    case 3:
        launch_ungated<type, 3>(args, grid_yz, stream);
        break;
    case 4:
        launch_ungated<type, 4>(args, grid_yz, stream);
        break;
    case 5:
        launch_ungated<type, 5>(args, grid_yz, stream);
        break;
    case 6:
        launch_ungated<type, 6>(args, grid_yz, stream);
        break;
    case 7:
        launch_ungated<type, 7>(args, grid_yz, stream);
        break;
    case 8:
        launch_ungated<type, 8>(args, grid_yz, stream);
        break;
    default:
        GGML_ABORT("fatal error");
    }
}

// The MUL_MAT or MUL_MAT_ID of weight whose result, perhaps after a bias and a GLU, is node.
static const ggml_tensor * find_mul_mat(const ggml_tensor * node, const ggml_tensor * weight, const int depth = 2) {
    if ((node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID) && node->src[0] == weight) {
        return node;
    }
    for (int i = 0; i < 2 && depth > 0; ++i) {
        const ggml_tensor * found = node->src[i] ? find_mul_mat(node->src[i], weight, depth - 1) : nullptr;
        if (found) {
            return found;
        }
    }
    return nullptr;
}

// node: a product of the group, all of which have its activations, type and column order; dst: as node's result, or
// what fusion makes of it; y: the activations, in the gate's column order behind the other if that is another.
static void multiply(ggml_backend_cuda_context & ctx, const pt2_group & group, const ggml_tensor * node,
                     const ggml_tensor * dst, const ggml_cuda_mm_fusion_args_host * fusion,
                     const pt2_vec_activations & y) {
    const ggml_tensor * src0 = node->src[0];
    const ggml_tensor * src1 = node->src[1];
    const ggml_tensor * ids = node->op == GGML_OP_MUL_MAT_ID ? node->src[2] : nullptr;
    const ggml_tensor * gate = fusion ? fusion->gate : nullptr;
    GGML_ASSERT(dst->type == GGML_TYPE_F32);
    GGML_ASSERT(!fusion || (!fusion->x_scale && !fusion->gate_scale));
    cudaStream_t stream = ctx.stream();
    const int64_t to_gate = (y.nrows - ggml_nrows(src1)) * y.nblocks_padded;

    mmv_args args = {};
    args.group = group;
    args.gate = gate ? (const char *) gate->data : nullptr;
    args.y = y.qs;
    args.y_gate = y.qs + to_gate * QK_PT2;
    args.ys = y.scales;
    args.ys_gate = y.scales + to_gate;
    args.nblocks = y.nblocks;
    args.nblocks_y = y.nblocks_padded;
    args.nb01 = src0->nb[1];
    args.nb02 = src0->nb[2];
    args.nb03 = src0->nb[3];
    args.s2 = dst->nb[2] / sizeof(float);
    args.s3 = dst->nb[3] / sizeof(float);
    args.stride_y = src1->ne[1];
    if (fusion) {
        args.gate_bias = fusion->gate_bias ? (const float *) fusion->gate_bias->data : nullptr;
        args.glu_op = fusion->glu_op;
        args.glu_limit = fusion->glu_limit;
        for (const ggml_tensor * bias : { fusion->x_bias, fusion->gate_bias }) {
            if (bias) {
                GGML_ASSERT(bias->type == GGML_TYPE_F32 && bias->ne[0] == dst->ne[0]);
                GGML_ASSERT(ids ? bias->ne[1] == src0->ne[2] : ggml_nrows(dst) == 1 || ggml_are_same_stride(bias, dst));
                args.s_bias = bias->nb[1] / sizeof(float);
            }
        }
    }
    if (ids) {
        args.ids = (const int32_t *) ids->data;
        args.ids_stride = ids->nb[1] / sizeof(int32_t);
        args.ne12 = init_fastdiv_values(src1->ne[1]);
    } else {
        args.ne12 = init_fastdiv_values(src1->ne[2]);
        args.r2 = init_fastdiv_values(src1->ne[2] / src0->ne[2]);
        args.r3 = init_fastdiv_values(src1->ne[3] / src0->ne[3]);
    }

    const int ncols = ids ? 1 : src1->ne[1];
    const dim3 grid_yz = ids ? dim3(1, ids->ne[0], ids->ne[1]) : dim3(1, src1->ne[2], src1->ne[3]);
    if (src0->type == GGML_TYPE_TQ2_1) {
        launch_for<GGML_TYPE_TQ2_1>(args, ncols, grid_yz, stream);
    } else {
        launch_for<GGML_TYPE_TQ1_1>(args, ncols, grid_yz, stream);
    }
}

// norm: what the activations are, if they are not computed yet, or NULL.
static void quantize_and_multiply(ggml_backend_cuda_context & ctx, const pt2_group & group, const ggml_tensor * node,
                                  const ggml_tensor * dst, const ggml_cuda_mm_fusion_args_host * fusion,
                                  const pt2_norm * norm) {
    const ggml_tensor * src0 = node->src[0];
    const ggml_tensor * src1 = norm ? norm->x : node->src[1];
    GGML_ASSERT(src1->type == GGML_TYPE_F32);
    const ggml_tensor * perms[2] = { ggml_mul_mat_get_perm(node), nullptr };
    int n_perms = 1;
    if (fusion && fusion->gate) {
        const ggml_tensor * gate_node = find_mul_mat(dst, fusion->gate);
        GGML_ASSERT(gate_node && gate_node->src[1] == node->src[1] && ggml_are_same_stride(fusion->gate, src0));
        perms[1] = ggml_mul_mat_get_perm(gate_node);
        n_perms = perms[0] == perms[1] ? 1 : 2;
    }
    const pt2_vec_activations y(ctx, src0->type, src0->ne[0] / QK_PT2, ggml_nrows(src1) * n_perms);
    pt2_quantize_vec(src1, norm, perms, n_perms, y, ctx.stream());
    multiply(ctx, group, node, dst, fusion, y);
}

void ggml_cuda_pt2_mul_mat_vec(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1,
                               ggml_tensor * dst, const ggml_cuda_mm_fusion_args_host * fusion) {
    const ggml_tensor * node = find_mul_mat(dst, src0);
    GGML_ASSERT(node && node->src[1] == src1);
    pt2_group group;
    group.add(src0, dst, fusion ? fusion->x_bias : nullptr);
    quantize_and_multiply(ctx, group, node, dst, fusion, nullptr);
}

void pt2_mul_mat_vec_group(ggml_backend_cuda_context & ctx, const pt2_biased * products, const int n,
                           const pt2_norm * norm) {
    pt2_group group;
    for (int i = 0; i < n; ++i) {
        group.add(products[i].product->src[0], products[i].dst, products[i].bias);
    }
    quantize_and_multiply(ctx, group, products[0].product, products[0].dst, nullptr, norm);
}

void pt2_mul_mat_vec_quantized(ggml_backend_cuda_context & ctx, const pt2_biased & product,
                               const pt2_vec_activations & y) {
    pt2_group group;
    group.add(product.product->src[0], product.dst, product.bias);
    multiply(ctx, group, product.product, product.dst, nullptr, y);
}

void pt2_mul_mat_vec_glu(ggml_backend_cuda_context & ctx, ggml_tensor * glu, const pt2_norm & norm) {
    const ggml_tensor * gate = glu->src[0];
    const ggml_tensor * up = glu->src[1];
    ggml_cuda_mm_fusion_args_host fusion = {};
    fusion.gate = gate->src[0];
    fusion.glu_op = ggml_get_glu_op(glu);
    fusion.glu_limit = ggml_get_op_params_f32(glu, 3);
    pt2_group group;
    group.add(up->src[0], glu);
    quantize_and_multiply(ctx, group, up, glu, &fusion, &norm);
}

// The matmul reads whole pairs of blocks. Behind a row there is another, or padding that holds
// zeros; only behind a view of a temporary tensor there may be anything.
static bool may_read_behind_rows(const ggml_tensor * src0) {
    return src0->ne[0] % (2 * QK_PT2) == 0 || !src0->view_src ||
           ggml_backend_buffer_get_usage(src0->buffer) != GGML_BACKEND_BUFFER_USAGE_COMPUTE;
}

void ggml_cuda_pt2_mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const bool is_id = dst->op == GGML_OP_MUL_MAT_ID;
    const int64_t ncols = dst->ne[is_id ? 2 : 1];
    if (ncols <= MMVQ_MAX_BATCH_SIZE) {
        ggml_cuda_pt2_mul_mat_vec(ctx, src0, src1, dst, nullptr);
        return;
    }
    if (pt2_mul_mat_hopper(ctx, &dst, 1) || pt2_mul_mat_many(ctx, dst)) {
        return;
    }
    if (may_read_behind_rows(src0)) {
        ggml_cuda_mul_mat_q(ctx, src0, src1, is_id ? dst->src[2] : nullptr, dst);
        return;
    }
    const int dim = is_id ? 2 : 1;
    for (int64_t j = 0; j < ncols; j += MMVQ_MAX_BATCH_SIZE) {
        ggml_tensor x = *src1;
        ggml_tensor ids;
        ggml_tensor some = *dst;
        x.ne[dim] = some.ne[dim] = std::min<int64_t>(ncols - j, MMVQ_MAX_BATCH_SIZE);
        x.data = (char *) x.data + j * x.nb[dim];
        some.data = (char *) some.data + j * some.nb[dim];
        some.src[1] = &x;
        if (is_id) {
            ids = *dst->src[2];
            ids.ne[1] = some.ne[dim];
            ids.data = (char *) ids.data + j * ids.nb[1];
            some.src[2] = &ids;
        }
        ggml_cuda_pt2_mul_mat_vec(ctx, src0, &x, &some, nullptr);
    }
}

bool ggml_cuda_pt2_supports_op(const ggml_tensor * op) {
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];
    switch (op->op) {
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
        return true;
    case GGML_OP_MUL_MAT:
    case GGML_OP_MUL_MAT_ID: {
        const ggml_tensor * perm = ggml_mul_mat_get_perm(op);
        return a->nb[0] == ggml_type_size(a->type) && b->nb[0] == sizeof(float) && b->type == GGML_TYPE_F32 &&
               op->type == GGML_TYPE_F32 && (!perm || (perm->type == GGML_TYPE_I32 && ggml_is_contiguous(perm))) &&
               // as upstream: what is asked to be done in F32
               !(op->op == GGML_OP_MUL_MAT_ID && ggml_get_op_params_i32(op, 3) == GGML_PREC_F32);
    }
    case GGML_OP_GET_ROWS:
        return a->nb[0] == ggml_type_size(a->type) &&
               (op->type == GGML_TYPE_F32 || op->type == GGML_TYPE_F16 || op->type == GGML_TYPE_BF16);
    case GGML_OP_CPY:
    case GGML_OP_DUP:
        return ggml_is_contiguous(a) && ggml_is_contiguous(op) &&
               (op->type == a->type ||
                (op->op == GGML_OP_CPY && (op->type == GGML_TYPE_F32 || op->type == GGML_TYPE_F16)));
    default:
        return false;
    }
}
