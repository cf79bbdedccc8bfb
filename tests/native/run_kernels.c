// Runs every function of pt2-cpu.c and ggml-pt2.c on heap buffers of exactly the size that it may
// touch, and checks what it computed. Built with sanitizers, so that reading past a row aborts.
#include "ggml-cpu.h"
#include "ggml-pt2.h"
#include "ggml.h"
#include "pt2-cpu.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*vec_dot)(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);

typedef struct {
    enum ggml_type type;
    size_t block_size;
    size_t (*quantize)(const float * x, void * y, int64_t nrows, int64_t n_per_row, const float * importance);
    void (*from_float)(const float * x, void * y, int64_t k);
    void (*to_float)(const void * x, float * y, int64_t k);
    vec_dot dot;
    vec_dot dot_generic;
} weight_type;

static void tq1_1_to_float(const void * x, float * y, int64_t k) {
    dequantize_row_tq1_1(x, y, k);
}

static void tq2_1_to_float(const void * x, float * y, int64_t k) {
    dequantize_row_tq2_1(x, y, k);
}

static const weight_type TYPES[] = {
    { GGML_TYPE_TQ1_1, sizeof(block_tq1_1), quantize_tq1_1, quantize_row_tq1_1, tq1_1_to_float, ggml_vec_dot_tq1_1_q8_t,
      ggml_vec_dot_tq1_1_q8_t_generic },
    { GGML_TYPE_TQ2_1, sizeof(block_tq2_1), quantize_tq2_1, quantize_row_tq2_1, tq2_1_to_float, ggml_vec_dot_tq2_1_q8_t,
      ggml_vec_dot_tq2_1_q8_t_generic },
};

static const int LENGTHS[] = { 128, 256, 384, 640, 1152, 4224, 17920 };

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static void check(bool holds, const char * what, int n) {
    if (!holds) {
        fprintf(stderr, "%s is wrong for rows of %d\n", what, n);
        exit(1);
    }
}

// A buffer that ends where the heap block ends. shift: bytes between the block's start, which
// malloc aligns, and the buffer; the block is lost, the process being short.
static void * exact(size_t size, size_t shift) {
    return (char *) malloc(size + shift) + shift;
}

static float noise(void) {
    return 2.0f * ((float) rand() / (float) RAND_MAX) - 1.0f;
}

static float * noise_row(int n) {
    float * x = exact(n * sizeof(float), 0);
    for (int i = 0; i < n; ++i) {
        x[i] = noise();
    }
    return x;
}

static int32_t * shuffled_columns(int n) {
    int32_t * perm = exact(n * sizeof(int32_t), 0);
    for (int i = 0; i < n; ++i) {
        const int j = rand() % (i + 1);
        perm[i] = i;
        perm[i] = perm[j];
        perm[j] = i;
    }
    return perm;
}

// The activations, their quantization and what it stands for.
typedef struct {
    float * x;
    block_q8_t * q;
} activations;

static float restored(const block_q8_t * q, int i) {
    return q[i / QK_PT2].d[i % QK_PT2 / 32] * q[i / QK_PT2].qs[i % QK_PT2];
}

static activations make_activations(int n) {
    const size_t size = n / QK_PT2 * sizeof(block_q8_t);
    const activations a = { noise_row(n), exact(size, 0) };
    quantize_row_q8_t(a.x, a.q, n);
    for (int i = 0; i < n; ++i) {
        check(fabsf(restored(a.q, i) - a.x[i]) <= 0.51f / 127, "quantize_row_q8_t", n);
    }
    block_q8_t * generic = exact(size, 0);
    quantize_row_q8_t_generic(a.x, generic, n);

    const int32_t * perm = shuffled_columns(n);
    block_q8_t * gathered = exact(size, 0);
    quantize_row_q8_t_gathered(a.x, perm, gathered, n);
    for (int i = 0; i < n; ++i) {
        check(restored(generic, i) == restored(a.q, i), "quantize_row_q8_t_generic", n);
        check(fabsf(restored(gathered, i) - a.x[perm[i]]) <= 0.51f / 127, "quantize_row_q8_t_gathered", n);
    }
    return a;
}

