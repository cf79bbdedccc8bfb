"""Ternary weights in full, and the gradients of their grids.

PyTorch would unpack, scale, permute and round in a dozen operations, each of which passes over all
of a weight, and which take two and a half times as long as the products with it (LLaMA-7B, H100).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pt2gguf.blocks import BLOCK_SIZE

ROWS = 4
COLUMNS = 512
BLOCKS = 8  # of a row, at once


def dense(
    alpha: Tensor, mu: Tensor, digits: Tensor, inverse: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(n, m) of that type: alpha * T + mu, whose column j is the stored column inverse[j].

    alpha, mu: (n, m / 128) float32; digits: (n, m / 4) uint8, as `pack_digits` makes it; inverse:
    (m,) int32; all contiguous.
    """
    rows, columns = len(digits), 4 * digits.shape[1]
    weight = torch.empty(rows, columns, dtype=dtype, device=digits.device)
    _dense[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        alpha,
        mu,
        digits,
        digits if inverse is None else inverse,
        weight,
        rows,
        columns,
        PERMUTED=inverse is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        BLOCK=BLOCK_SIZE,
    )
    return weight


def grid_gradients(gradient: Tensor, digits: Tensor, perm: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of alpha and mu, (n, m / 128) float32, from the gradient (n, m) of what `dense` makes.

    perm: (m,) int32, the inverse of `inverse`; all contiguous.
    """
    rows, columns = gradient.shape
    of_alpha, of_mu = torch.empty(2, rows, columns // BLOCK_SIZE, device=gradient.device)
    _grid_gradients[(rows,)](
        gradient,
        digits,
        digits if perm is None else perm,
        of_alpha,
        of_mu,
        columns,
        PERMUTED=perm is not None,
        BLOCKS=BLOCKS,
        BLOCK=BLOCK_SIZE,
    )
    return of_alpha, of_mu


@triton.jit  # type: ignore[untyped-decorator]
def _dense(  # type: ignore[no-untyped-def]
    alpha,
    mu,
    digits,
    inverse,
    weight,
    rows,
    columns,
    PERMUTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    stored = column
    if PERMUTED:
        stored = tl.load(inverse + column, mask=column < columns, other=0)
    block = row.to(tl.int64)[:, None] * (columns // BLOCK) + (stored // BLOCK)[None, :]
    digit = _digit(digits, block, (stored % BLOCK)[None, :], inside, BLOCK)
    scale = tl.load(alpha + block, mask=inside, other=0.0)
    value = tl.load(mu + block, mask=inside, other=0.0) + scale * digit
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(weight + place, value.to(weight.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _grid_gradients(  # type: ignore[no-untyped-def]
    gradient,
    digits,
    perm,
    of_alpha,
    of_mu,
    columns,
    PERMUTED: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    blocks = columns // BLOCK
    within = tl.arange(0, BLOCK)[None, :]
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        inside = block < blocks
        column = block[:, None] * BLOCK + within
        if PERMUTED:
            column = tl.load(perm + column, mask=inside[:, None], other=0)
        slope = tl.load(gradient + row * columns + column, mask=inside[:, None], other=0.0)
        slope = slope.to(tl.float32)
        place = row * blocks + block
        digit = _digit(digits, place[:, None], within, inside[:, None], BLOCK)
        tl.store(of_alpha + place, tl.sum(slope * digit, axis=1), mask=inside)
        tl.store(of_mu + place, tl.sum(slope, axis=1), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _digit(digits, block, within, inside, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """-1, 0 or 1, float32: that of a block's column, as `pack_digits` packs it."""
    quarter: tl.constexpr = BLOCK // 4
    byte = tl.load(digits + block * quarter + within % quarter, mask=inside, other=1).to(tl.int32)
    return ((byte >> 2 * (within // quarter)) & 3).to(tl.float32) - 1.0
