// Multiplies with ternary weights through ggml's graphs, in the plain CPU buffer and in that of panels, and
// compares with float64 products, and buffers and numbers of threads with each other, bit for bit.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-pt2.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

static std::mt19937 rng(std::random_device{}());

static int between(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
}

// How the activations lie in memory.
enum layout { CONTIGUOUS, PADDED, SWAPPED };

// One multiplication. experts > 0: MUL_MAT_ID, with `columns` tokens.
struct shape {
    ggml_type type;
    int64_t length;
    int64_t rows;
    int64_t columns;
    int64_t matrices[2] = { 1, 1 }; // of the weights
    int64_t shares[2] = { 1, 1 };   // matrices of the activations for each of those
    int64_t experts = 0;
    int64_t used = 0; // experts of a token
    bool own = false; // whether each expert of a token gets its own activations
    layout lie = CONTIGUOUS;
    bool permuted = false;

    std::string name() const {
        char text[256];
        snprintf(
            text, sizeof(text),
            "%s length %d rows %d columns %d matrices %dx%d shares %dx%d experts %d used %d own %d layout %d perm %d",
            ggml_type_name(type), (int) length, (int) rows, (int) columns, (int) matrices[0], (int) matrices[1],
            (int) shares[0], (int) shares[1], (int) experts, (int) used, own, lie, permuted);
        return text;
    }
};

static void check(bool holds, const shape & s, const char * what) {
    if (!holds) {
        fprintf(stderr, "%s: %s\n", s.name().c_str(), what);
        exit(1);
    }
}

static std::vector<float> noise(int64_t n) {
    std::vector<float> values(n);
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::generate(values.begin(), values.end(), [&] { return uniform(rng); });
    return values;
}

// The values that go into the tensors of a shape, and the shape of the activations.
struct inputs {
    int64_t ne[4]; // of the activations
    std::vector<uint8_t> weights;
    std::vector<float> fitted; // what the weights stand for
    std::vector<float> x;      // in the order of ne
    std::vector<int32_t> perm;
    std::vector<int32_t> ids; // for each token, all experts, those that are used first

    explicit inputs(const shape & s) {
        const int64_t weight_rows = s.rows * (s.experts ? s.experts : s.matrices[0] * s.matrices[1]);
        weights.resize(weight_rows * ggml_row_size(s.type, s.length));
        fitted.resize(weight_rows * s.length);
        const std::vector<float> w = noise(weight_rows * s.length);
        ggml_quantize_chunk(s.type, w.data(), weights.data(), 0, weight_rows, s.length, nullptr);
        ggml_get_type_traits(s.type)->to_float(weights.data(), fitted.data(), fitted.size());

        ne[0] = s.length;
        ne[1] = s.experts ? (s.own ? s.used : 1) : s.columns;
        ne[2] = s.experts ? s.columns : s.matrices[0] * s.shares[0];
        ne[3] = s.experts ? 1 : s.matrices[1] * s.shares[1];
        x = noise(ne[0] * ne[1] * ne[2] * ne[3]);

        perm.resize(s.length);
        std::iota(perm.begin(), perm.end(), 0);
        if (s.permuted) {
            std::shuffle(perm.begin(), perm.end(), rng);
        }
        for (int64_t token = 0; token < s.experts * s.columns; token += s.experts) {
            for (int64_t e = 0; e < s.experts; ++e) {
                // The last expert gets no token, the first many, and often some token twice.
                ids.push_back(between(0, 2) ? 0 : between(0, (int) s.experts - 2));
            }
        }
    }
};

struct run_options {
    ggml_backend_buffer_type_t buft; // of the weights
    int threads;
};

static ggml_context_ptr new_context() {
    const ggml_init_params params = { 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    return ggml_context_ptr(ggml_init(params));
}

static ggml_tensor * new_activations(ggml_context * ctx, const shape & s, const inputs & in) {
    switch (s.lie) {
    case PADDED: { // columns of a wider tensor, at odd addresses
        ggml_tensor * wide = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, in.ne[0] + 5, in.ne[1], in.ne[2], in.ne[3]);
        return ggml_view_4d(ctx, wide, in.ne[0], in.ne[1], in.ne[2], in.ne[3], wide->nb[1], wide->nb[2], wide->nb[3],
                            3 * sizeof(float));
    }
    case SWAPPED: // as attention has its heads
        return ggml_permute(ctx, ggml_new_tensor_4d(ctx, GGML_TYPE_F32, in.ne[0], in.ne[2], in.ne[1], in.ne[3]), 0, 2,
                            1, 3);
    default:
        return ggml_new_tensor_4d(ctx, GGML_TYPE_F32, in.ne[0], in.ne[1], in.ne[2], in.ne[3]);
    }
}

