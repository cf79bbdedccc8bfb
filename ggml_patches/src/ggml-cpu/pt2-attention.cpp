// See pt2-attention.h. Tiles of queries meet tiles of keys: scores = keys * queries^T, whose lanes are queries, so that
// softmax needs no sums across lanes; results = scores^T * values. Nothing is transposed but the queries and, where
// it hides some keys and not others, the mask.
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

constexpr int QUERIES = GGML_FA_TILE_Q;
constexpr int KEYS = GGML_FA_TILE_KV;
constexpr int ROWS = 4; // of a product, worked on at a time, over WIDE registers
constexpr int WIDE = LANES == 8 ? 2 : 4;

static_assert(QUERIES % (WIDE * LANES) == 0 && KEYS % LANES == 0 && KEYS % ROWS == 0, "tiles are whole registers");

// c = c * factors (one for each row; 0 if there are none) + a * b, of ROWS rows and COLUMNS registers. Element (r, k)
// of a lies at r * row + k * step; c and b have rows of `width`.
template <int COLUMNS>
ALWAYS_INLINE void multiply_some(float * c, const float * factors, const float * a, int row, int step, const float * b,
                                 int width, int depth) {
    floats sum[ROWS][COLUMNS];
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
        UNROLL
        for (int i = 0; i < COLUMNS; ++i) {
            sum[r][i] = factors ? multiply(load(c + r * width + i * LANES), broadcast(factors[r])) : broadcast(0);
        }
    }
    for (int k = 0; k < depth; ++k) {
        floats of_b[COLUMNS];
        UNROLL
        for (int i = 0; i < COLUMNS; ++i) {
            of_b[i] = load(b + (size_t) k * width + i * LANES);
            KEEP(of_b[i]);
        }
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
            floats of_a = broadcast(a[r * row + k * step]);
            UNROLL
            for (int i = 0; i < COLUMNS; ++i) {
                sum[r][i] = multiply_add(of_a, of_b[i], sum[r][i]);
            }
        }
    }
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
        UNROLL
        for (int i = 0; i < COLUMNS; ++i) {
            store(c + r * width + i * LANES, sum[r][i]);
        }
    }
}

// The same of `rows` rows, a multiple of ROWS or rounded up to one, and `width` columns.
ALWAYS_INLINE void multiply_all(float * c, const float * factors, const float * a, int row, int step, const float * b,
                                int rows, int width, int depth) {
    for (int r = 0; r < rows; r += ROWS) {
        float * to = c + r * width;
        const float * scale = factors ? factors + r : nullptr;
        const float * from = a + r * row;
        int i = 0;
        for (; i + WIDE * LANES <= width; i += WIDE * LANES) {
            multiply_some<WIDE>(to + i, scale, from, row, step, b + i, width, depth);
        }
        for (; i < width; i += LANES) {
            multiply_some<1>(to + i, scale, from, row, step, b + i, width, depth);
        }
    }
}

// Rows of keys or values as floats.
void widen(float * to, const char * from, size_t stride, ggml_type type, int rows, int length) {
    for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < length; i += LANES) {
            store(to + r * length + i, type == GGML_TYPE_F16 ? from_half((const ggml_fp16_t *) (from + r * stride) + i)
                                                             : load((const float *) (from + r * stride) + i));
        }
    }
}

// to[i][q] = scale * queries[q][i]; 0 for queries from `rows` on.
void transpose_queries(float * to, const char * queries, size_t stride, float scale, int rows, int length) {
    for (int q = 0; q < QUERIES; q += LANES) {
        for (int i = 0; i < length; i += LANES) {
            floats block[LANES];
            for (int r = 0; r < LANES; ++r) {
                block[r] = q + r < rows
                               ? multiply(load((const float *) (queries + (q + r) * stride) + i), broadcast(scale))
                               : broadcast(0);
            }
            transpose(block);
            for (int r = 0; r < LANES; ++r) {
                store(to + (i + r) * QUERIES + q, block[r]);
            }
        }
    }
}

enum class view { NOTHING, SOME, ALL };

// What a mask leaves to see of some keys.
view seen(const char * mask, size_t stride, int rows, int keys) {
    constexpr uint16_t HIDDEN = 0xfc00; // minus infinity
    uint16_t not_hidden = 0;
    uint16_t not_zero = 0;
    for (int r = 0; r < rows; ++r) {
        const uint16_t * row = (const uint16_t *) (mask + r * stride);
        for (int k = 0; k < keys; ++k) {
            not_hidden |= row[k] ^ HIDDEN;
            not_zero |= row[k];
        }
    }
    return not_hidden == 0 ? view::NOTHING : not_zero == 0 ? view::ALL : view::SOME;
}

// scores[k][q] += slope * mask[q][k]
void add_mask(float * scores, const char * mask, size_t stride, float slope, int rows, int keys) {
    for (int q = 0; q < rows; q += LANES) {
        for (int k = 0; k < keys; k += LANES) {
            floats block[LANES];
            const int width = std::min(LANES, keys - k);
            for (int r = 0; r < LANES; ++r) {
                ggml_fp16_t some[LANES] = {};
                if (q + r < rows) {
                    memcpy(some, (const ggml_fp16_t *) (mask + (q + r) * stride) + k, width * sizeof(some[0]));
                }
                block[r] = from_half(some);
            }
            transpose(block);
            for (int i = 0; i < width; ++i) {
                float * row = scores + (k + i) * QUERIES + q;
                store(row, multiply_add(broadcast(slope), block[i], load(row)));
            }
        }
    }
}

// What is known of a tile of queries before the next keys.
struct running {
    float top[QUERIES];     // the largest score; finite, so that scores of minus infinity weigh nothing
    float sum[QUERIES];     // of weights exp(score - top)
    float factors[QUERIES]; // by which the weights of the keys before the last ones have shrunk
};

