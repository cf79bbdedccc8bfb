"""Rounding column by column on a GPU, in one kernel.

PyTorch would launch four for each of a block's 128 columns, each of which takes longer to launch
than to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # of one warp, which keeps all of their columns in registers


def round_columns(targets: Tensor, before: Tensor | None, effects: Tensor) -> Tensor:
    """As `rounding._round_columns`; all contiguous float64, but for effects in any layout."""
    columns, rows = targets.shape
    digits = torch.empty_like(targets)
    _round_columns[(triton.cdiv(rows, ROWS),)](
        targets,
        targets if before is None else before,
        effects.contiguous(),
        digits,
        rows,
        columns,
        HAS_BEFORE=before is not None,
        COLUMNS=triton.next_power_of_2(columns),
        ROWS=ROWS,
        num_warps=1,
    )
    return digits


@triton.jit  # type: ignore[untyped-decorator]
def _round_columns(  # type: ignore[no-untyped-def]
    targets,
    before,
    effects,
    digits,
    rows,
    columns,
    HAS_BEFORE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    place = column[:, None] * rows + row[None, :]
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    x = tl.load(targets + place, mask=inside, other=0.0)
    for j in range(columns):
        target = tl.sum(tl.where((column == j)[:, None], x, 0.0), axis=0)
        start = target
        if HAS_BEFORE:
            start = tl.load(before + j * rows + row, mask=row < rows, other=0.0)
        later = (column > j) & (column < columns)
        effect = tl.load(effects + j * columns + column, mask=later, other=0.0)
        x += effect[:, None] * (_digit(target) - start)[None, :]
    tl.store(digits + place, _digit(x), mask=inside)


@triton.jit
def _digit(x):  # type: ignore[no-untyped-def]
    """The nearest of -1, 0 and 1; 0 in the middle, as torch.round has it."""
    return (x > 0.5).to(tl.float64) - (x < -0.5).to(tl.float64)