// Tensors in the plain CPU buffer are written where they are.
static void set_activations(ggml_tensor * x, const inputs & in) {
    const float * source = in.x.data();
    for (int64_t i3 = 0; i3 < x->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < x->ne[2]; ++i2) {
            for (int64_t i1 = 0; i1 < x->ne[1]; ++i1, source += x->ne[0]) {
                memcpy((char *) x->data + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3], source,
                       x->ne[0] * sizeof(float));
            }
        }
    }
}

// The product, by a graph that computes it again: after another operation, at once with the next one, which has fewer
// rows, and at once with one behind a view. Products of experts only follow each other.
static std::vector<float> multiply(ggml_backend_t backend, const shape & s, const inputs & in,
                                   const run_options & options) {
    ggml_context_ptr weights_ctx = new_context();
    ggml_tensor * w =
        s.experts ? ggml_new_tensor_3d(weights_ctx.get(), s.type, s.length, s.rows, s.experts)
                  : ggml_new_tensor_4d(weights_ctx.get(), s.type, s.length, s.rows, s.matrices[0], s.matrices[1]);
    const bool alone = s.experts > 0 || s.matrices[0] * s.matrices[1] > 1;
    ggml_tensor * less =
        alone ? w : ggml_new_tensor_2d(weights_ctx.get(), s.type, s.length, std::min<int64_t>(s.rows, 32));
    ggml_tensor * perm = s.permuted ? ggml_new_tensor_1d(weights_ctx.get(), GGML_TYPE_I32, s.length) : nullptr;
    ggml_backend_buffer_ptr weights_buffer(ggml_backend_alloc_ctx_tensors_from_buft(weights_ctx.get(), options.buft));
    for (ggml_tensor * t : { w, less }) {
        ggml_backend_tensor_set(t, in.weights.data(), 0, ggml_nbytes(t));
    }
    if (perm) {
        ggml_backend_tensor_set(perm, in.perm.data(), 0, ggml_nbytes(perm));
    }

    ggml_context_ptr ctx = new_context();
    ggml_tensor * x = new_activations(ctx.get(), s, in);
    ggml_tensor * ids = nullptr;
    if (s.experts) {
        ggml_tensor * all = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, s.experts, s.columns);
        ids = ggml_view_2d(ctx.get(), all, s.used, s.columns, all->nb[1], 0);
    }
    ggml_tensor * products[4];
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    for (int i = 0; i < 4; ++i) {
        ggml_tensor * weights = i == 2 ? less : w;
        ggml_tensor * product = ids ? ggml_mul_mat_id(ctx.get(), weights, x, ids) : ggml_mul_mat(ctx.get(), weights, x);
        products[i] = product;
        if (perm) {
            ggml_mul_mat_set_perm(product, perm);
        }
        check(ggml_backend_supports_op(backend, product), s, "not supported");
        ggml_build_forward_expand(graph, product);
        if (i == 0) {
            ggml_build_forward_expand(graph, ggml_neg(ctx.get(), product));
        } else if (i == 2) {
            ggml_build_forward_expand(graph, ggml_view_1d(ctx.get(), product, 1, 0));
        }
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
    ggml_backend_buffer_clear(buffer.get(), 0xFF); // NaN
    set_activations(x, in);
    if (ids) {
        memcpy(ids->data, in.ids.data(), in.ids.size() * sizeof(int32_t));
    }

    ggml_backend_cpu_set_n_threads(backend, options.threads);
    check(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS, s, "computing failed");
    std::vector<float> result(ggml_nelements(products[0]));
    memcpy(result.data(), products[0]->data, ggml_nbytes(products[0]));
    for (const ggml_tensor * again : { products[1], products[2], products[3] }) {
        for (int64_t column = 0; column < ggml_nrows(again); ++column) {
            const char * found = (const char *) again->data + column * again->nb[1]; // of a contiguous tensor
            check(memcmp(found, result.data() + column * s.rows, again->nb[1]) == 0, s,
                  "another product of the same differs");
        }
    }
    return result;
}

