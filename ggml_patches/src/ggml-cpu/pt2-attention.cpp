// See pt2-attention.h. Tiles of rows (queries of the heads that share keys and values) meet tiles of keys: scores =
// keys * queries^T, whose lanes are rows, so that softmax needs no sums across lanes; results = scores^T * values.
// Nothing is transposed but the queries and, where it hides some keys and not others, the mask. Of so few rows that
// most lanes would be empty, each is multiplied with each key.
#include "pt2-attention.h"

#include "common.h"
#include "ggml-cpu-impl.h"
#include "ops.h"
#include "pt2-simd.h"
#include "vec.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

// pt2-simd.h has vectors, and vec.h an exponential function of them.
#if !(defined(PT2_PLAIN) || defined(__ARM_FEATURE_SVE) || (defined(__AVX512F__) && !defined(__AVX512VNNI__)))

namespace {

constexpr int ROWS = GGML_FA_TILE_Q; // of a tile, at most; llama.cpp has set aside scratch memory for so many
constexpr int KEYS = GGML_FA_TILE_KV;
constexpr int FEW_ROWS = 16; // as small as tiles become to have some for all threads
constexpr int WIDE = LANES == 8 ? 2 : 4;
constexpr int HALF = LANES / 2; // with so many rows or fewer, lanes are elements of keys and queries instead
constexpr int FEWEST_ROWS = LANES == 4 ? 3 : 1; // llama.cpp keeps fewer on NEON, where they were not timed

static_assert(ROWS % (WIDE * LANES) == 0 && FEW_ROWS % LANES == 0 && KEYS % LANES == 0 && KEYS % 8 == 0,
              "tiles are whole registers");

// Products ---------------------------------------------------------------------------------------------

// The matrices of c = c * factors (one for each row; 0 if there are none) + a * b.
struct product {
    float * c;
    const float * factors;
    const float * a;
    int row, step; // element (r, k) of a lies at r * row + k * step
    const float * b;
    int width; // of a row of c and b
    int depth;
};

// R rows from r on, of I registers from column `first` on.
template <int R, int I> ALWAYS_INLINE void multiply_some(const product & p, int r, int first) {
    float * c = p.c + r * p.width + first;
    floats sum[R][I];
    UNROLL
    for (int j = 0; j < R; ++j) {
        UNROLL
        for (int i = 0; i < I; ++i) {
            sum[j][i] =
                p.factors ? multiply(load(c + j * p.width + i * LANES), broadcast(p.factors[r + j])) : broadcast(0);
        }
    }
    const float * a = p.a + r * p.row;
    const float * b = p.b + first;
    for (int k = 0; k < p.depth; ++k, a += p.step, b += p.width) {
        floats of_b[I];
        UNROLL
        for (int i = 0; i < I; ++i) {
            floats some = load(b + i * LANES);
            KEEP(some);
            of_b[i] = some;
        }
        UNROLL
        for (int j = 0; j < R; ++j) {
            const floats of_a = broadcast(a[j * p.row]);
            UNROLL
            for (int i = 0; i < I; ++i) {
                sum[j][i] = multiply_add(of_a, of_b[i], sum[j][i]);
            }
        }
    }
    UNROLL
    for (int j = 0; j < R; ++j) {
        UNROLL
        for (int i = 0; i < I; ++i) {
            store(c + j * p.width + i * LANES, sum[j][i]);
        }
    }
}

// So many rows, rounded up to 8, and columns, rounded up to LANES.
ALWAYS_INLINE void multiply_all(const product & p, int rows, int columns) {
    int first = 0;
    for (; first + WIDE * LANES <= columns; first += WIDE * LANES) {
        for (int r = 0; r < rows; r += 4) {
            multiply_some<4, WIDE>(p, r, first);
        }
    }
    for (; first < columns; first += LANES) {
        for (int r = 0; r < rows; r += 8) { // as many sums as it takes to not wait for them
            multiply_some<8, 1>(p, r, first);
        }
    }
}

// Tiles ------------------------------------------------------------------------------------------------

// Rows of results, whose queries see the same keys and values.
struct tile {
    int rows;
    const float * query[ROWS];
    const ggml_fp16_t * mask[ROWS];
    float slope[ROWS]; // of the mask
    int head[ROWS];
    float * result[ROWS];
    // What is known of the keys so far:
    float top[ROWS];     // the largest score; finite, so that scores of minus infinity weigh nothing
    float sum[ROWS];     // of the weights exp(score - top)
    float factors[ROWS]; // by which earlier weights have shrunk since the last keys
};

// to[i][r] = scale * query r[i]; 0 for rows up to the next multiple of LANES.
void transpose_queries(float * to, const tile & t, float scale, int length) {
    for (int r = 0; r < t.rows; r += LANES) {
        for (int i = 0; i < length; i += LANES) {
            floats block[LANES];
            for (int j = 0; j < LANES; ++j) {
                block[j] = r + j < t.rows ? multiply(load(t.query[r + j] + i), broadcast(scale)) : broadcast(0);
            }
            transpose(block);
            for (int j = 0; j < LANES; ++j) {
                store(to + (i + j) * ROWS + r, block[j]);
            }
        }
    }
}

// to[r][i] = scale * query r[i]; 0 for rows up to HALF.
void copy_queries(float * to, const tile & t, float scale, int length) {
    for (int r = 0; r < HALF; ++r) {
        for (int i = 0; i < length; i += LANES) {
            store(to + r * length + i, r < t.rows ? multiply(load(t.query[r] + i), broadcast(scale)) : broadcast(0));
        }
    }
}

// Some keys, or their values.
struct matrix {
    const char * data;
    size_t stride; // bytes from row to row
    ggml_type type;
    int length; // of a row

