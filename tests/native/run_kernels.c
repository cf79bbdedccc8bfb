// Runs every function of pt2-panel.cpp, pt2-amx.cpp, pt2-cpu.c and ggml-pt2.c on buffers of exactly the size that it
// may touch, and checks what it computed. Built with sanitizers or without: then pages that may not be touched follow
// the buffers.
#include "ggml-impl.h"
#include "ggml-pt2.h"
#include "ggml.h"
#include "pt2-cpu.h"
#include "pt2-panel.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

// What the kernels need of ggml's libraries, which a cross compiler does not have.
float ggml_table_f32_f16[1 << 16];

const char * ggml_type_name(enum ggml_type type) {
    return type == GGML_TYPE_TQ1_1 ? "tq1_1" : "tq2_1";
}

static void fill_float16_table(void) {
    for (int i = 0; i < 1 << 16; ++i) {
        ggml_table_f32_f16[i] = GGML_COMPUTE_FP16_TO_FP32((ggml_fp16_t) i);
    }
}

typedef void (*vec_dot)(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);

typedef struct {
    enum ggml_type type;
    size_t block_size;
    size_t (*quantize)(const float * x, void * y, int64_t nrows, int64_t n_per_row, const float * importance);
    void (*from_float)(const float * x, void * y, int64_t k);
    void (*to_float)(const void * x, float * y, int64_t k);
    vec_dot dot;
} weight_type;

static void tq1_1_to_float(const void * x, float * y, int64_t k) {
    dequantize_row_tq1_1(x, y, k);
}

static void tq2_1_to_float(const void * x, float * y, int64_t k) {
    dequantize_row_tq2_1(x, y, k);
}

static const weight_type TYPES[] = {
    { GGML_TYPE_TQ1_1, sizeof(block_tq1_1), quantize_tq1_1, quantize_row_tq1_1, tq1_1_to_float,
      ggml_vec_dot_tq1_1_q8_t },
    { GGML_TYPE_TQ2_1, sizeof(block_tq2_1), quantize_tq2_1, quantize_row_tq2_1, tq2_1_to_float,
      ggml_vec_dot_tq2_1_q8_t },
};

static const int LENGTHS[] = { 128, 256, 384, 640, 1152, 4224, 17920 };

static void check(bool holds, const char * what, int n) {
    if (!holds) {
        fprintf(stderr, "%s is wrong for rows of %d\n", what, n);
        exit(1);
    }
}

// What exact() has given since forget_buffers().
static struct {
    void * memory;
    size_t size;
} buffers[8192];
static size_t buffer_count = 0;

