// See pt2-mul-mat.h. All threads quantize the activations into tiles, and then take chunks of panels off a common
// counter until none is left; products of the same activations that follow each other, as gate and up do, at once.
#include "pt2-mul-mat.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "pt2-graph.h"
#include "pt2-panel.h"
#include "traits.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

constexpr size_t ALIGNMENT = 64;
constexpr int GROUP = 3;                    // products that are computed at once, at most
constexpr int64_t CHUNK_BYTES = 128 * 1024; // of weights: half a small L2 cache

bool is_interleaved(const ggml_tensor * weights) {
    return weights->buffer && weights->buffer->buft == ggml_backend_cpu_pt2_buffer_type();
}

int64_t panels_of(int64_t rows) {
    return (rows + PT2_PANEL_ROWS - 1) / PT2_PANEL_ROWS;
}

// A column of activations, and where its products with all rows go.
struct column {
    const float * x;
    float * out;
};

// Either operation as products of matrices with some columns each. Columns are numbered such that those of a matrix
// follow each other.
class multiplication {
public:
    const ggml_tensor * weights;
    const int32_t * perm;
    int64_t rows;
    int64_t blocks; // in a row
    int64_t matrices;
    int64_t columns;

    explicit multiplication(ggml_tensor * op) : weights(op->src[0]), op(op), x(op->src[1]) {
        const ggml_tensor * order = ggml_mul_mat_get_perm(op);
        perm = order ? (const int32_t *) order->data : nullptr;
        ids = op->op == GGML_OP_MUL_MAT_ID ? op->src[2] : nullptr;
        rows = weights->ne[1];
        blocks = weights->ne[0] / QK_PT2;
        matrices = weights->ne[2] * weights->ne[3];
        columns = ggml_nrows(op);
    }

    size_t sorting_size() const {
        return ids ? (matrices + 1 + columns) * sizeof(int64_t) : 0;
    }

    // Uses memory of sorting_size(). MUL_MAT's columns need no sorting.
    void use_sorted(void * memory) {
        if (ids) {
            starts = (int64_t *) memory;
            sorted = starts + matrices + 1;
        }
    }

    void sort() {
        if (!ids) {
            return;
        }
        std::fill_n(starts, matrices + 1, 0);
        for (int64_t c = 0; c < columns; ++c) {
            ++starts[expert(c) + 1];
        }
        for (int64_t m = 0; m < matrices; ++m) {
            starts[m + 1] += starts[m];
        }
        std::vector<int64_t> next(starts, starts + matrices);
        for (int64_t c = 0; c < columns; ++c) {
            sorted[next[expert(c)]++] = c;
        }
    }

    int64_t first_column(int64_t matrix) const {
        return ids ? starts[matrix] : matrix * (columns / matrices);
    }

    column at(int64_t c) const {
        if (ids) {
            const int64_t slot = sorted[c] % ids->ne[0];
            const int64_t token = sorted[c] / ids->ne[0];
            return { element(x, slot % x->ne[1], token, 0), element(op, slot, token, 0) };
        }
        if (columns == x->ne[1]) { // a single matrix, without the divisions
            return { element(x, c, 0, 0), element(op, c, 0, 0) };
        }
        // Neighbouring matrices of the activations share one of the weights.
        const int64_t share2 = x->ne[2] / weights->ne[2];
        const int64_t share3 = x->ne[3] / weights->ne[3];
        const int64_t matrix = c / (columns / matrices);
        const int64_t i1 = c % x->ne[1];
        const int64_t i2 = c / x->ne[1] % share2 + matrix % weights->ne[2] * share2;
        const int64_t i3 = c / (x->ne[1] * share2) % share3 + matrix / weights->ne[2] * share3;
        return { element(x, i1, i2, i3), element(op, i1, i2, i3) };
    }

    const char * matrix(int64_t m) const {
        return (const char *) weights->data + m % weights->ne[2] * weights->nb[2] + m / weights->ne[2] * weights->nb[3];
    }

private:
    const ggml_tensor * op;
    const ggml_tensor * x;
    const ggml_tensor * ids;
    int64_t * starts = nullptr; // of the matrices' columns, and their end
    int64_t * sorted = nullptr; // column -> slot + token * slots