    matrix from(int64_t row) const {
        return { data + row * stride, stride, type, length };
    }

    size_t row_size() const {
        return length * (type == GGML_TYPE_F16 ? sizeof(ggml_fp16_t) : sizeof(float));
    }

    // Elements i, ..., i + LANES - 1.
    floats at(int64_t row, int i) const {
        const char * from = data + row * stride;
        return type == GGML_TYPE_F16 ? from_half((const ggml_fp16_t *) from + i) : load((const float *) from + i);
    }

    // Processors do not prefetch rows that lie apart.
    void prefetch_row(int64_t row) const {
        prefetch<L2>(data, row * stride, row * stride + row_size());
    }
};

// Rows as floats; asks for as many rows of what is needed next.
void widen(float * to, const matrix & m, int rows, const matrix & next) {
    for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < m.length; i += LANES) {
            store(to + r * m.length + i, m.at(r, i));
        }
        next.prefetch_row(r);
    }
}

// scores[k][r] = key k * query r, for so many queries; asks for as many rows of what is needed next.
template <int Q>
void multiply_few(float * scores, const matrix & keys, const float * queries, int count, const matrix & next) {
    constexpr int AT_ONCE = LANES / Q; // keys
    for (int k = 0; k < count; k += AT_ONCE) {
        floats sum[LANES]; // of key k + j and query r: j * Q + r
        UNROLL
        for (int i = 0; i < LANES; ++i) {
            sum[i] = broadcast(0);
        }
        for (int i = 0; i < keys.length; i += LANES) {
            floats of_key[AT_ONCE];
            UNROLL
            for (int j = 0; j < AT_ONCE; ++j) {
                of_key[j] = keys.at(std::min(k + j, count - 1), i);
            }
            UNROLL
            for (int r = 0; r < Q; ++r) {
                const floats of_query = load(queries + r * keys.length + i);
                UNROLL
                for (int j = 0; j < AT_ONCE; ++j) {
                    sum[j * Q + r] = multiply_add(of_query, of_key[j], sum[j * Q + r]);
                }
            }
        }
        transpose(sum);
        UNROLL
        for (int i = 1; i < LANES; ++i) {
            sum[0] = add(sum[0], sum[i]);
        }
        float products[LANES];
        store(products, sum[0]);
        for (int j = 0; j < AT_ONCE; ++j) {
            std::copy_n(products + j * Q, Q, scores + (k + j) * ROWS);
            next.prefetch_row(k + j);
        }
    }
}

// What the mask leaves to see of some keys: the first few, and all of them for all rows if it is plain.
struct view {
    int keys;
    bool plain;
};

view seen(const tile & t, int first, int keys) {
    constexpr uint16_t HIDDEN = 0xfc00; // minus infinity
    uint16_t not_hidden[KEYS] = {};
    uint16_t not_zero[KEYS] = {};
    for (int r = 0; r < t.rows; ++r) {
        if (r > 0 && t.mask[r] == t.mask[r - 1]) {
            continue;
        }
        const uint16_t * row = (const uint16_t *) t.mask[r] + first;
        for (int k = 0; k < keys; ++k) {
            not_hidden[k] |= row[k] ^ HIDDEN;
            not_zero[k] |= row[k];
        }
    }
    while (keys > 0 && not_hidden[keys - 1] == 0) {
        --keys;
    }
    return { keys, std::all_of(not_zero, not_zero + keys, [](uint16_t bits) { return bits == 0; }) };
}