// out[0..rows) against the products of w's rows with x in float64.
static void check_column(const shape & s, const inputs & in, const float * w, const float * x, const float * out) {
    std::vector<double> gathered(s.length), step(s.length);
    double magnitude = 0;
    for (int64_t block = 0; block < s.length; block += QK_PT2) {
        double largest = 0;
        for (int64_t j = block; j < block + QK_PT2; ++j) {
            gathered[j] = x[in.perm[j]];
            largest = std::max(largest, std::fabs(gathered[j]));
            magnitude += 4 * std::fabs(gathered[j]); // |u|*|alpha| + |mu - alpha| for weights within 1
        }
        std::fill_n(step.begin() + block, QK_PT2, largest / 127);
    }
    // Half a step for each activation, and float32's rounding: of x/d, at most 127, and see test_kernels.py.
    const double eps = std::ldexp(1, -24);
    const double rounding = (2 * (s.length / QK_PT2) + 4) * eps * magnitude * (1 + 1.0 / 127);
    for (int64_t r = 0; r < s.rows; ++r, w += s.length) {
        double expected = 0, tolerance = rounding;
        for (int64_t j = 0; j < s.length; ++j) {
            expected += w[j] * gathered[j];
            tolerance += std::fabs(w[j]) * step[j] * (0.5 + 127 * 3 * eps);
        }
        check(std::fabs(out[r] - expected) <= tolerance, s, "wrong product");
    }
}

static void check_products(const shape & s, const inputs & in, const std::vector<float> & out) {
    const auto x_at = [&](int64_t i1, int64_t i2, int64_t i3) {
        return in.x.data() + ((i3 * in.ne[2] + i2) * in.ne[1] + i1) * in.ne[0];
    };
    const auto weights_at = [&](int64_t matrix) { return in.fitted.data() + matrix * s.rows * s.length; };
    const float * place = out.data();
    if (s.experts) {
        for (int64_t token = 0; token < s.columns; ++token) {
            for (int64_t slot = 0; slot < s.used; ++slot, place += s.rows) {
                check_column(s, in, weights_at(in.ids[token * s.experts + slot]), x_at(s.own ? slot : 0, token, 0),
                             place);
            }
        }
        return;
    }
    for (int64_t i3 = 0; i3 < in.ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < in.ne[2]; ++i2) {
            const int64_t matrix = i3 / s.shares[1] * s.matrices[0] + i2 / s.shares[0];
            for (int64_t i1 = 0; i1 < in.ne[1]; ++i1, place += s.rows) {
                check_column(s, in, weights_at(matrix), x_at(i1, i2, i3), place);
            }
        }
    }
}

static void check_shape(ggml_backend_t backend, ggml_backend_buffer_type_t panels, const shape & s) {
    const inputs in(s);
    std::vector<ggml_backend_buffer_type_t> bufts = { ggml_backend_cpu_buffer_type() };
    if (s.rows % 32 == 0) {
        bufts.push_back(panels);
    }
    std::vector<float> first;
    for (ggml_backend_buffer_type_t buft : bufts) {
        for (int threads : { 1, 2, 3, 7 }) {
            const std::vector<float> out = multiply(backend, s, in, { buft, threads });
            if (first.empty()) {
                first = out;
                check_products(s, in, out);
            }
            check(memcmp(out.data(), first.data(), out.size() * sizeof(float)) == 0, s,
                  "buffers or numbers of threads differ");
        }
    }
}

// Of the CPU's buffer types the one of that name, or nullptr.
static ggml_backend_buffer_type_t extra_buffer_type(ggml_backend_t backend, const char * name) {
    ggml_backend_dev_t device = ggml_backend_get_device(backend);
    const auto get_extra_bufts = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * buft = get_extra_bufts(device); *buft; ++buft) {
        if (strcmp(ggml_backend_buft_name(*buft), name) == 0) {
            return *buft;
        }
    }
    return nullptr;
}

