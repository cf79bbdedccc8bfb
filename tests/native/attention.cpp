// Attention in tiles on hand-made tensors, compared with float64; says so where the instruction set has none.
#include "common.h"
#include "ggml-cpu-impl.h"
#include "ops.h"
#include "pt2-attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

// Threads, one after the other: the first takes all work but what the others begin with.
static int next_chunk;

void ggml_threadpool_chunk_set(ggml_threadpool *, int value) {
    next_chunk = value;
}

int ggml_threadpool_chunk_add(ggml_threadpool *, int value) {
    next_chunk += value;
    return next_chunk - value;
}

void ggml_barrier(ggml_threadpool *) {
}

static std::mt19937 rng(std::random_device{}());
static constexpr float INFINITE = std::numeric_limits<float>::infinity();

static float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(rng);
}

// How a mask hides keys from queries.
enum masking { NONE, CAUSAL, RANDOM, SOME_ROWS, UNUSED };

struct shape {
    int key_length;
    int value_length;
    int queries;
    int keys;
    int heads;
    int shared_by; // heads for each head of keys and values
    masking hides;
    ggml_type type = GGML_TYPE_F16; // of keys and values
    float spread = 1;               // of queries
    float max_bias = 0;
    float softcap = 0;
    bool sinks = false;
    int sequences = 1;
    int masks = 1; // heads or sequences of the mask
    int threads = 1;

    std::string name() const {
        char text[256];
        snprintf(
            text, sizeof(text),
            "lengths %d %d queries %d keys %d heads %d/%d mask %d %s spread %g bias %g cap %g sinks %d sequences %d",
            key_length, value_length, queries, keys, heads, shared_by, hides, type == GGML_TYPE_F16 ? "f16" : "f32",
            spread, max_bias, softcap, sinks, sequences);
        return text;
    }
};

// A tensor with memory of its own; rows lie `stride` elements apart.
struct held {
    ggml_tensor tensor{};
    std::vector<uint8_t> data;

    held(ggml_type type, std::array<int64_t, 4> ne, int64_t stride) {
        const size_t size = type == GGML_TYPE_F16 ? 2 : 4;
        tensor.type = type;
        std::copy(ne.begin(), ne.end(), tensor.ne);
        tensor.nb[0] = size;
        tensor.nb[1] = size * stride;
        tensor.nb[2] = tensor.nb[1] * ne[1];
        tensor.nb[3] = tensor.nb[2] * ne[2];
        data.resize(tensor.nb[3] * ne[3]);
        tensor.data = data.data();
    }

    uint8_t * at(int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
        return data.data() + i0 * tensor.nb[0] + i1 * tensor.nb[1] + i2 * tensor.nb[2] + i3 * tensor.nb[3];
    }

    void set(float value, int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
        if (tensor.type == GGML_TYPE_F16) {
            *(ggml_fp16_t *) at(i0, i1, i2, i3) = GGML_COMPUTE_FP32_TO_FP16(value);
        } else {
            *(float *) at(i0, i1, i2, i3) = value;
        }
    }

    double get(int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
        return tensor.type == GGML_TYPE_F16 ? GGML_COMPUTE_FP16_TO_FP32(*(ggml_fp16_t *) at(i0, i1, i2, i3))
                                            : *(float *) at(i0, i1, i2, i3);
    }

    template <typename F> void fill(F && value) {
        for (int64_t i3 = 0; i3 < tensor.ne[3]; ++i3) {
            for (int64_t i2 = 0; i2 < tensor.ne[2]; ++i2) {
                for (int64_t i1 = 0; i1 < tensor.ne[1]; ++i1) {
                    for (int64_t i0 = 0; i0 < tensor.ne[0]; ++i0) {
                        set(value(i0, i1), i0, i1, i2, i3);
                    }
                }
            }
        }
    }
};

static float masked(const shape & s, int64_t key, int64_t query) {
    switch (s.hides) {
    case CAUSAL:
        return key <= query + s.keys - s.queries ? 0 : -INFINITE;
    case RANDOM:
        return uniform(0, 1) < 0.3f ? -INFINITE : uniform(-2, 0);
    case SOME_ROWS: // some queries see nothing
        return query % 3 == 0 || key < 70 ? -INFINITE : 0;
    case UNUSED: // the last keys, as of a cache that is not full
        return key < (s.keys + 2) / 3 ? 0 : -INFINITE;
    default:
        return 0;
    }
}

