// What runs on Hopper only.
#pragma once

#include "pt2-attention.cuh"
#include "pt2-mmvq.cuh"

// pt2_mul_mat_hopper, many columns: products of the same activations, type and column order.
// pt2_mul_mat_vec_hopper, one column. Both return false for what is not for them. pt2_attend_hopper, one token: how
// many nodes it computed, or 0. pt2_attends_hopper: whether a device could be asked for it.
#if defined(PT2_HOPPER) // the compiler knows sm_90a
// A launch of thread blocks in clusters.
struct pt2_cluster_launch {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};

    pt2_cluster_launch(const ggml_cuda_kernel_launch_params & params, const dim3 cluster) {
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim.x = cluster.x;
        attributes[0].val.clusterDim.y = cluster.y;
        attributes[0].val.clusterDim.z = cluster.z;
        config.gridDim = params.block_nums;
        config.blockDim = params.block_dims;
        config.dynamicSmemBytes = params.shmem;
        config.stream = params.stream;
        config.attrs = attributes;
        config.numAttrs = 1;
    }

    // config points to attributes
    pt2_cluster_launch(const pt2_cluster_launch &) = delete;
    pt2_cluster_launch & operator=(const pt2_cluster_launch &) = delete;

    // While kernels in front of it are running; the kernel waits for them where it calls ggml_cuda_pdl_sync.
    void start_early() {
#if defined(GGML_CUDA_USE_PDL) // or else that call does not wait
        attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[1].val.programmaticStreamSerializationAllowed = 1;
        config.numAttrs = 2;
#endif
    }
};

bool pt2_mul_mat_hopper(ggml_backend_cuda_context & ctx, ggml_tensor * const * dsts, int n);
bool pt2_mul_mat_vec_hopper(ggml_type type, const mmv_args & args, cudaStream_t stream);
bool pt2_attends_hopper(int device);
int pt2_attend_hopper(ggml_backend_cuda_context & ctx, const pt2_attention & attention);
#else
static inline bool pt2_mul_mat_hopper(ggml_backend_cuda_context &, ggml_tensor * const *, int) {
    return false;
}
static inline bool pt2_mul_mat_vec_hopper(ggml_type, const mmv_args &, cudaStream_t) {
    return false;
}
static inline bool pt2_attends_hopper(int) {
    return false;
}
static inline int pt2_attend_hopper(ggml_backend_cuda_context &, const pt2_attention &) {
    return 0;
}
#endif