// llama.cpp's own AMX kernels, between ternary products: they need the registers as a thread had them before.
static void check_beside_stock_amx(ggml_backend_t backend, ggml_backend_buffer_type_t panels,
                                   ggml_backend_buffer_type_t amx) {
    shape s = { GGML_TYPE_TQ2_1, 512, 256, 20 };
    s.shares[0] = 2; // one matrix of weights, two of activations
    const inputs in(s);
    std::vector<uint8_t> stock(s.rows * ggml_row_size(GGML_TYPE_Q8_0, s.length));
    ggml_quantize_chunk(GGML_TYPE_Q8_0, in.fitted.data(), stock.data(), 0, s.rows, s.length, nullptr);

    ggml_context_ptr ours_ctx = new_context(), stock_ctx = new_context(), ctx = new_context();
    ggml_tensor * ours = ggml_new_tensor_2d(ours_ctx.get(), s.type, s.length, s.rows);
    ggml_tensor * theirs = ggml_new_tensor_2d(stock_ctx.get(), GGML_TYPE_Q8_0, s.length, s.rows);
    ggml_backend_buffer_ptr ours_buffer(ggml_backend_alloc_ctx_tensors_from_buft(ours_ctx.get(), panels));
    ggml_backend_buffer_ptr stock_buffer(ggml_backend_alloc_ctx_tensors_from_buft(stock_ctx.get(), amx));
    ggml_backend_tensor_set(ours, in.weights.data(), 0, in.weights.size());
    ggml_backend_tensor_set(theirs, stock.data(), 0, stock.size());

    ggml_tensor * x = new_activations(ctx.get(), s, in);
    ggml_tensor * products[4];
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    for (int i = 0; i < 4; ++i) {
        products[i] = ggml_mul_mat(ctx.get(), i % 2 ? theirs : ours, x);
        ggml_build_forward_expand(graph, products[i]);
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
    for (int threads : { 1, 2, 3, 7 }) {
        ggml_backend_buffer_clear(buffer.get(), 0xFF); // NaN
        set_activations(x, in);
        ggml_backend_cpu_set_n_threads(backend, threads);
        check(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS, s, "computing failed");
        const float * first = (const float *) products[0]->data;
        check_products(s, in, std::vector<float>(first, first + ggml_nelements(products[0])));
        for (int i = 2; i < 4; ++i) {
            check(memcmp(products[i]->data, products[i - 2]->data, ggml_nbytes(products[i])) == 0, s,
                  "a product after the other kernels' differs");
        }
        // The activations of both and Q8_0's weights, at most 1, are rounded to steps of at most 1/127: an error of
        // which the standard deviation is the step's by the root of 12. Six times that of the sum.
        for (int64_t i = 0; i < ggml_nelements(products[0]); ++i) {
            const float difference = ((const float *) products[1]->data)[i] - first[i];
            check(std::fabs(difference) <= 6 * std::sqrt(s.length * 3 / 12.0) / 127, s, "a stock product is wrong");
        }
    }
}

int main() {
    ggml_backend_ptr backend(ggml_backend_cpu_init());
    ggml_backend_buffer_type_t panels = extra_buffer_type(backend.get(), "CPU_PT2");
    if (!panels) {
        fprintf(stderr, "there is no buffer type of panels\n");
        return 1;
    }
    if (ggml_backend_buffer_type_t amx = extra_buffer_type(backend.get(), "AMX")) {
        check_beside_stock_amx(backend.get(), panels, amx);
    }
    int count = 0;
    const auto test = [&](const shape & s) {
        check_shape(backend.get(), panels, s);
        ++count;
    };
    for (ggml_type type : { GGML_TYPE_TQ1_1, GGML_TYPE_TQ2_1 }) {
        std::vector<int> columns_tried = { 127, 128, 129, 200, 300 }; // strips
        for (int columns = 1; columns <= 33; ++columns) {
            columns_tried.push_back(columns);
        }
        for (int columns : columns_tried) {
            shape s = { type, 128 * between(1, 5), between(1, 150), columns };
            s.lie = columns % 2 ? CONTIGUOUS : PADDED;
            s.permuted = columns % 3 == 0;
            test(s);
            s.rows = 32 * between(1, 6);
            test(s);
        }
        for (int rows : { 1, 31, 32, 33, 64, 65, 3200 }) { // the last needs many chunks
            test({ type, 1152, rows, 3 });
        }
        test({ type, 17920, 64, 2 });           // a panel is larger than a chunk
        shape several = { type, 256, 96, 150 }; // more than a strip of columns for each matrix
        several.matrices[0] = 2;
        test(several);
        shape experts = { type, 256, 96, 200 };
        experts.experts = 4;
        experts.used = 3;
        experts.permuted = true;
        test(experts);
        for (layout lie : { CONTIGUOUS, PADDED, SWAPPED }) {
            for (bool permuted : { false, true }) {
                for (int rows : { 37, 96 }) {
                    // Weights that several matrices of activations share, in either dimension or both.
                    for (int combination = 0; combination < 8; ++combination) {
                        shape s = { type, 256, rows, between(1, 9) };
                        s.matrices[0] = combination & 1 ? 3 : 1;
                        s.matrices[1] = combination & 2 ? 2 : 1;
                        s.shares[0] = combination & 4 ? 2 : between(1, 2);
                        s.shares[1] = combination & 4 ? 3 : 1;
                        s.lie = lie;
                        s.permuted = permuted;
                        test(s);
                    }
                    for (int tokens : { 1, 2, 5, 33 }) {
                        for (bool own : { false, true }) {
                            shape s = { type, 384, rows, tokens };
                            s.experts = 6;
                            s.used = between(1, 4);
                            s.own = own;
                            s.lie = lie;
                            s.permuted = permuted;
                            test(s);
                        }
                    }
                }
            }
        }
    }
    printf("%d shapes multiplied\n", count);
    return 0;
}