    int64_t expert(int64_t c) const {
        const int64_t slot = c % ids->ne[0];
        const int64_t token = c / ids->ne[0];
        const int32_t m = *(const int32_t *) ((const char *) ids->data + slot * ids->nb[0] + token * ids->nb[1]);
        GGML_ASSERT(0 <= m && m < matrices);
        return m;
    }

    static float * element(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
        return (float *) ((char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3]);
    }
};

// How the work is cut, and what it needs of the work buffer.
struct plan {
    int64_t chunk_panels;
    int64_t chunks; // in a matrix
    size_t sorting_at;
    size_t scratch_at;
    size_t scratch_size; // of a thread: panels, for weights that are not interleaved
    size_t size;

    plan(const multiplication & product, int threads) {
        const int64_t panels = panels_of(product.rows);
        const int64_t panel_size = product.blocks * (int64_t) sizeof(block_panel);
        const int64_t most = std::max<int64_t>(1, CHUNK_BYTES / panel_size);
        chunk_panels = std::clamp<int64_t>(panels * product.matrices / (4 * threads), 1, most);
        chunks = (panels + chunk_panels - 1) / chunk_panels;
        sorting_at = GGML_PAD(pt2_tile_size((int) product.columns, product.blocks), ALIGNMENT);
        scratch_at = GGML_PAD(sorting_at + product.sorting_size(), ALIGNMENT);
        scratch_size = is_interleaved(product.weights) ? 0 : most * panel_size;
        size = scratch_at + threads * scratch_size + ALIGNMENT;
    }
};

class mul_mat : public ggml::cpu::tensor_traits {
    bool work_size(int threads, const ggml_tensor * op, size_t & size) override {
        size = plan(multiplication(const_cast<ggml_tensor *>(op)), threads).size;
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        multiply(params, &op, 1);
        return true;
    }

public:
    // ops: with the same activations and column order, which are quantized for all of them
    static void multiply(const ggml_compute_params * params, ggml_tensor * const * ops, int n) {
        multiplication first(ops[0]);
        char * work = (char *) GGML_PAD((uintptr_t) params->wdata, ALIGNMENT);
        first.use_sorted(work + fitting_plan(first, params).sorting_at);
        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
            first.sort();
        }
        if (first.sorting_size()) {
            ggml_barrier(params->threadpool);
        }
        quantize(first, params, work);
        ggml_barrier(params->threadpool);

        int64_t chunk = params->ith;
        int64_t chunks_before = 0;
        for (int i = 0; i < n; ++i) {
            multiplication product(ops[i]);
            const plan cut = fitting_plan(product, params);
            product.use_sorted(work + cut.sorting_at);
            void * scratch = work + cut.scratch_at + params->ith * cut.scratch_size;
            const int64_t end = chunks_before + product.matrices * cut.chunks;
            while (chunk < end) {
                multiply_chunk(product, cut, chunk - chunks_before, work, (block_panel *) scratch);
                chunk = ggml_threadpool_chunk_add(params->threadpool, 1);
            }
            chunks_before = end;
        }
    }

