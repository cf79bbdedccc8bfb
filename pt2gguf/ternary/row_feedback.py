"""Compensating a row's error in the rows after it.

To second order, the model's divergence rises by tr(G E H E^T) when a matrix changes by E = W - Q:
H are the inputs' second moments, and G (n, n) those of the gradients at the outputs. GPTQ takes G
as the identity, so that rows do not matter to each other. With G known, later rows can make up for
earlier ones exactly as later columns do: for rows C with error E_C, the best that the rows R after
them can do is to move by (G_RR)^-1 G_RC E_C (the two-sided feedback of YAQA, Tseng et al. 2025).
That is `compensation.exact_update`, transposed.

Rows fall into parts, each with a G of its own, and a part is rounded in a few steps: rows of one
step do not see each other's errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pt2gguf.ternary.compensation import BlockFactors, damped_inverse, exact_update, split_block

# Twice as many take almost twice as long on a GPU and gain next to nothing.
STEPS = 16


@dataclass(frozen=True)
class _Chunk:
    """Rows `now` of one part, and the rows `later` of it with what compensates in them."""

    now: slice
    later: slice
    factors: BlockFactors


@dataclass(frozen=True)
class RowStep:
    """Rows that are rounded together: (r,) int64."""

    rows: Tensor
    _chunks: Sequence[_Chunk]

    def compensate(self, E: Tensor, targets: Tensor) -> None:
        """Moves the `targets` (n, b) of later rows by what the errors E (n, b) of `rows` ask."""
        for chunk in self._chunks:
            targets[chunk.later] += exact_update(E[chunk.now].T, chunk.factors).T


def row_steps(parts: Sequence[Tensor], damping: float) -> list[RowStep]:
    """The steps in which to round a matrix whose rows fall into parts with these G, (r, r) each.

    damping: fraction of each G's mean diagonal that is added to it.
    """
    steps: list[list[_Chunk]] = []
    begin = 0
    for G in parts:
        P, _ = damped_inverse(G, damping)
        end = begin + len(G)
        size = -(-len(G) // STEPS)
        for number, first in enumerate(range(begin, end, size)):
            last = min(first + size, end)
            positions = torch.arange(len(P), device=P.device)
            factors, P = split_block(P, positions[: last - first], positions[last - first :])
            if number == len(steps):
                steps.append([])
            steps[number].append(_Chunk(slice(first, last), slice(last, end), factors))
        begin = end
    return [RowStep(_rows(chunks), chunks) for chunks in steps]


def all_rows_at_once(rows: int, device: torch.device) -> list[RowStep]:
    """The steps where nothing is known of the outputs."""
    return [RowStep(torch.arange(rows, device=device), [])]


def _rows(chunks: Sequence[_Chunk]) -> Tensor:
    device = chunks[0].factors.L.device
    return torch.cat([torch.arange(c.now.start, c.now.stop, device=device) for c in chunks])
