// Panels times tiles of many columns with the matrix instructions of Intel's AMX.
#pragma once

#include "pt2-panel.h"

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__linux__)
#define PT2_AMX
#endif

// Whether the instructions are there, and the system lets this process use them.
bool pt2_amx_is_usable();

// As pt2_panels_dot, to the last bit, where tiles have up to PT2_TILE_COLUMNS_MAX columns: the rows of a tile register.
void pt2_amx_panels_dot(const block_panel * panels, int64_t rows, const void * tiles, int columns, int64_t blocks,
                        float * const * out);