// scores[k][r] += slope * mask[r][k]
void add_mask(float * scores, const tile & t, int first, int keys) {
    for (int r = 0; r < t.rows; r += LANES) {
        const floats slope = load(t.slope + r);
        for (int k = 0; k < keys; k += LANES) {
            floats block[LANES];
            const int width = std::min(LANES, keys - k);
            for (int j = 0; j < LANES; ++j) {
                ggml_fp16_t some[LANES] = {};
                if (r + j < t.rows) {
                    memcpy(some, t.mask[r + j] + first + k, width * sizeof(some[0]));
                }
                block[j] = from_half(some);
            }
            transpose(block);
            for (int i = 0; i < width; ++i) {
                float * row = scores + (k + i) * ROWS + r;
                store(row, multiply_add(slope, block[i], load(row)));
            }
        }
    }
}

// Scores become weights.
void soften(float * scores, tile & t, int keys) {
    for (int r = 0; r < t.rows; r += LANES) {
        const floats before = load(t.top + r);
        floats top = before;
        for (int k = 0; k < keys; ++k) {
            top = larger(top, load(scores + k * ROWS + r));
        }
        const floats factor = ggml_v_expf(subtract(before, top));
        floats sum = multiply(load(t.sum + r), factor);
        for (int k = 0; k < keys; ++k) {
            const floats weight = ggml_v_expf(subtract(load(scores + k * ROWS + r), top));
            store(scores + k * ROWS + r, weight);
            sum = add(sum, weight);
        }
        store(t.top + r, top);
        store(t.sum + r, sum);
        store(t.factors + r, factor);
    }
}

// The operation ----------------------------------------------------------------------------------------

class attention {
public:
    explicit attention(const ggml_tensor * dst)
        : dst(dst), q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), mask(dst->src[3]), sinks(dst->src[4]) {
        key_length = (int) k->ne[0];
        value_length = (int) v->ne[0];
        shared_by = (int) (q->ne[2] / k->ne[2]);
        rows = q->ne[1] * shared_by;
        groups = k->ne[2] * q->ne[3];
    }

    bool is_for_tiles() const {
        return q->type == GGML_TYPE_F32 && (k->type == GGML_TYPE_F16 || k->type == GGML_TYPE_F32) &&
               v->type == k->type && k->ne[2] == v->ne[2] && key_length % LANES == 0 && value_length % LANES == 0 &&
               rows >= FEWEST_ROWS;
    }

    int64_t all_rows() const {
        return groups * rows;
    }

    // Rows of a tile such that all threads get some, if there are enough.
    int64_t tile_rows(int threads) const {
        int64_t most = ROWS;
        while (most > FEW_ROWS && tiles(most) < 4 * threads) {
            most /= 2;
        }
        return most;
    }

    int64_t tiles(int64_t most_rows) const {
        return groups * tiles_of_group(most_rows);
    }

    void compute(int64_t number, int64_t most_rows, float * scratch) const {
        const int64_t group = number / tiles_of_group(most_rows);
        const int64_t first_row = number % tiles_of_group(most_rows) * most_rows;
        tile t{};
        t.rows = (int) std::min(most_rows, rows - first_row);
        for (int r = 0; r < t.rows; ++r) {
            set_row(t, r, group, first_row + r);
        }
        attend(t, group, scratch);
    }