// Scores become weights.
void soften(float * scores, running & state, int keys) {
    for (int q = 0; q < QUERIES; q += LANES) {
        const floats before = load(state.top + q);
        floats top = before;
        for (int k = 0; k < keys; ++k) {
            top = larger(top, load(scores + k * QUERIES + q));
        }
        const floats factor = ggml_v_expf(subtract(before, top));
        floats sum = multiply(load(state.sum + q), factor);
        for (int k = 0; k < keys; ++k) {
            const floats weight = ggml_v_expf(subtract(load(scores + k * QUERIES + q), top));
            store(scores + k * QUERIES + q, weight);
            sum = add(sum, weight);
        }
        store(state.top + q, top);
        store(state.sum + q, sum);
        store(state.factors + q, factor);
    }
}

// The slope of ALiBi (as in ggml_compute_forward_flash_attn_ext_tiled).
float alibi_slope(float max_bias, int head, int heads) {
    if (max_bias <= 0) {
        return 1;
    }
    const int power = 1 << (int) floorf(log2f((float) heads));
    return head < power ? powf(powf(2, -max_bias / power), (float) (head + 1))
                        : powf(powf(2, -max_bias / 2 / power), (float) (2 * (head - power) + 1));
}

} // namespace

bool pt2_flash_attn_tiled(const ggml_compute_params * params, ggml_tensor * dst, int ir0, int ir1) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];

    const int key_length = (int) k->ne[0];
    const int value_length = (int) v->ne[0];
    if (key_length % LANES != 0 || value_length % LANES != 0) {
        return false;
    }
    const int queries = (int) q->ne[1];
    const int heads = (int) q->ne[2];
    const int keys = (int) k->ne[1];

    float scale, max_bias, softcap;
    memcpy(&scale, dst->op_params + 0, sizeof(float));
    memcpy(&max_bias, dst->op_params + 1, sizeof(float));
    memcpy(&softcap, dst->op_params + 2, sizeof(float));
    if (softcap != 0) {
        scale /= softcap;
    }

    // Less than llama.cpp's own tiles take, which the plan has set aside.
    const size_t scratch =
        QUERIES * (key_length + value_length) + 2 * QUERIES * KEYS + KEYS * (key_length + value_length);
    float * across = (float *) params->wdata + params->ith * (scratch + CACHE_LINE_SIZE_F32);
    float * scores = across + QUERIES * key_length;
    float * results = scores + KEYS * QUERIES;
    float * wide = results + QUERIES * value_length; // keys, then values

    for (int ir = ir0; ir < ir1;) {
        const int query = ir % queries;
        const int head = ir / queries % heads;
        const int64_t sequence = ir / queries / heads;
        const int rows = std::min({ QUERIES, ir1 - ir, queries - query });
        const float slope = alibi_slope(max_bias, head, heads);

        const char * of_q = (const char *) q->data + query * q->nb[1] + head * q->nb[2] + sequence * q->nb[3];
        const char * of_k =
            (const char *) k->data + head / (heads / k->ne[2]) * k->nb[2] + sequence / (q->ne[3] / k->ne[3]) * k->nb[3];
        const char * of_v =
            (const char *) v->data + head / (heads / v->ne[2]) * v->nb[2] + sequence / (q->ne[3] / v->ne[3]) * v->nb[3];
        const char * of_mask = mask ? (const char *) mask->data + query * mask->nb[1] +
                                          head % mask->ne[2] * mask->nb[2] + sequence % mask->ne[3] * mask->nb[3]
                                    : nullptr;

        running state;
        std::fill_n(state.top, QUERIES, -FLT_MAX);
        std::fill_n(state.sum, QUERIES, 0.0f);
        memset(results, 0, QUERIES * value_length * sizeof(float));
        transpose_queries(across, of_q, q->nb[1], scale, rows, key_length);

        for (int first = 0; first < keys; first += KEYS) {
            const int count = std::min(KEYS, keys - first);
            const char * some_mask = mask ? of_mask + first * sizeof(ggml_fp16_t) : nullptr;
            const view left = mask ? seen(some_mask, mask->nb[1], rows, count) : view::ALL;
            if (left == view::NOTHING) {
                continue;
            }
            widen(wide, of_k + first * k->nb[1], k->nb[1], k->type, count, key_length);
            multiply_all(scores, nullptr, wide, key_length, 1, across, count, QUERIES, key_length);
            if (softcap != 0) {
                ggml_vec_tanh_f32(count * QUERIES, scores, scores);
                ggml_vec_scale_f32(count * QUERIES, scores, softcap);
            }
            if (left == view::SOME) {
                add_mask(scores, some_mask, mask->nb[1], slope, rows, count);
            }
            soften(scores, state, count);
            widen(wide, of_v + first * v->nb[1], v->nb[1], v->type, count, value_length);
            multiply_all(results, state.factors, scores, 1, QUERIES, wide, rows, value_length, count);
        }

        for (int r = 0; r < rows; ++r) {
            float sum = state.sum[r];
            float factor = 1;
            if (sinks) {
                const float sink = ((const float *) sinks->data)[head];
                const float top = std::max(state.top[r], sink);
                factor = expf(state.top[r] - top);
                sum = sum * factor + expf(sink - top);
            }
            float * row = results + r * value_length;
            ggml_vec_scale_f32(value_length, row, sum == 0 ? 0 : factor / sum);
            memcpy((char *) dst->data + ((sequence * queries + query + r) * heads + head) * dst->nb[1], row,
                   value_length * sizeof(float));
        }
        ir += rows;
    }
    return true;
}

#else

bool pt2_flash_attn_tiled(const ggml_compute_params *, ggml_tensor *, int, int) {
    return false;
}

#endif