static void fail(const shape & s, const std::string & what) {
    fprintf(stderr, "%s: %s\n", s.name().c_str(), what.c_str());
    exit(1);
}

// False, with nothing computed, if the shape is refused.
static bool compare(const shape & s) {
    const int64_t heads = s.heads;
    const int64_t shared = heads / s.shared_by;
    held q(GGML_TYPE_F32, { s.key_length, s.queries, heads, s.sequences }, s.key_length + 4);
    held k(s.type, { s.key_length, s.keys, shared, s.sequences }, s.key_length + 8);
    held v(s.type, { s.value_length, s.keys, shared, s.sequences }, s.value_length + 8);
    held mask(GGML_TYPE_F16, { s.keys, s.queries, s.masks, s.masks }, s.keys);
    held sinks(GGML_TYPE_F32, { heads, 1, 1, 1 }, heads);
    held out(GGML_TYPE_F32, { s.value_length, heads, s.queries, s.sequences }, s.value_length);
    q.fill([&](int64_t, int64_t) { return uniform(-s.spread, s.spread); });
    k.fill([&](int64_t, int64_t) { return uniform(-1, 1); });
    v.fill([&](int64_t, int64_t) { return uniform(-1, 1); });
    sinks.fill([&](int64_t, int64_t) { return uniform(-3, 3); });
    mask.fill([&](int64_t key, int64_t query) { return masked(s, key, query); });
    out.fill([&](int64_t, int64_t) { return NAN; });

    ggml_tensor & op = out.tensor;
    op.src[0] = &q.tensor;
    op.src[1] = &k.tensor;
    op.src[2] = &v.tensor;
    op.src[3] = s.hides == NONE ? nullptr : &mask.tensor;
    op.src[4] = s.sinks ? &sinks.tensor : nullptr;
    const float scale = 1 / std::sqrt((float) s.key_length);
    const float parameters[3] = { scale, s.max_bias, s.softcap };
    memcpy(op.op_params, parameters, sizeof(parameters));

    // As in ggml_graph_plan; what is behind it must stay as it is.
    const size_t planned = s.threads * (size_t) ((GGML_FA_TILE_Q + GGML_FA_TILE_KV) * (s.key_length + s.value_length) +
                                                 2 * GGML_FA_TILE_Q * GGML_FA_TILE_KV + CACHE_LINE_SIZE_F32);
    std::vector<float> scratch(planned + 64, 1234);
    for (int thread = 0; thread < s.threads; ++thread) {
        ggml_compute_params params{};
        params.ith = thread;
        params.nth = s.threads;
        params.wdata = scratch.data();
        if (!pt2_flash_attn(&params, &op)) {
            return false;
        }
    }
    if (std::any_of(scratch.begin() + planned, scratch.end(), [](float x) { return x != 1234; })) {
        fail(s, "wrote behind its scratch memory");
    }

    const int power = 1 << (int) std::floor(std::log2(s.heads));
    for (int n = 0; n < s.sequences; ++n) {
        for (int h = 0; h < s.heads; ++h) {
            const double slope = s.max_bias <= 0 ? 1
                                 : h < power     ? std::pow(2, -s.max_bias * (h + 1) / power)
                                                 : std::pow(2, -s.max_bias / 2 * (2 * (h - power) + 1) / power);
            for (int i = 0; i < s.queries; ++i) {
                std::vector<double> scores(s.keys);
                double top = s.sinks ? sinks.get(h, 0, 0, 0) : -INFINITE;
                double reach = 0; // how large the terms of a score are
                for (int j = 0; j < s.keys; ++j) {
                    double sum = 0;
                    double terms = 0;
                    for (int d = 0; d < s.key_length; ++d) {
                        const double term = q.get(d, i, h, n) * k.get(d, j, h / s.shared_by, n);
                        sum += term;
                        terms += std::fabs(term);
                    }
                    sum *= scale;
                    if (s.softcap != 0) {
                        sum = s.softcap * std::tanh(sum / s.softcap);
                    }
                    const double hidden = s.hides == NONE ? 0 : slope * mask.get(j, i, h % s.masks, n % s.masks);
                    scores[j] = sum + hidden;
                    top = std::max(top, scores[j]);
                    if (std::isfinite(hidden)) {
                        reach = std::max(reach, terms * scale + std::fabs(hidden));
                    }
                }
                double weights = s.sinks ? std::exp(sinks.get(h, 0, 0, 0) - top) : 0;
                std::vector<double> sum(s.value_length);
                for (int j = 0; j < s.keys && std::isfinite(top); ++j) {
                    const double weight = std::exp(scores[j] - top);
                    weights += weight;
                    for (int d = 0; d < s.value_length; ++d) {
                        sum[d] += weight * v.get(d, j, h / s.shared_by, n);
                    }
                }
                // A score is off by no more than a rounding of each term, a weight by that and exp's two units, and
                // sums of weights by a rounding for each key. Values are below 1 in magnitude.
                const double unit = std::numeric_limits<float>::epsilon() / 2;
                const double score_error = unit * (s.key_length + 4) * reach;
                const double allowed = 2 * (score_error + unit * (4 + 2 * s.keys)) + unit;
                for (int d = 0; d < s.value_length; ++d) {
                    const double expected = weights == 0 ? 0 : sum[d] / weights;
                    const double found = out.get(d, h, i, n);
                    if (!(std::fabs(found - expected) <= allowed)) {
                        char text[256];
                        snprintf(text, sizeof(text), "query %d of head %d: %.9g instead of %.9g, allowed %.3g", i, h,
                                 found, expected, allowed);
                        fail(s, text);
                    }
                }
            }
        }
    }
    return true;
}