private:
    const ggml_tensor *dst, *q, *k, *v, *mask, *sinks;
    int key_length, value_length;
    int shared_by;  // heads for each head of keys and values
    int64_t rows;   // queries of those heads
    int64_t groups; // heads of keys and values, in all sequences

    int64_t tiles_of_group(int64_t most_rows) const {
        return (rows + most_rows - 1) / most_rows;
    }

    float parameter(int i) const {
        float value;
        memcpy(&value, dst->op_params + i, sizeof(value));
        return value;
    }

    // Of ALiBi, as in ggml_compute_forward_flash_attn_ext_tiled.
    float slope(int head) const {
        const float max_bias = parameter(1);
        if (max_bias <= 0) {
            return 1;
        }
        const int power = 1 << (int) floorf(log2f((float) q->ne[2]));
        return head < power ? powf(powf(2, -max_bias / power), (float) (head + 1))
                            : powf(powf(2, -max_bias / 2 / power), (float) (2 * (head - power) + 1));
    }

    void set_row(tile & t, int r, int64_t group, int64_t row) const {
        const int64_t sequence = group / k->ne[2];
        // All heads of a query follow each other, so that the queries of a tile see nearly the same keys.
        const int64_t head = group % k->ne[2] * shared_by + row % shared_by;
        const int64_t query = row / shared_by;
        t.query[r] =
            (const float *) ((const char *) q->data + query * q->nb[1] + head * q->nb[2] + sequence * q->nb[3]);
        if (mask) {
            t.mask[r] = (const ggml_fp16_t *) ((const char *) mask->data + query * mask->nb[1] +
                                               head % mask->ne[2] * mask->nb[2] + sequence % mask->ne[3] * mask->nb[3]);
        }
        t.slope[r] = slope((int) head);
        t.head[r] = (int) head;
        t.result[r] = (float *) ((char *) dst->data + ((sequence * q->ne[1] + query) * q->ne[2] + head) * dst->nb[1]);
        t.top[r] = -FLT_MAX;
    }

    void attend(tile & t, int64_t group, float * scratch) const {
        float * queries = (float *) (((uintptr_t) scratch + LINE - 1) / LINE * LINE);
        float * scores = queries + ROWS * key_length;
        float * results = scores + KEYS * ROWS;
        float * wide = results + ROWS * value_length; // keys, then values

        const int64_t head = group % k->ne[2];
        const int64_t sequence = group / k->ne[2];
        const matrix keys{ (const char *) k->data + head * k->nb[2] + sequence / (q->ne[3] / k->ne[3]) * k->nb[3],
                           k->nb[1], k->type, key_length };
        const matrix values{ (const char *) v->data + head * v->nb[2] + sequence / (q->ne[3] / v->ne[3]) * v->nb[3],
                             v->nb[1], v->type, value_length };
        const float cap = parameter(2);

        const float scale = cap != 0 ? parameter(0) / cap : parameter(0);
        const bool few = t.rows <= HALF;
        if (few) {
            copy_queries(queries, t, scale, key_length);
            std::fill_n(scores, KEYS * ROWS, 0.0f); // lanes without a query are weighed, too
        } else {
            transpose_queries(queries, t, scale, key_length);
        }
        std::fill_n(results, ROWS * value_length, 0.0f);
        for (int64_t first = 0; first < k->ne[1]; first += KEYS) {
            const int all = (int) std::min<int64_t>(KEYS, k->ne[1] - first);
            const view left = mask ? seen(t, (int) first, all) : view{ all, true };
            const int count = left.keys;
            if (count == 0) {
                continue;
            }
            if (few) {
                const auto multiply_these = t.rows <= HALF / 2 ? multiply_few<HALF / 2> : multiply_few<HALF>;
                multiply_these(scores, keys.from(first), queries, count, values.from(first));
            } else {
                widen(wide, keys.from(first), count, values.from(first));
                multiply_all({ scores, nullptr, wide, key_length, 1, queries, ROWS, key_length }, count, t.rows);
            }
            for (int key = 0; key < count && cap != 0; ++key) {
                ggml_vec_tanh_f32(t.rows, scores + key * ROWS, scores + key * ROWS);
                ggml_vec_scale_f32(t.rows, scores + key * ROWS, cap);
            }
            if (!left.plain) {
                add_mask(scores, t, (int) first, count);
            }
            soften(scores, t, count);
            widen(wide, values.from(first), count, keys.from(first + KEYS));
            multiply_all({ results, t.factors, scores, 1, ROWS, wide, value_length, count }, t.rows, value_length);
        }
        for (int r = 0; r < t.rows; ++r) {
            float sum = t.sum[r];
            float factor = 1;
            if (sinks) {
                const float sink = ((const float *) sinks->data)[t.head[r]];
                const float top = std::max(t.top[r], sink);
                factor = expf(t.top[r] - top);
                sum = sum * factor + expf(sink - top);
            }
            memcpy(t.result[r], results + r * value_length, value_length * sizeof(float));
            ggml_vec_scale_f32(value_length, t.result[r], sum == 0 ? 0 : factor / sum);
        }
    }
};

} // namespace

bool pt2_flash_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    const attention op(dst);
    if (!op.is_for_tiles()) {
        return false;
    }
    const int64_t most_rows = op.tile_rows(params->nth);
    // One query and many threads: llama.cpp has all threads work, on parts of the keys.
    if (dst->src[0]->ne[1] == 1 && op.all_rows() < 2 * params->nth) {
        return false;
    }
    // As ggml_graph_plan counts what a thread has of its own for llama.cpp's tiles, which is more than these need.
    const int64_t lengths = dst->src[1]->ne[0] + dst->src[2]->ne[0];
    const int64_t scratch = (ROWS + KEYS) * lengths + 2 * ROWS * KEYS + (int64_t) CACHE_LINE_SIZE_F32;

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = params->ith; i < op.tiles(most_rows); i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        op.compute(i, most_rows, (float *) params->wdata + params->ith * scratch);
    }
    return true;
}

#else

bool pt2_flash_attn(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
