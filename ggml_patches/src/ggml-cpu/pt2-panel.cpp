// See pt2-panel.h. With u = t + 1 the stored digit, and x = d*q the activations, a block is
//     sum(w*x) = alpha * d * sum(u*q) + (mu - alpha) * sum(x)
// The integer sums are exact, so the instruction sets differ only by the order in which floats are
// added.
#include "pt2-panel.h"

#include "pt2-amx.h"
#include "pt2-simd.h"

#include <assert.h>
#include <float.h>

#include <algorithm>
#include <type_traits>

#if defined(__GNUC__) && defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

constexpr int PLANES = 4; // of digits in a byte
constexpr int STEPS = 8;  // in a plane, of four columns each
constexpr int HALVES = 2; // of a byte, with two planes each

template <int n> struct tile_block {
    int8_t qs[n][PLANES][STEPS][4];
    float d[n]; // times SUM_SCALE
    float sum[n];
};

constexpr int TILE_COLUMNS = std::min(SUMS, 4); // as many as the registers hold
#ifdef PT2_AMX
constexpr int WIDEST = PT2_TILE_COLUMNS_MAX;
#else
constexpr int WIDEST = TILE_COLUMNS;
#endif

// With a tile's columns or fewer, unpacking the digits for AMX takes longer than it spares.
bool uses_amx(int columns) {
    return columns > TILE_COLUMNS && pt2_amx_is_usable();
}

// Calls function(std::integral_constant<int, columns>()); there are at most n.
template <int n, typename F> void with_columns(int columns, const F & function) {
    if constexpr (n > 1) {
        if (columns < n) {
            return with_columns<n - 1>(columns, function);
        }
    }
    assert(columns == n);
    function(std::integral_constant<int, n>());
}

// Multiplication -----------------------------------------------------------------------------------

// How many registers of rows are multiplied with n columns at a time: so many that the sums being added to fit the
// registers. A single column takes a panel at once, as it has little else to keep.
template <int n> constexpr int vectors_for() {
    const int panel = PT2_PANEL_ROWS / LANES;
    return n == 1 ? panel : std::clamp(SUMS / n, 1, panel);
}

constexpr int PASSES = PLANES / HALVES_AT_ONCE; // through a block

// Asks for lines of the block that comes so many blocks later, a share for each pass.
template <cache level, int ahead> inline void prefetch_ahead(const block_panel * panel, int pass) {
    constexpr size_t SHARE = (sizeof(*panel) / LINE + PASSES - 1) / PASSES * LINE;
    prefetch<level>(panel + ahead, pass * SHARE, std::min((pass + 1) * SHARE, sizeof(*panel)));
}

// Adds to products[h][v][i] one of the two planes in half h of the bytes, h = first_half, ...: the digits of the rows
// first_row + v * LANES, ... times those columns of column i.
template <int vectors, int n>
ALWAYS_INLINE void add_planes(const block_panel * panel, int first_row, int first_half, int plane,
                              const tile_block<n> * tile, sums (&products)[HALVES][vectors][n]) {
    UNROLL for (int s = 0; s < STEPS; ++s) {
        UNROLL for (int h = first_half; h < first_half + HALVES_AT_ONCE; ++h) {
            const int k = 2 * h + plane;
            bytes u[vectors];
            UNROLL for (int v = 0; v < vectors; ++v) {
                u[v] = digits(panel->qs[s][first_row + v * LANES], k);
            }
            UNROLL for (int i = 0; i < n; ++i) {
                const bytes q = four_activations(tile->qs[i][k][s]);
                UNROLL for (int v = 0; v < vectors; ++v) {
                    products[h][v][i] = dot(products[h][v][i], u[v], q);
                }
            }
        }
    }
}

#if defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8)