int main() {
    if (!compare({ 64, 64, 64, 64, 1, 1, NONE })) {
        printf("no vectors\n");
        return 0;
    }
    std::vector<shape> shapes;
    for (const masking hides : { NONE, CAUSAL, RANDOM, SOME_ROWS, UNUSED }) {
        shapes.push_back({ 64, 64, 64, 64, 2, 1, hides });
        shapes.push_back({ 64, 64, 130, 199, 4, 2, hides });
        shapes.push_back({ 128, 80, 75, 113, 3, 3, hides, GGML_TYPE_F32 });
        shapes.push_back({ 16, 32, 9, 1, 1, 1, hides });
        shapes.push_back({ 64, 128, 1, 300, 16, 8, hides });
        shapes.push_back({ 128, 64, 1, 201, 24, 4, hides });
        shapes.push_back({ 64, 64, 1, 90, 24, 3, hides, GGML_TYPE_F32 });
#if !defined(__ARM_NEON)
        shapes.push_back({ 128, 128, 1, 150, 20, 1, hides });
        shapes.push_back({ 64, 96, 1, 65, 20, 2, hides });
#endif
        shapes.push_back({ 96, 64, 5, 130, 14, 7, hides });
    }
    const int one_key_has_all = 100;
    shapes.push_back({ 64, 64, 100, 300, 2, 2, CAUSAL, GGML_TYPE_F16, one_key_has_all });
    shapes.push_back({ 96, 112, 70, 128, 3, 1, CAUSAL, GGML_TYPE_F16, 1, 8 });
    shapes.push_back({ 64, 64, 70, 128, 6, 1, RANDOM, GGML_TYPE_F16, 1, 8, 0, false, 2, 2 });
    shapes.push_back({ 64, 64, 7, 128, 6, 3, RANDOM, GGML_TYPE_F16, 1, 8, 0, false, 2, 2 });
    shapes.push_back({ 64, 64, 70, 128, 2, 1, CAUSAL, GGML_TYPE_F16, 10, 0, 2 });
    shapes.push_back({ 64, 64, 70, 128, 4, 2, SOME_ROWS, GGML_TYPE_F16, 1, 0, 0, true, 3 });
    shapes.push_back({ 192, 128, 65, 100, 2, 1, CAUSAL });
    for (shape s : shapes) {
        for (const int threads : { 1, 3, 9 }) {
            s.threads = threads;
            if (compare(s) != (s.queries > 1 || s.heads >= 2 * s.threads)) {
                fail(s, "refused, or not");
            }
        }
    }
    std::vector<shape> refused = { { 70, 64, 64, 64, 1, 1, NONE }, { 64, 70, 64, 64, 1, 1, NONE } };
#if defined(__ARM_NEON)
    refused.push_back({ 64, 64, 1, 64, 2, 1, NONE });
#endif
    for (const shape & s : refused) {
        if (compare(s)) {
            fail(s, "not refused");
        }
    }
    printf("%zu shapes attended\n", shapes.size());
}
