// See pt2-amx.h. A tile register has 16 rows of 64 bytes. An instruction multiplies 64 activations of 16 columns with
// 64 digits of 16 rows of weights, of which a register's row has four neighbours of each: two planes of a panel's half.
#include "pt2-amx.h"

#include <assert.h>

#ifdef PT2_AMX

#include "pt2-simd.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

namespace {

constexpr int REGISTER_ROWS = 16;
constexpr int REGISTER_BYTES = 64; // of a row
constexpr int HALVES = 2;          // of a panel's rows, and of a block's columns

static_assert(HALVES * LANES == PT2_PANEL_ROWS && HALVES * REGISTER_BYTES == QK_PT2, "registers halve panels");

// What the registers hold, as ldtilecfg reads it.
struct alignas(64) configuration {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Registers 0 and 1 hold sums, 2 and 3 activations, and the others digits. What the thread had before comes back.
class register_use {
public:
    explicit register_use(int columns) {
        __asm__ volatile("sttilecfg %0" : "=m"(before));
        configuration ours = {};
        ours.palette = 1;
        for (int i = 0; i < 8; ++i) {
            ours.row_bytes[i] = REGISTER_BYTES;
            ours.rows[i] = (uint8_t) (i < 4 ? columns : REGISTER_ROWS);
        }
        load(ours);
    }

    ~register_use() {
        load(before); // no palette releases the registers
    }

    register_use(const register_use &) = delete;
    register_use & operator=(const register_use &) = delete;

private:
    configuration before;

    static void load(const configuration & which) {
        __asm__ volatile("ldtilecfg %0" : : "m"(which));
    }
};

struct alignas(64) digit_registers {
    uint8_t of[HALVES][HALVES][REGISTER_ROWS][REGISTER_BYTES]; // of half of the rows, and half of the columns
};

struct alignas(64) sum_registers {
    int32_t of[HALVES][REGISTER_ROWS][LANES]; // of half of the rows; a row for each column
};

struct alignas(64) totals {
    float of[PT2_STRIP_COLUMNS][HALVES][LANES];
};

// All digits end up where the last plane has them, so that sums are those of the other kernels.
ALWAYS_INLINE void unpack(const block_panel * panel, digit_registers & digits) {
    constexpr int STEPS = REGISTER_ROWS / 2;
    const __m512i mask = _mm512_set1_epi8((char) 0xc0);
    UNROLL for (int s = 0; s < STEPS; ++s) {
        UNROLL for (int half = 0; half < HALVES; ++half) {
            const __m512i packed = _mm512_loadu_si512(panel->qs[s][half * LANES]);
            auto & planes = digits.of[half];
            _mm512_store_si512(planes[0][s], _mm512_and_si512(_mm512_slli_epi16(packed, 6), mask));
            _mm512_store_si512(planes[0][STEPS + s], _mm512_and_si512(_mm512_slli_epi16(packed, 4), mask));
            _mm512_store_si512(planes[1][s], _mm512_and_si512(_mm512_slli_epi16(packed, 2), mask));
            _mm512_store_si512(planes[1][STEPS + s], _mm512_and_si512(packed, mask));
        }
    }
}

ALWAYS_INLINE void load_digits(const digit_registers & digits) {
    __asm__ volatile("" : : "m"(digits)); // GCC's intrinsic does not tell that it reads them
    _tile_loadd(4, digits.of[0][0], REGISTER_BYTES);
    _tile_loadd(5, digits.of[1][0], REGISTER_BYTES);
    _tile_loadd(6, digits.of[0][1], REGISTER_BYTES);
    _tile_loadd(7, digits.of[1][1], REGISTER_BYTES);
}

// A block of a tile: q[n][QK_PT2], d[n] and sum[n].
ALWAYS_INLINE void multiply_block(const char * q, sum_registers & sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(2, q, QK_PT2);
    _tile_loadd(3, q + REGISTER_BYTES, QK_PT2);
    _tile_dpbsud(0, 2, 4);
    _tile_dpbsud(1, 2, 5);
    _tile_dpbsud(0, 3, 6);
    _tile_dpbsud(1, 3, 7);
    _tile_stored(0, sums.of[0], REGISTER_BYTES);
    _tile_stored(1, sums.of[1], REGISTER_BYTES);
}

inline void prefetch_for_writing(const float * row_of_panel) {
    for (int i = 0; i < PT2_PANEL_ROWS; i += LANES) {
        __builtin_prefetch(row_of_panel + i, 1);
    }
}

struct scales {
    floats alpha[HALVES], offset[HALVES];