// Two steps at a time: vmmlaq multiplies two rows of eight digits with two columns of eight activations.
template <int vectors>
ALWAYS_INLINE void add_planes(const block_panel * panel, int first_row, int half, int plane, const tile_block<4> * tile,
                              sums (&products)[HALVES][vectors][4]) {
    const int k = 2 * half + plane;
    sums rows01[vectors][2], rows23[vectors][2]; // times columns 0 and 1, 2 and 3
    UNROLL for (int v = 0; v < vectors; ++v) {
        UNROLL for (int pair = 0; pair < 2; ++pair) {
            rows01[v][pair] = rows23[v][pair] = no_sums();
        }
    }
    UNROLL for (int s = 0; s < STEPS; s += 4) {
        int8x16_t columns[2][2]; // of steps s and s + 1, s + 2 and s + 3
        UNROLL for (int pair = 0; pair < 2; ++pair) {
            const int64x2_t even = vreinterpretq_s64_s8(vld1q_s8(tile->qs[2 * pair][k][s]));
            const int64x2_t odd = vreinterpretq_s64_s8(vld1q_s8(tile->qs[2 * pair + 1][k][s]));
            columns[0][pair] = vreinterpretq_s8_s64(vzip1q_s64(even, odd));
            columns[1][pair] = vreinterpretq_s8_s64(vzip2q_s64(even, odd));
        }
        UNROLL for (int two = 0; two < 2; ++two) {
            UNROLL for (int v = 0; v < vectors; ++v) {
                const int step = s + 2 * two, row = first_row + v * LANES;
                const int32x4_t u0 = vreinterpretq_s32_s8(digits(panel->qs[step][row], k));
                const int32x4_t u1 = vreinterpretq_s32_s8(digits(panel->qs[step + 1][row], k));
                const int8x16_t u01 = vreinterpretq_s8_s32(vzip1q_s32(u0, u1));
                const int8x16_t u23 = vreinterpretq_s8_s32(vzip2q_s32(u0, u1));
                UNROLL for (int pair = 0; pair < 2; ++pair) {
                    rows01[v][pair] = vmmlaq_s32(rows01[v][pair], u01, columns[two][pair]);
                    rows23[v][pair] = vmmlaq_s32(rows23[v][pair], u23, columns[two][pair]);
                }
            }
        }
    }
    UNROLL for (int v = 0; v < vectors; ++v) {
        UNROLL for (int pair = 0; pair < 2; ++pair) {
            sums & even = products[half][v][2 * pair];
            sums & odd = products[half][v][2 * pair + 1];
            even = vaddq_s32(even, vuzp1q_s32(rows01[v][pair], rows23[v][pair]));
            odd = vaddq_s32(odd, vuzp2q_s32(rows01[v][pair], rows23[v][pair]));
        }
    }
}

#endif

// products[h][v][i] = the digits of all planes in half h of the block.
template <cache level, int ahead, int vectors, int n>
ALWAYS_INLINE void multiply_block(const block_panel * panel, int first_row, const tile_block<n> * tile,
                                  sums (&products)[HALVES][vectors][n]) {
    UNROLL for (int h = 0; h < HALVES; h += HALVES_AT_ONCE) {
        UNROLL for (int plane = 0; plane < 2; ++plane) {
            FORGET(panel);
            prefetch_ahead<level, ahead>(panel, h / HALVES_AT_ONCE * 2 + plane);
            UNROLL for (int at_once = h; at_once < h + HALVES_AT_ONCE; ++at_once) {
                UNROLL for (int v = 0; v < vectors; ++v) {
                    UNROLL for (int i = 0; i < n; ++i) {
                        sums & sum = products[at_once][v][i];
                        sum = plane == 0 ? no_sums() : for_next_plane(sum);
                    }
                }
            }
            add_planes(panel, first_row, h, plane, tile, products);
        }
    }
}

// result[v][i] = the rows first_row + v * LANES, ... of the panel times column i.
template <cache level, int ahead, int vectors, int n>
void dot_vectors(const block_panel * panel, int first_row, const tile_block<n> * tile, int64_t blocks,
                 floats (&result)[vectors][n]) {
    floats total[vectors][n];
    UNROLL for (int v = 0; v < vectors; ++v) {
        UNROLL for (int i = 0; i < n; ++i) {
            total[v][i] = broadcast(0);
        }
    }
    for (int64_t b = 0; b < blocks; ++b, ++panel, ++tile) {
        sums products[HALVES][vectors][n];
        multiply_block<level, ahead>(panel, first_row, tile, products);
        UNROLL for (int v = 0; v < vectors; ++v) {
            const int row = first_row + v * LANES;
            const floats alpha = from_half(panel->alpha + row);
            const floats offset = multiply_add(alpha, broadcast(-1), from_half(panel->mu + row));
            UNROLL for (int i = 0; i < n; ++i) {
                const floats scaled = multiply(to_float(products[0][v][i], products[1][v][i]), broadcast(tile->d[i]));
                total[v][i] = multiply_add(alpha, scaled, total[v][i]);
                total[v][i] = multiply_add(offset, broadcast(tile->sum[i]), total[v][i]);
            }
        }
    }
    UNROLL for (int v = 0; v < vectors; ++v) {
        UNROLL for (int i = 0; i < n; ++i) {
            result[v][i] = total[v][i];
        }
    }
}

