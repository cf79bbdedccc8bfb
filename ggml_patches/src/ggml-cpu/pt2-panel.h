// Panels and tiles: the shapes in which the CPU multiplies ternary weights with activations.
//
// A panel is 32 rows of weights, interleaved so that every lane of a register works for a row of
// its own. TQ1_1 is unpacked to two bits on the way, so both types run through the same kernel. A
// tile is a few columns of activations in 8 bits, side by side.
#pragma once

#include "ggml-pt2.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PT2_PANEL_ROWS 32

// One block of a panel, as large as 32 blocks of TQ2_1.
typedef struct {
    ggml_fp16_t alpha[PT2_PANEL_ROWS];
    ggml_fp16_t mu[PT2_PANEL_ROWS];
    // Bits 2k..2k+1 of qs[s][r][i] hold the digit of row r, column 32k + 4s + i.
    uint8_t qs[8][PT2_PANEL_ROWS][4];
} block_panel;

#ifdef __cplusplus
static_assert(sizeof(block_panel) == PT2_PANEL_ROWS * sizeof(block_tq2_1), "block padding");
#endif

// Interleave `rows` (at most 32) rows of that many blocks, which lie row_size bytes apart in a tensor
// of the type. Rows of the panel that are missing become 0.
void pt2_panel_from_rows(enum ggml_type type, const void * data, size_t row_size, int rows, int64_t blocks,
                         block_panel * panel);

// Columns are multiplied in strips of at most so many, and a strip is cut into tiles of as many as the instruction set
// multiplies at a time. Tile t begins with column pt2_tile_begin(columns, t) of the strip, and ends where the next one
// begins. AMX's tiles are as even as can be, and the last is one of the largest.
#define PT2_STRIP_COLUMNS    128
#define PT2_TILE_COLUMNS_MAX 16
int pt2_tiles(int columns);
int pt2_tile_begin(int columns, int tile);

// Bytes of a tile of n columns of that many blocks; at least those of its columns as Q8_T.
size_t pt2_tile_size(int n, int64_t blocks);

// Quantize blocks [first, last) of the columns x[0], ..., x[n-1] into the tile, to the values that
// quantize_row_q8_t gives. perm, unless NULL: element j of a column is x[i][perm[j]].
void pt2_tile_quantize(const float * const * x, const int32_t * perm, int n, int64_t first, int64_t last, void * tile);

// out[i][r] = row r of the panels times column i of a strip, whose tiles follow each other, for the first `rows` rows.
// Which columns are multiplied together does not change their products.
void pt2_panels_dot(const block_panel * panels, int64_t rows, const void * tiles, int columns, int64_t blocks,
                    float * const * out);

#ifdef __cplusplus
}
#endif