// A buffer that ends where memory that may be touched ends. shift: bytes by which it misses the
// alignment of 64.
static void * exact(size_t size, size_t shift) {
    check(buffer_count < COUNT(buffers), "the number of buffers", (int) size);
#if defined(__SANITIZE_ADDRESS__)
    char * memory = malloc(size + shift);
    char * buffer = memory + shift;
#else
    enum { PAGE = 65536 }; // or a part of it
    const size_t room = (size + shift + PAGE - 1) / PAGE * PAGE;
    char * memory = mmap(NULL, room + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(memory != MAP_FAILED && mprotect(memory + room, PAGE, PROT_NONE) == 0, "mmap", (int) size);
    char * buffer = memory + room - size; // the end counts, and sizes are seldom multiples of the alignment
    size = room + PAGE;
#endif
    buffers[buffer_count].memory = memory;
    buffers[buffer_count++].size = size;
    return buffer;
}

static void forget_buffers(void) {
    while (buffer_count > 0) {
        --buffer_count;
#if defined(__SANITIZE_ADDRESS__)
        free(buffers[buffer_count].memory);
#else
        munmap(buffers[buffer_count].memory, buffers[buffer_count].size);
#endif
    }
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

// Rows of weights whose absolute values are at most 1.
typedef struct {
    const weight_type * type;
    int n;
    size_t row_size;
    char * packed;
    float * fitted;
} weights;

static weights make_weights(const weight_type * type, int rows, int n, size_t shift) {
    const int blocks = n / QK_PT2;
    // Rows need not follow each other without a gap, but the last one has none.
    const size_t used = blocks * type->block_size;
    const size_t row_size = used + 3 * shift;
    weights w = { type, n, row_size, exact((rows - 1) * row_size + used, shift), exact(rows * n * sizeof(float), 0) };
    for (int r = 0; r < rows; ++r) {
        const float * x = noise_row(n);
        type->from_float(x, w.packed + r * row_size, n);
        type->to_float(w.packed + r * row_size, w.fitted + r * n, n);
        double error = 0, total = 0;
        for (int i = 0; i < n; ++i) {
            const double difference = x[i] - w.fitted[r * n + i];
            error += difference * difference;
            total += x[i] * x[i];
        }
        // Of values that are uniform in -1..1 the levels -2/3, 0 and 2/3 leave a ninth of the energy, from which a
        // value's share differs by 0.0442 (the standard deviation); the levels of a row should be no worse.
        check(error < total / 9 + 6 * 0.0442 * sqrt(n), "quantize_row", n);
    }
    return w;
}

static void check_panel(const weights * w, const block_panel * panel, int rows) {
    for (int b = 0; b < w->n / QK_PT2; ++b) {
        for (int r = 0; r < PT2_PANEL_ROWS; ++r) {
            const float alpha = GGML_COMPUTE_FP16_TO_FP32(panel[b].alpha[r]);
            const float mu = GGML_COMPUTE_FP16_TO_FP32(panel[b].mu[r]);
            for (int j = 0; j < QK_PT2; ++j) {
                const int u = panel[b].qs[j % 32 / 4][r][j % 4] >> 2 * (j / 32) & 3;
                const float value = r < rows ? w->fitted[r * w->n + b * QK_PT2 + j] : 0;
                // alpha * t + mu is rounded once or twice
                const bool holds = fabsf(alpha * (u - 1) + mu - value) <= 0x1p-23f * (fabsf(alpha) + fabsf(mu));
                check(holds && (r < rows || u == 0), "pt2_panel_from_rows", w->n);
            }
        }
    }
}

static double restored(const block_q8_t * q, int i) {
    return (double) q[i / QK_PT2].d * q[i / QK_PT2].qs[i % QK_PT2];
}

static block_q8_t * make_activations(const float * x, int n) {
    block_q8_t * q = exact(n / QK_PT2 * sizeof(block_q8_t), 0);
    quantize_row_q8_t(x, q, n);
    for (int i = 0; i < n; ++i) {
        check(fabs(restored(q, i) - x[i]) <= 0.51 / 127, "quantize_row_q8_t", n);
    }
    return q;
}

static void * make_strip(const float * const * x, const int32_t * perm, int columns, int blocks, size_t shift) {
    char * strip = exact(pt2_tile_size(columns, blocks), shift);
    for (int t = 0; t < pt2_tiles(columns); ++t) {
        const int first = pt2_tile_begin(columns, t);
        const int n = pt2_tile_begin(columns, t + 1) - first;
        void * tile = strip + pt2_tile_size(first, blocks);
        pt2_tile_quantize(x + first, perm, n, 0, blocks / 2, tile);
        pt2_tile_quantize(x + first, perm, n, blocks / 2, blocks, tile);
    }
    return strip;
}

// All that is between float rows and their products, for n columns.
static void check_products(const weights * w, const block_panel * panel, int rows, int columns, size_t shift) {
    const int n = w->n;
    const int blocks = n / QK_PT2;
    const int32_t * perm = shift ? shuffled_columns(n) : NULL;
    const float * x[PT2_STRIP_COLUMNS];
    float * out[PT2_STRIP_COLUMNS];
    for (int i = 0; i < columns; ++i) {
        x[i] = noise_row(n);
        out[i] = exact(rows * sizeof(float), 0);
    }
    const void * strip = make_strip(x, perm, columns, blocks, 2 * shift);
    pt2_panels_dot(panel, rows, strip, columns, blocks, out);

    float * s = exact(sizeof(float), 0);
    for (int i = 0; i < columns; ++i) {
        float * gathered = exact(n * sizeof(float), 0);
        for (int j = 0; j < n; ++j) {
            gathered[j] = x[i][perm ? perm[j] : j];
        }
        const block_q8_t * q = make_activations(gathered, n);
        double magnitude = 0;
        for (int j = 0; j < n; ++j) {
            magnitude += 4 * fabs(restored(q, j)); // |u|*|alpha| + |mu - alpha| for weights within 1
        }
        for (int r = 0; r < rows; ++r) {
            double expected = 0;
            for (int j = 0; j < n; ++j) {
                expected += w->fitted[r * n + j] * restored(q, j);
            }
            // See test_kernels.py.
            const double tolerance = (2 * blocks + 4) * magnitude * 0x1p-24;
            check(fabs(out[i][r] - expected) <= tolerance, "pt2_panels_dot", n);
            w->type->dot(n, s, 0, w->packed + r * w->row_size, 0, q, 0, 1);
            check(fabs(*s - expected) <= tolerance, "vec_dot", n);
        }
    }
}

static void check_kernels(const weight_type * type, int n, int rows, size_t shift) {
    const weights w = make_weights(type, rows, n, shift);
    block_panel * panel = exact(n / QK_PT2 * sizeof(block_panel), shift);
    memset(panel, 0xA5, n / QK_PT2 * sizeof(block_panel));
    pt2_panel_from_rows(type->type, w.packed, w.row_size, rows, n / QK_PT2, panel);
    check_panel(&w, panel, rows);
    for (int columns = 1; pt2_tiles(columns) == 1; ++columns) {
        check_products(&w, panel, rows, columns, shift);
    }
    check_products(&w, panel, rows, 17, shift); // of more than one tile
    forget_buffers();
}

// Sums as large as they get, which must be exact: no instruction may saturate.
static void check_extreme_sums(int digit, float activation) {
    enum { BLOCKS = 140 };
    block_tq2_1 * row = exact(BLOCKS * sizeof(block_tq2_1), 0);
    for (int b = 0; b < BLOCKS; ++b) {
        row[b].alpha = row[b].mu = GGML_COMPUTE_FP32_TO_FP16(1);
        memset(row[b].qs, 0x55 * digit, sizeof(row[b].qs));
    }
    block_panel * panel = exact(BLOCKS * sizeof(block_panel), 0);
    pt2_panel_from_rows(GGML_TYPE_TQ2_1, row, 0, PT2_PANEL_ROWS, BLOCKS, panel); // the same row 32 times
    float * x = exact(BLOCKS * QK_PT2 * sizeof(float), 0);
    for (int i = 0; i < BLOCKS * QK_PT2; ++i) {
        x[i] = activation;
    }
    for (int columns = 1; pt2_tiles(columns) == 1; ++columns) {
        const float * xs[PT2_TILE_COLUMNS_MAX];
        float * out[PT2_TILE_COLUMNS_MAX];
        for (int i = 0; i < columns; ++i) {
            xs[i] = x;
            out[i] = exact(PT2_PANEL_ROWS * sizeof(float), 0);
        }
        const void * strip = make_strip(xs, NULL, columns, BLOCKS, 0);
        pt2_panels_dot(panel, PT2_PANEL_ROWS, strip, columns, BLOCKS, out);
        for (int i = 0; i < columns * PT2_PANEL_ROWS; ++i) {
            const float result = out[i / PT2_PANEL_ROWS][i % PT2_PANEL_ROWS];
            check(result == digit * activation * QK_PT2 * BLOCKS, "an extreme sum", BLOCKS * QK_PT2);
        }
    }
    forget_buffers();
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
    forget_buffers();
}

// A column by itself, and as each of five, which AMX multiplies.
static void multiply_alike(const block_panel * panel, const float * x, int blocks) {
    const float * xs[] = { x, x, x, x, x };
    float * alone = exact(sizeof(float), 0);
    pt2_panels_dot(panel, 1, make_strip(xs, NULL, 1, blocks, 0), 1, blocks, &alone);
    float * out[COUNT(xs)];
    for (size_t i = 0; i < COUNT(out); ++i) {
        out[i] = exact(sizeof(float), 0);
    }
    pt2_panels_dot(panel, 1, make_strip(xs, NULL, COUNT(xs), blocks, 0), COUNT(xs), blocks, out);
    for (size_t i = 0; i < COUNT(out); ++i) {
        const bool same = memcmp(out[i], alone, sizeof(*alone)) == 0 || (isnan(*out[i]) && isnan(*alone));
        check(same, "one of five columns", blocks * QK_PT2);
    }
}

// Bytes that no quantizer made: kernels and checks must survive any file.
static void check_any_bytes(const weight_type * type, int n) {
    const size_t row_size = n / QK_PT2 * type->block_size;
    uint8_t * packed = exact(row_size, 0);
    for (size_t i = 0; i < row_size; ++i) {
        packed[i] = rand() >> 8;
    }
    const float * x = noise_row(n);
    const block_q8_t * q = make_activations(x, n);
    float * fitted = exact(n * sizeof(float), 0);
    float * s = exact(sizeof(float), 0);
    type->to_float(packed, fitted, n);
    type->dot(n, s, 0, packed, 0, q, 0, 1);
    block_panel * panel = exact(n / QK_PT2 * sizeof(block_panel), 0);
    pt2_panel_from_rows(type->type, packed, row_size, 1, n / QK_PT2, panel);
    multiply_alike(panel, x, n / QK_PT2);
    ggml_pt2_validate_row(type->type, packed, row_size);
    forget_buffers();
}

// Values that have no grid: then it is enough not to crash. The others have the reference's scales.
static void check_extreme_activations(void) {
    const float values[] = { 0.0f, -0.0f, 1e-45f, 1e-38f, 1e-36f, 3e-36f, 1e38f, 3.4e38f, INFINITY, -INFINITY, NAN };
    float * x = exact(QK_PT2 * sizeof(float), 0);
    block_q8_t * q = exact(sizeof(block_q8_t), 0);
    block_q8_t * tile = exact(pt2_tile_size(1, 1), 0); // a column is a block but for its scales' units
    for (size_t v = 0; v < COUNT(values); ++v) {
        for (int i = 0; i < QK_PT2; ++i) {
            x[i] = i % 3 ? values[v] : noise();
        }
        quantize_row_q8_t(x, q, QK_PT2);
        const float * xs[] = { x };
        pt2_tile_quantize(xs, NULL, 1, 0, 1, tile);
        if (isfinite(values[v])) {
            check(memcmp(tile->qs, q->qs, sizeof(q->qs)) == 0, "pt2_tile_quantize", QK_PT2);
        }
    }
}

int main(int argc, char ** argv) {
    fill_float16_table();
    if (argc == 2 && strcmp(argv[1], "overrun") == 0) {
        // One block more than there is: shows that such a read is seen. AMX would multiply five columns.
        enum { COLUMNS = 5 };
        const float * x[COLUMNS];
        float * out[COLUMNS];
        for (int i = 0; i < COLUMNS; ++i) {
            x[i] = noise_row(QK_PT2);
            out[i] = exact(PT2_PANEL_ROWS * sizeof(float), 0);
        }
        block_panel panel[2] = { 0 };
        pt2_panels_dot(panel, PT2_PANEL_ROWS, make_strip(x, NULL, COLUMNS, 1, 0), COLUMNS, 2, out);
        return 0;
    }
    check_extreme_activations();
    for (int digit = 0; digit < 3; ++digit) {
        check_extreme_sums(digit, 127);
        check_extreme_sums(digit, -127);
    }
    for (size_t t = 0; t < COUNT(TYPES); ++t) {
        for (size_t i = 0; i < COUNT(LENGTHS); ++i) {
            // Few of the long rows: what could go wrong there is counting blocks.
            const int most = LENGTHS[i] > 2000 ? 5 : PT2_PANEL_ROWS;
            check_kernels(&TYPES[t], LENGTHS[i], 1 + rand() % most, 0);
            check_kernels(&TYPES[t], LENGTHS[i], most, 2); // what the blocks' own alignment allows
            check_any_bytes(&TYPES[t], LENGTHS[i]);
        }
        for (int rows = 1; rows < PT2_PANEL_ROWS; ++rows) {
            check_kernels(&TYPES[t], QK_PT2, rows, 2);
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