// The panel's first `rows` rows.
template <cache level, int ahead, int n>
void dot_panel(const block_panel * panel, const tile_block<n> * tile, int64_t blocks, int rows, float * const * out) {
    constexpr int vectors = vectors_for<n>();
    static_assert(PT2_PANEL_ROWS % (vectors * LANES) == 0, "a panel takes whole rounds");
    for (int first_row = 0; first_row < rows; first_row += vectors * LANES) {
        floats result[vectors][n];
        if constexpr (vectors * LANES == PT2_PANEL_ROWS) { // a constant spares the addresses' arithmetic
            dot_vectors<level, ahead>(panel, 0, tile, blocks, result);
        } else {
            dot_vectors<level, ahead>(panel, first_row, tile, blocks, result);
        }
        const int left = rows - first_row;
        for (int i = 0; i < n; ++i) {
            float values[vectors * LANES];
            float * place = left < vectors * LANES ? values : out[i] + first_row;
            for (int v = 0; v < vectors; ++v) {
                store(place + v * LANES, result[v][i]);
            }
            if (place == values) {
                std::copy_n(values, left, out[i] + first_row);
            }
        }
    }
}

// The family of AMD's processor, 0 of others.
unsigned amd_family() {
#if defined(__GNUC__) && defined(__x86_64__)
    unsigned eax, ebx, ecx, edx;
    const bool amd = __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_AMD_ebx;
    return amd && __get_cpuid(1, &eax, &ebx, &ecx, &edx) ? (eax >> 8 & 15) + (eax >> 20 & 255) : 0;
#else
    return 0;
#endif
}

const unsigned AMD_FAMILY = amd_family();

// With the prefetches that gave the most tokens (docs/speed.md).
template <int n> auto dot_panel_here() {
    if (AMD_FAMILY == 0x1A) { // Zen 5
        return dot_panel<L1, PREFETCH_BLOCKS, n>;
    }
    if (AMD_FAMILY == 0x19 && LANES == 16) { // Zen 4 by AVX-512
        return dot_panel<L1, PREFETCH_BLOCKS / 2, n>;
    }
    return dot_panel<L2, PREFETCH_BLOCKS, n>;
}

// Activations ----------------------------------------------------------------------------------------

template <int n> void quantize_block(const float * x, int column, tile_block<n> * block) {
    int8_t * q = block->qs[column][0][0];
    floats magnitude = broadcast(0);
    UNROLL for (int j = 0; j < QK_PT2; j += LANES) {
        magnitude = larger_magnitude(magnitude, load(x + j));
    }
    const float d = largest(magnitude) / 127;
    if (!(d >= FLT_MIN)) { // its inverse could be infinite
        memset(q, 0, QK_PT2);
        block->d[column] = block->sum[column] = 0;
        return;
    }
    const floats inverse = broadcast(1 / d);
    floats sum = broadcast(0);
    UNROLL for (int j = 0; j < QK_PT2; j += LANES) {
        const floats rounded = store_rounded(q + j, multiply(load(x + j), inverse));
        sum = multiply_add(rounded, broadcast(1), sum);
    }
    block->d[column] = d * SUM_SCALE;
    block->sum[column] = d * total(sum);
}

// Weights ------------------------------------------------------------------------------------------

// Four columns of all rows of a panel.
using step_bytes = uint8_t[PT2_PANEL_ROWS][4];

// Takes the next base-3 digit off all fractions, and puts it into the plane that begins at bit `shift`.
void move_digits(step_bytes & fractions, step_bytes & qs, int shift) {
    uint8_t * from = fractions[0];
    uint8_t * to = qs[0];
    for (int j = 0; j < PT2_PANEL_ROWS * 4; ++j) {
        const uint8_t digit = (uint8_t) ((from[j] >= 86) + (from[j] >= 171)); // 3 * from[j] / 256
        to[j] |= digit << shift;
        from[j] = (uint8_t) (3 * from[j]);
    }
}

void interleave(const block_tq2_1 & block, int row, step_bytes (&qs)[STEPS]) {
    for (int s = 0; s < STEPS; ++s) {
        memcpy(qs[s][row], block.qs + 4 * s, 4);
    }
}

// The fractions of a TQ1_1 block: six steps of four bytes; the last two bytes make another two, times 1, 3, 9 and 27.
void interleave(const block_tq1_1 & block, int row, step_bytes (&fractions)[STEPS]) {
    for (int g = 0; g < 6; ++g) {
        memcpy(fractions[g][row], block.qs + 4 * g, 4);
    }
    for (int i = 0; i < 2; ++i) {
        const uint8_t last = block.qs[24 + i];
        fractions[6][row][i] = last;
        fractions[6][row][2 + i] = (uint8_t) (3 * last);
        fractions[7][row][i] = (uint8_t) (9 * last);
        fractions[7][row][2 + i] = (uint8_t) (27 * last);
    }
}

