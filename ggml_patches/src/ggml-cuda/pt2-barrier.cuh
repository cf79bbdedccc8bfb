// Barriers in shared memory that count bytes, and the bulk copies that arrive at them (PTX; compute capability 9.0).
#pragma once

#include "common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

static __device__ __forceinline__ uint32_t shared_address(const void * p) {
    return __cvta_generic_to_shared(p);
}

static __device__ __forceinline__ void barrier_init(uint64_t * barrier, const int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}

static __device__ __forceinline__ void barrier_arrive(uint64_t * barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

static __device__ __forceinline__ void barrier_wait(uint64_t * barrier, const int phase) {
    asm volatile("{\n.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}\n" ::"r"(shared_address(barrier)),
                 "r"(phase)
                 : "memory");
}

static __device__ __forceinline__ void copy_bulk(void * to, const void * from, const uint32_t bytes,
                                                 uint64_t * barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

#endif // defined(__CUDA_ARCH_FEAT_SM90_ALL)