    explicit scales(const block_panel * panel) {
        for (int half = 0; half < HALVES; ++half) {
            alpha[half] = from_half(panel->alpha + half * LANES);
            offset[half] = multiply_add(alpha[half], broadcast(-1), from_half(panel->mu + half * LANES));
        }
    }
};

ALWAYS_INLINE void add_block(const sum_registers & sums, const scales & scale, const char * q, int n, bool first,
                             float (*total)[HALVES][LANES]) {
    const float * d = (const float *) (q + n * QK_PT2);
    const __mmask16 kept = first ? 0 : -1;
    for (int i = 0; i < n; ++i) {
        UNROLL for (int half = 0; half < HALVES; ++half) {
            const floats products = _mm512_cvtepi32_ps(_mm512_load_si512(sums.of[half][i]));
            floats sum = _mm512_maskz_load_ps(kept, total[i][half]);
            sum = multiply_add(scale.alpha[half], multiply(products, broadcast(d[i])), sum);
            store(total[i][half], multiply_add(scale.offset[half], broadcast(d[n + i]), sum));
        }
    }
}

// A strip of columns, cut into tiles.
struct strip {
    const char * tiles;
    int64_t blocks;
    int count;                                               // of tiles
    int begin[PT2_STRIP_COLUMNS / PT2_TILE_COLUMNS_MAX + 1]; // the columns of tile t: begin[t], ..., begin[t + 1] - 1

    strip(const void * tiles, int columns, int64_t blocks)
        : tiles((const char *) tiles), blocks(blocks), count(pt2_tiles(columns)) {
        for (int t = 0; t <= count; ++t) {
            begin[t] = pt2_tile_begin(columns, t);
        }
    }

    int columns(int tile) const {
        return begin[tile + 1] - begin[tile];
    }

    const char * block(int tile, int64_t b) const {
        return tiles + (begin[tile] * blocks + columns(tile) * b) * sizeof(block_q8_t);
    }
};

// out[i][first_row + r] = row r of the panel times column i, for the first `rows` rows.
void multiply_panel(const block_panel * panel, const strip & x, int64_t first_row, int rows, float * const * out) {
    const int columns = x.begin[x.count];
    totals total;
    digit_registers digits;
    sum_registers sums[2]; // a tile's are added while the next one is multiplied
    for (int64_t b = 0; b < x.blocks; ++b, ++panel) {
        prefetch<L2>(panel + PREFETCH_BLOCKS, 0, sizeof(*panel));
        unpack(panel, digits);
        const scales scale(panel);
        // Products of long strips leave the caches before the next panel's are written beside them.
        for (int64_t i = columns * b / x.blocks; i < columns * (b + 1) / x.blocks; ++i) {
            prefetch_for_writing(out[i] + first_row);
        }
        load_digits(digits);
        multiply_block(x.block(0, b), sums[0]);
        for (int t = 0; t < x.count; ++t) {
            if (t + 1 < x.count) {
                multiply_block(x.block(t + 1, b), sums[(t + 1) % 2]);
            }
            add_block(sums[t % 2], scale, x.block(t, b), x.columns(t), b == 0, total.of + x.begin[t]);
        }
    }
    for (int i = 0; i < columns; ++i) {
        std::copy_n(total.of[i][0], rows, out[i] + first_row);
    }
}

bool ask_for_registers() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

} // namespace

bool pt2_amx_is_usable() {
    static const bool usable = ask_for_registers();
    return usable;
}

void pt2_amx_panels_dot(const block_panel * panels, int64_t rows, const void * tiles, int columns, int64_t blocks,
                        float * const * out) {
    assert(0 < columns && columns <= PT2_STRIP_COLUMNS);
    const strip x(tiles, columns, blocks);
    // For tiles that have a column less, the registers' last row is what follows in memory, and what becomes of it is
    // not looked at.
    const register_use use(x.columns(x.count - 1));
    for (int64_t first = 0; first < rows; first += PT2_PANEL_ROWS, panels += blocks) {
        multiply_panel(panels, x, first, (int) std::min<int64_t>(PT2_PANEL_ROWS, rows - first), out);
    }
}

#else

bool pt2_amx_is_usable() {
    return false;
}

void pt2_amx_panels_dot(const block_panel *, int64_t, const void *, int, int64_t, float * const *) {
    assert(false);
}

#endif