// Block b of the rows: their scales into the panel, their digits into `bytes`.
template <typename block_type>
void interleave_rows(const void * data, size_t row_size, int rows, int64_t b, block_panel * panel,
                     step_bytes (&bytes)[STEPS]) {
    for (int r = 0; r < rows; ++r) {
        const block_type & block = ((const block_type *) ((const char *) data + r * row_size))[b];
        panel->alpha[r] = block.alpha;
        panel->mu[r] = block.mu;
        interleave(block, r, bytes);
    }
}

// The five digits of fractions[g], g < 6, belong to columns 4g, 24 + 4g, ..., 96 + 4g and their three neighbours; one
// digit of each of the last two to columns 120 to 127.
void unpack(step_bytes (&fractions)[STEPS], block_panel * panel) {
    const auto move = [&](int g, int step) { move_digits(fractions[g], panel->qs[step % STEPS], 2 * (step / STEPS)); };
    for (int g = 0; g < 6; ++g) {
        for (int k = 0; k < 5; ++k) {
            move(g, 6 * k + g);
        }
    }
    move(6, 30);
    move(7, 31);
}

} // namespace

void pt2_panel_from_rows(enum ggml_type type, const void * data, size_t row_size, int rows, int64_t blocks,
                         block_panel * panel) {
    assert(0 < rows && rows <= PT2_PANEL_ROWS);
    // Rows follow each other in memory, but are read side by side, which is more streams than processors prefetch.
    prefetch<L2>(data, 0, rows * row_size);
    for (int64_t b = 0; b < blocks; ++b, ++panel) {
        memset(panel, 0, sizeof(*panel));
        if (type == GGML_TYPE_TQ1_1) {
            step_bytes fractions[STEPS] = {};
            interleave_rows<block_tq1_1>(data, row_size, rows, b, panel, fractions);
            unpack(fractions, panel);
        } else {
            interleave_rows<block_tq2_1>(data, row_size, rows, b, panel, panel->qs);
        }
    }
}

int pt2_tiles(int columns) {
    const int most = uses_amx(columns) ? WIDEST : TILE_COLUMNS;
    return (columns + most - 1) / most;
}

int pt2_tile_begin(int columns, int tile) {
    return uses_amx(columns) ? columns * tile / pt2_tiles(columns) : std::min(columns, tile * TILE_COLUMNS);
}

size_t pt2_tile_size(int n, int64_t blocks) {
    static_assert(sizeof(tile_block<1>) == sizeof(block_q8_t), "a tile is as large as its columns");
    return n * blocks * sizeof(block_q8_t);
}

void pt2_tile_quantize(const float * const * x, const int32_t * perm, int n, int64_t first, int64_t last, void * tile) {
    if (perm) {
        prefetch<L2>(perm, first * QK_PT2 * sizeof(*perm), last * QK_PT2 * sizeof(*perm));
    }
    with_columns<WIDEST>(n, [&](auto columns) {
        auto * blocks = (tile_block<columns> *) tile;
        for (int64_t b = first; b < last; ++b) {
            float gathered[columns][QK_PT2];
            if (perm) { // all columns at once, as what was just stored piece by piece is slow to load as a whole
                for (int j = 0; j < QK_PT2; ++j) {
                    const int32_t from = perm[b * QK_PT2 + j];
                    for (int i = 0; i < columns; ++i) {
                        gathered[i][j] = x[i][from];
                    }
                }
            }
            for (int i = 0; i < columns; ++i) {
                quantize_block<columns>(perm ? gathered[i] : x[i] + b * QK_PT2, i, blocks + b);
            }
        }
    });
}

void pt2_panels_dot(const block_panel * panels, int64_t rows, const void * tiles, int columns, int64_t blocks,
                    float * const * out) {
    if (uses_amx(columns)) {
        pt2_amx_panels_dot(panels, rows, tiles, columns, blocks, out);
        return;
    }
    const int count = pt2_tiles(columns);
    for (int t = 0; t < count; ++t) {
        const int first = pt2_tile_begin(columns, t);
        const void * tile = (const char *) tiles + pt2_tile_size(first, blocks);
        with_columns<TILE_COLUMNS>(pt2_tile_begin(columns, t + 1) - first, [&](auto n) {
            const auto multiply_panel = dot_panel_here<n>();
            for (int64_t row = 0; row < rows; row += PT2_PANEL_ROWS) {
                float * places[n];
                for (int i = 0; i < n; ++i) {
                    places[i] = out[first + i] + row;
                }
                multiply_panel(panels + row / PT2_PANEL_ROWS * blocks, (const tile_block<n> *) tile, blocks,
                               (int) std::min<int64_t>(PT2_PANEL_ROWS, rows - row), places);
            }
        });
    }
}