private:
    static plan fitting_plan(const multiplication & product, const ggml_compute_params * params) {
        const plan cut(product, params->nth);
        GGML_ASSERT(cut.size <= params->wsize);
        return cut;
    }

    // Calls function(first, n) for each strip of the matrix's columns.
    template <typename F> static void each_strip(const multiplication & product, int64_t matrix, const F & function) {
        const int64_t begin = product.first_column(matrix);
        const int64_t columns = product.first_column(matrix + 1) - begin;
        const int64_t strips = (columns + PT2_STRIP_COLUMNS - 1) / PT2_STRIP_COLUMNS;
        for (int64_t s = 0; s < strips; ++s) {
            const int64_t first = columns * s / strips;
            function(begin + first, (int) (columns * (s + 1) / strips - first));
        }
    }

    // The same for tiles.
    template <typename F> static void each_tile(const multiplication & product, int64_t matrix, const F & function) {
        each_strip(product, matrix, [&](int64_t first, int columns) {
            for (int t = 0; t < pt2_tiles(columns); ++t) {
                const int begin = pt2_tile_begin(columns, t);
                function(first + begin, pt2_tile_begin(columns, t + 1) - begin);
            }
        });
    }

    static void * tile_at(char * work, int64_t column, int64_t blocks) {
        return work + pt2_tile_size((int) column, blocks);
    }

    // This thread's share of all tiles' blocks.
    static void quantize(const multiplication & product, const ggml_compute_params * params, char * work) {
        const int64_t total = product.columns * product.blocks;
        const int64_t begin = total * params->ith / params->nth;
        const int64_t end = total * (params->ith + 1) / params->nth;
        for (int64_t matrix = 0; matrix < product.matrices; ++matrix) {
            each_tile(product, matrix, [&](int64_t first, int n) {
                // A tile's blocks are as much work as it has columns.
                const auto share = [&](int64_t limit) {
                    return std::clamp<int64_t>((limit - first * product.blocks) / n, 0, product.blocks);
                };
                if (share(begin) < share(end)) {
                    const float * x[PT2_TILE_COLUMNS_MAX];
                    for (int i = 0; i < n; ++i) {
                        x[i] = product.at(first + i).x;
                    }
                    void * tile = tile_at(work, first, product.blocks);
                    pt2_tile_quantize(x, product.perm, n, share(begin), share(end), tile);
                }
            });
        }
    }

    static void multiply_chunk(const multiplication & product, const plan & cut, int64_t chunk, char * work,
                               block_panel * scratch) {
        const int64_t matrix = chunk / cut.chunks;
        if (product.first_column(matrix) == product.first_column(matrix + 1)) {
            return; // an expert that no token asks for
        }
        const int64_t first_panel = chunk % cut.chunks * cut.chunk_panels;
        const int64_t last_panel = std::min(first_panel + cut.chunk_panels, panels_of(product.rows));
        const int64_t first_row = first_panel * PT2_PANEL_ROWS;
        const int64_t rows = std::min(last_panel * PT2_PANEL_ROWS, product.rows) - first_row;

        const block_panel * panels;
        if (is_interleaved(product.weights)) {
            const int64_t before = matrix * panels_of(product.rows) + first_panel;
            panels = (const block_panel *) product.weights->data + before * product.blocks;
        } else {
            const size_t row_size = product.weights->nb[1];
            const char * data = product.matrix(matrix) + first_row * row_size;
            for (int64_t row = 0; row < rows; row += PT2_PANEL_ROWS) {
                pt2_panel_from_rows(product.weights->type, data + row * row_size, row_size,
                                    (int) std::min<int64_t>(PT2_PANEL_ROWS, rows - row), product.blocks,
                                    scratch + row / PT2_PANEL_ROWS * product.blocks);
            }
            panels = scratch;
        }

        each_strip(product, matrix, [&](int64_t first, int n) {
            float * out[PT2_STRIP_COLUMNS];
            for (int i = 0; i < n; ++i) {
                out[i] = product.at(first + i).out + first_row;
            }
            pt2_panels_dot(panels, rows, tile_at(work, first, product.blocks), n, product.blocks, out);
        });
    }
};

// Products of the same activations -----------------------------------------------------------------

// Whether a's activations, cut into tiles, are b's.
bool belong_together(const ggml_tensor * a, const ggml_tensor * b) {
    return pt2_is_product(b) && pt2_same_activations(a, b) && a->src[0]->ne[2] == b->src[0]->ne[2] &&
           a->src[0]->ne[3] == b->src[0]->ne[3];
}

// Buffers of panels --------------------------------------------------------------------------------

