// Times, bandwidth and operations of single products of matrices on a GPU, ternary types beside llama.cpp's own. There
// are so many copies of the weights that they do not fit into the L2; one graph computes all products, and the median
// of its times counts, quantizing the activations included. Neighbours have different activations, as products of the
// same would be computed together; those that models compute together, q, k and v, gate and up, come last. Arguments:
// numbers of columns, all by default. For one column the kernel alone is measured too, of activations that are
// quantized already. With G for BUILD/llama.cpp/ggml, where BUILD is the directory of a build with CUDA:
//     nvcc -O2 -std=c++17 -DGGML_CUDA_USE_GRAPHS cuda_products.cu -I../ggml_patches/src/ggml
//         -I../ggml_patches/src/ggml-cuda -IG/include -IG/src -IG/src/ggml-cuda -LBUILD/bin -lggml -lggml-base
//         -lggml-cuda
#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cuda.h"
#include "ggml-pt2.h"
#include "ggml.h"
#include "pt2-group.cuh"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

static const int REPETITIONS = 15;
static const int WARMUPS = 4;

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> & times) {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

static double copy_gbs() {
    const size_t n = 2ull << 30;
    void *a, *b;
    cudaMalloc(&a, n);
    cudaMalloc(&b, n);
    cudaMemset(a, 1, n);
    std::vector<double> t;
    for (int i = 0; i < 12; ++i) {
        cudaDeviceSynchronize();
        const double t0 = now();
        cudaMemcpyAsync(b, a, n, cudaMemcpyDeviceToDevice, 0);
        cudaDeviceSynchronize();
        t.push_back(now() - t0);
    }
    cudaFree(a);
    cudaFree(b);
    return 2.0 * n / median(t) / 1e9;
}

// How many copies of weights are more than the L2 holds.
static int copies_of(const size_t bytes, const int64_t n) {
    const size_t total = std::max<size_t>(n > 8 ? 200ull << 20 : 500ull << 20, 2 * bytes);
    return std::max<int>(n > 8 ? 4 : 16, std::min<size_t>((total + bytes - 1) / bytes, 100));
}

static std::vector<uint32_t> random_weights(const size_t bytes) {
    std::mt19937 rng(1);
    std::vector<uint32_t> random(bytes / 4 + 1);
    for (auto & r : random) {
        r = rng() & 0xBFFFBFFF; // halves stay finite
    }
    return random;
}

// Of the matvec's kernel, one after the other as in a model.
static double kernel_us(ggml_backend_t backend, ggml_type type, int64_t m, int64_t k) {
    const size_t bytes = ggml_row_size(type, k) * m;
    const int copies = copies_of(bytes, 1);
    const ggml_init_params params = { ggml_tensor_overhead() * 1024, nullptr, true };
    ggml_context * context = ggml_init(params);
    ggml_tensor * x = ggml_new_tensor_2d(context, GGML_TYPE_F32, k, 1);
    std::vector<ggml_tensor *> products;
    for (int i = 0; i < copies; ++i) {
        products.push_back(ggml_mul_mat(context, ggml_new_tensor_2d(context, type, k, m), x));
    }
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(context, backend);
    const std::vector<uint32_t> random = random_weights(bytes);
    for (ggml_tensor * product : products) {
        ggml_backend_tensor_set(product->src[0], random.data(), 0, bytes);
    }
    const std::vector<float> ones(k, 1.0f);
    ggml_backend_tensor_set(x, ones.data(), 0, ggml_nbytes(x));

    std::vector<double> times;
    {
        ggml_backend_cuda_context & cuda = *(ggml_backend_cuda_context *) backend->context;
        cudaStream_t stream = cuda.stream();
        const ggml_tensor * in_order = nullptr;
        const pt2_vec_activations activations(cuda, type, k / QK_PT2, 1);
        pt2_quantize_vec(x, nullptr, &in_order, 1, activations, stream);
        cudaGraph_t graph;
        cudaGraphExec_t executable;
        CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
        for (ggml_tensor * product : products) {
            pt2_mul_mat_vec_quantized(cuda, { product, nullptr, product }, activations);
        }
        CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
        CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
        cudaEvent_t start, end;
        CUDA_CHECK(cudaEventCreate(&start));
        CUDA_CHECK(cudaEventCreate(&end));
        for (int i = 0; i < REPETITIONS + WARMUPS; ++i) {
            float ms;
            CUDA_CHECK(cudaEventRecord(start, stream));
            CUDA_CHECK(cudaGraphLaunch(executable, stream));
            CUDA_CHECK(cudaEventRecord(end, stream));
            CUDA_CHECK(cudaStreamSynchronize(stream));
            CUDA_CHECK(cudaEventElapsedTime(&ms, start, end));
            if (i >= WARMUPS) {
                times.push_back(ms * 1e3);
            }
        }
        CUDA_CHECK(cudaEventDestroy(start));
        CUDA_CHECK(cudaEventDestroy(end));
        CUDA_CHECK(cudaGraphExecDestroy(executable));
        CUDA_CHECK(cudaGraphDestroy(graph));
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(context);
    return median(times) / copies;
}

// Of one product, or of gate, up and their GLU; `together` neighbours have the same activations.
static double time_us(ggml_backend_t backend, ggml_type type, int64_t m, int64_t k, int64_t n, bool perm, bool glu,
                      int together = 1) {
    const size_t bytes = ggml_row_size(type, k) * m * (glu ? 2 : 1);
    const int copies = copies_of(bytes, n);
    ggml_init_params params = { ggml_tensor_overhead() * 2048 + ggml_graph_overhead_custom(2048, false), nullptr,
                                true };
    ggml_context * cw = ggml_init(params);
    ggml_context * cx = ggml_init(params);
    ggml_tensor * x[2];
    for (auto & activations : x) {
        activations = ggml_new_tensor_2d(cw, GGML_TYPE_F32, k, n);
    }
    ggml_tensor * p = ggml_new_tensor_1d(cw, GGML_TYPE_I32, k);
    ggml_tensor * p2 = ggml_new_tensor_1d(cw, GGML_TYPE_I32, k);
    std::vector<ggml_tensor *> w;
    for (int i = 0; i < copies * (glu ? 2 : 1); ++i) {
        w.push_back(ggml_new_tensor_2d(cw, type, k, m));
    }
    ggml_cgraph * graph = ggml_new_graph_custom(cx, 2048, false);
    ggml_tensor * last = nullptr;
    for (int i = 0; i < copies; ++i) {
        const auto mul = [&](ggml_tensor * weight, ggml_tensor * order) {
            ggml_tensor * out = ggml_mul_mat(cx, weight, x[i / together % 2]);
            if (perm) {
                ggml_mul_mat_set_perm(out, order);
            }
            return out;
        };
        if (glu) {
            ggml_tensor * gate = mul(w[2 * i], p);
            ggml_tensor * up = mul(w[2 * i + 1], p2);
            ggml_build_forward_expand(graph, gate);
            last = ggml_swiglu_split(cx, gate, up);
        } else {
            last = mul(w[i], p);
        }
        ggml_build_forward_expand(graph, last);
    }
    ggml_backend_buffer_t bw = ggml_backend_alloc_ctx_tensors(cw, backend);
    ggml_backend_buffer_set_usage(bw, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_buffer_t bx = ggml_backend_alloc_ctx_tensors(cx, backend);
    const std::vector<uint32_t> random = random_weights(ggml_row_size(type, k) * m);
    for (ggml_tensor * t : w) {
        ggml_backend_tensor_set(t, random.data(), 0, ggml_nbytes(t));
    }
    std::mt19937 rng(2);
    std::vector<float> xs(k * n);
    std::normal_distribution<float> normal;
    for (auto & v : xs) {
        v = normal(rng);
    }
    for (ggml_tensor * activations : x) {
        ggml_backend_tensor_set(activations, xs.data(), 0, ggml_nbytes(activations));
    }
    std::vector<int32_t> order(k);
    for (int i = 0; i < k; ++i) {
        order[i] = i;
    }
    std::shuffle(order.begin(), order.end(), rng);
    ggml_backend_tensor_set(p, order.data(), 0, ggml_nbytes(p));
    ggml_backend_tensor_set(p2, order.data(), 0, ggml_nbytes(p2));
    std::vector<double> t;
    for (int i = 0; i < REPETITIONS + WARMUPS; ++i) {
        const double t0 = now();
        ggml_backend_graph_compute(backend, graph);
        if (i >= WARMUPS) {
            t.push_back(now() - t0);
        }
    }
    ggml_backend_buffer_free(bw);
    ggml_backend_buffer_free(bx);
    ggml_free(cw);
    ggml_free(cx);
    return median(t) / copies * 1e6;
}

int main(int argc, char ** argv) {
    std::vector<int> columns;
    for (int i = 1; i < argc; ++i) {
        columns.push_back(atoi(argv[i]));
    }
    if (columns.empty()) {
        columns = { 1, 2, 4, 8, 128, 512 };
    }
    ggml_backend_t backend = ggml_backend_cuda_init(0);
    const double copy = copy_gbs();
    printf("copy %.0f GB/s (read + written)\n", copy);
    struct shape {
        int64_t m, k;
    };
    const std::vector<ggml_type> types = { GGML_TYPE_TQ2_1,   GGML_TYPE_TQ1_1, GGML_TYPE_Q2_K,
                                           GGML_TYPE_IQ2_XXS, GGML_TYPE_Q4_0,  GGML_TYPE_F16 };
    const std::vector<shape> shapes = { { 4096, 4096 },  { 11008, 4096 }, { 4096, 11008 }, { 5120, 5120 },
                                        { 5120, 13824 }, { 8192, 8192 },  { 22016, 8192 }, { 8192, 22016 } };
    for (const shape & s : shapes) {
        for (const int n : columns) {
            for (const ggml_type type : types) {
                const double us = time_us(backend, type, s.m, s.k, n, false, false);
                const double bytes = (double) ggml_row_size(type, s.k) * (double) s.m;
                const double products = (double) (s.m * s.k * n);
                printf("%5d x %5d  n %3d  %-8s %9.2f us  %7.0f GB/s  %5.1f%% of copy  %7.1f TOPS", (int) s.m, (int) s.k,
                       n, ggml_type_name(type), us, bytes / us * 1e-3, 100 * bytes / us * 1e-3 / copy,
                       2e-6 * products / us);
                if (ggml_pt2_is_ternary(type)) {
                    printf("  with perm %9.2f us", time_us(backend, type, s.m, s.k, n, true, false));
                }
                if (ggml_pt2_is_ternary(type) && n == 1) {
                    const double alone = kernel_us(backend, type, s.m, s.k);
                    printf("  kernel alone %6.2f us %5.1f%%", alone, 100 * bytes / alone * 1e-3 / copy);
                }
                printf("\n");
                fflush(stdout);
            }
        }
    }
    for (const int64_t m : { 4096, 5120, 8192 }) {
        for (const ggml_type type : { GGML_TYPE_TQ2_1, GGML_TYPE_TQ1_1, GGML_TYPE_Q2_K }) {
            const double us = 3 * time_us(backend, type, m, m, 1, false, false, 3);
            const double bytes = 3.0 * (double) ggml_row_size(type, m) * (double) m;
            printf("q, k and v     %5d x %5d  %-8s %9.2f us  %7.0f GB/s  %5.1f%% of copy", (int) m, (int) m,
                   ggml_type_name(type), us, bytes / us * 1e-3, 100 * bytes / us * 1e-3 / copy);
            if (ggml_pt2_is_ternary(type)) {
                printf("  with perm %9.2f us", 3 * time_us(backend, type, m, m, 1, true, false, 3));
            }
            printf("\n");
        }
    }
    for (const shape & s : { shape{ 11008, 4096 }, { 22016, 8192 } }) {
        for (const ggml_type type : { GGML_TYPE_TQ2_1, GGML_TYPE_TQ1_1, GGML_TYPE_Q2_K }) {
            printf("gate+up+swiglu %5d x %5d  %-8s %9.2f us", (int) s.m, (int) s.k, ggml_type_name(type),
                   time_us(backend, type, s.m, s.k, 1, false, true));
            if (ggml_pt2_is_ternary(type)) {
                printf("  with perms %9.2f us", time_us(backend, type, s.m, s.k, 1, true, true));
            }
            printf("\n");
        }
    }
    ggml_backend_free(backend);
}
