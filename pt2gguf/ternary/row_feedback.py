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

from pt2gguf.ternary.compensation import damped_inverse, exact_update, split_block

# Twice as many take almost twice as long on a GPU and gain next to nothing.
STEPS = 16


@dataclass(frozen=True)
class _Chunk:
    """What errors in some rows `now` of a part ask of the rows `later` of it."""

    later: slice
    effects: Tensor  # (later, now): of the errors `now` on the best targets `later`


@dataclass(frozen=True)
class RowStep:
    """Rows that are rounded together: (r,) int64, those of one part after the other."""

    rows: Tensor
    _chunks: Sequence[_Chunk]

    def compensate(self, E: Tensor, targets: Tensor) -> None:
        """Moves the `targets` (n, b) of later rows by what the errors E (r, b) of `rows` ask."""
        begin = 0
        for chunk in self._chunks:
            end = begin + chunk.effects.shape[1]
            targets[chunk.later].addmm_(chunk.effects, E[begin:end])
            begin = end


def row_steps(parts: Sequence[Tensor], damping: float) -> list[RowStep]:
    """The steps in which to round a matrix whose rows fall into parts with these G, (r, r) each.

    damping: fraction of each G's mean diagonal that is added to it.
    """
    chunks: list[list[_Chunk]] = []  # by step
    rows: list[list[Tensor]] = []
    begin = 0
    for G in parts:
        P, _ = damped_inverse(G, damping)
        end = begin + len(G)
        size = -(-len(G) // STEPS)
        for number, positions in enumerate(torch.arange(begin, end, device=G.device).split(size)):
            if number == len(chunks):
                chunks.append([])
                rows.append([])
            count = len(positions)
            left = torch.arange(len(P), device=G.device)
            factors, P = split_block(P, left[:count], left[count:])
            effects = exact_update(torch.eye(count, dtype=P.dtype, device=P.device), factors)
            chunks[number].append(_Chunk(slice(end - len(P), end), effects.T.contiguous()))
            rows[number].append(positions)
        begin = end
    return [RowStep(torch.cat(r), c) for r, c in zip(rows, chunks, strict=True)]


def all_rows_at_once(rows: int, device: torch.device) -> list[RowStep]:
    """The steps where nothing is known of the outputs."""
    return [RowStep(torch.arange(rows, device=device), [])]