class panel_buffer_type : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor * weights = op->src[0];
        const ggml_tensor * x = op->src[1];
        return (op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID) && is_interleaved(weights) &&
               ggml_pt2_is_ternary(weights->type) && weights->ne[1] % PT2_PANEL_ROWS == 0 &&
               ggml_is_contiguous(weights) && weights->view_offs == 0 && x->type == GGML_TYPE_F32 &&
               (!x->buffer || ggml_backend_buft_is_host(x->buffer->buft));
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        static mul_mat traits;
        const bool multiplies = op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID;
        return multiplies && ggml_pt2_is_ternary(op->src[0]->type) ? &traits : nullptr;
    }
};

// The column permutations of the weights are in their buffer, too.
void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    if (!ggml_pt2_is_ternary(tensor->type)) {
        memcpy((char *) tensor->data + offset, data, size);
        return;
    }
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor));
    const int64_t blocks = tensor->ne[0] / QK_PT2;
    const size_t row_size = ggml_row_size(tensor->type, tensor->ne[0]);
    for (int64_t panel = 0; panel < ggml_nrows(tensor) / PT2_PANEL_ROWS; ++panel) {
        pt2_panel_from_rows(tensor->type, (const char *) data + panel * PT2_PANEL_ROWS * row_size, row_size,
                            PT2_PANEL_ROWS, blocks, (block_panel *) tensor->data + panel * blocks);
    }
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    GGML_ASSERT(!ggml_pt2_is_ternary(tensor->type) && "panels cannot be read back");
    memcpy(data, (const char *) tensor->data + offset, size);
}

const char * get_name(ggml_backend_buffer_type_t) {
    return "CPU_PT2";
}

// Processors do not prefetch beyond a page, and decoding reads all of the weights for each token.
void use_huge_pages(void * base, size_t size) {
#if defined(__linux__)
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t start = ((uintptr_t) base + page - 1) & ~(page - 1);
    const uintptr_t end = ((uintptr_t) base + size) & ~(page - 1);
    if (start < end) {
        madvise((void *) start, end - start, MADV_HUGEPAGE); // a wish
    }
#else
    GGML_UNUSED(base);
    GGML_UNUSED(size);
#endif
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        use_huge_pages(ggml_backend_buffer_get_base(buffer), size);
        buffer->buft = buft;
        buffer->iface.set_tensor = set_tensor;
        buffer->iface.get_tensor = get_tensor;
        buffer->iface.cpy_tensor = nullptr;
    }
    return buffer;
}

size_t get_alignment(ggml_backend_buffer_type_t) {
    return ALIGNMENT;
}

// Also TQ1_1 has two bits for a digit here.
size_t get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    if (!ggml_pt2_is_ternary(tensor->type)) {
        return ggml_nbytes(tensor);
    }
    return ggml_nelements(tensor) / QK_PT2 * sizeof(block_tq2_1);
}

} // namespace

ggml_backend_buffer_type_t ggml_backend_cpu_pt2_buffer_type(void) {
    static panel_buffer_type context;
    static ggml_backend_buffer_type type = {
        /* .iface   = */ { get_name, alloc_buffer, get_alignment, /* get_max_size */ nullptr, get_alloc_size,
                           /* is_host */ nullptr },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ &context,
    };
    return &type;
}

int ggml_pt2_mul_mat_group(const ggml_compute_params * params, const ggml_cgraph * cgraph, int first) {
    ggml_tensor * ops[GROUP] = { cgraph->nodes[first] };
    if (!pt2_is_product(ops[0])) {
        return 0;
    }
    int n = 1;
    int last = first;
    for (int i = first + 1; i < cgraph->n_nodes && n < GROUP; ++i) {
        ggml_tensor * node = cgraph->nodes[i];
        if (ggml_op_is_empty(node->op)) {
            continue;
        }
        const auto in_the_way = [node](const ggml_tensor * other) { return pt2_overlap(node, other); };
        if (!belong_together(ops[0], node) || std::any_of(ops, ops + n, in_the_way)) {
            break;
        }
        ops[n++] = node;
        last = i;
    }
    if (n > 1) {
        mul_mat::multiply(params, ops, n);
    }
    return last - first;
}