static void check_dot(const weight_type * type, int n, size_t shift) {
    const size_t row_size = n / QK_PT2 * type->block_size;
    const activations a = make_activations(n);
    const float * w = noise_row(n);
    void * packed = exact(row_size, shift);
    type->from_float(w, packed, n);

    float * fitted = exact(n * sizeof(float), 0);
    type->to_float(packed, fitted, n);
    double expected = 0, magnitude = 0, error = 0, total = 0;
    for (int i = 0; i < n; ++i) {
        expected += (double) fitted[i] * restored(a.q, i);
        magnitude += 4 * fabs(restored(a.q, i)); // |u|*|alpha| + |mu - alpha| for weights within 1
        error += (w[i] - fitted[i]) * (w[i] - fitted[i]);
        total += w[i] * w[i];
    }
    // Three levels for values that are uniform in -1..1 leave a ninth of their energy.
    check(error < 0.15 * total, "quantize_row", n);
    const double tolerance = (n / QK_PT2 + 14) * magnitude / (1 << 24);
    float * s = exact(sizeof(float), 0);
    type->dot(n, s, 0, packed, 0, a.q, 0, 1);
    check(fabs(*s - expected) <= tolerance, "vec_dot", n);
    type->dot_generic(n, s, 0, packed, 0, a.q, 0, 1);
    check(fabs(*s - expected) <= tolerance, "vec_dot_generic", n);
}

// Quantization of rows with importances, whatever they hold.
static void check_quantization(const weight_type * type, int n, float scale, float importance_scale) {
    enum { ROWS = 3 };
    const size_t row_size = n / QK_PT2 * type->block_size;
    float * w = exact(ROWS * n * sizeof(float), 0);
    float * importance = exact(n * sizeof(float), 0);
    for (int i = 0; i < ROWS * n; ++i) {
        w[i] = scale * noise();
    }
    for (int i = 0; i < n; ++i) {
        importance[i] = importance_scale * fabsf(noise());
    }
    void * packed = exact(ROWS * row_size, 0);
    check(type->quantize(w, packed, ROWS, n, importance) == ROWS * row_size, "quantize", n);
    // Columns that are not finite have no grid: then it is enough not to crash.
    if (isfinite(scale) && isfinite(importance_scale)) {
        check(ggml_pt2_validate_row(type->type, packed, ROWS * row_size), "validate_row", n);
    }
    float * fitted = exact(ROWS * n * sizeof(float), 0);
    type->to_float(packed, fitted, ROWS * n);
}

// Bytes that no quantizer made: kernels and checks must survive any file.
static void check_any_bytes(const weight_type * type, int n) {
    const size_t row_size = n / QK_PT2 * type->block_size;
    uint8_t * packed = exact(row_size, 0);
    for (size_t i = 0; i < row_size; ++i) {
        packed[i] = rand() >> 8;
    }
    const activations a = make_activations(n);
    float * fitted = exact(n * sizeof(float), 0);
    float * s = exact(sizeof(float), 0);
    type->to_float(packed, fitted, n);
    type->dot(n, s, 0, packed, 0, a.q, 0, 1);
    type->dot_generic(n, s, 0, packed, 0, a.q, 0, 1);
    ggml_pt2_validate_row(type->type, packed, row_size);
}

static void check_extreme_activations(void) {
    const float values[] = { 0.0f, 1e-45f, 1e-38f, 3.4e38f, INFINITY, -INFINITY, NAN };
    float * x = exact(QK_PT2 * sizeof(float), 0);
    block_q8_t * q = exact(sizeof(block_q8_t), 0);
    for (size_t v = 0; v < COUNT(values); ++v) {
        for (int i = 0; i < QK_PT2; ++i) {
            x[i] = i % 3 ? values[v] : noise();
        }
        quantize_row_q8_t(x, q, QK_PT2);
        quantize_row_q8_t_generic(x, q, QK_PT2);
    }
}

int main(int argc, char ** argv) {
    ggml_cpu_init(); // fills the float16 table that the plain version reads
    if (argc == 2 && strcmp(argv[1], "overrun") == 0) {
        // One block more than there is: shows that the sanitizer sees such a read.
        const activations a = make_activations(QK_PT2);
        float s;
        block_tq2_1 * one_block = exact(sizeof(block_tq2_1), 0);
        memset(one_block, 0, sizeof(block_tq2_1));
        ggml_vec_dot_tq2_1_q8_t(2 * QK_PT2, &s, 0, one_block, 0, a.q, 0, 1);
        return 0;
    }
    check_extreme_activations();
    for (size_t t = 0; t < COUNT(TYPES); ++t) {
        for (size_t i = 0; i < COUNT(LENGTHS); ++i) {
            check_dot(&TYPES[t], LENGTHS[i], 0);
            check_dot(&TYPES[t], LENGTHS[i], 2); // what the blocks' own alignment allows
            check_any_bytes(&TYPES[t], LENGTHS[i]);
        }
        const float scales[] = { 0, 1e-45f, 1, 65504, 1e30f, 3e38f, INFINITY, NAN };
        for (size_t i = 0; i < COUNT(scales); ++i) {
            for (size_t j = 0; j < COUNT(scales); ++j) {
                check_quantization(&TYPES[t], 256, scales[i], scales[j]);
            }
        }
    }
    puts("all kernels ran");
    return 0;
}
