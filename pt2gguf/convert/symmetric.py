"""Symmetric matrices in half of their space.

The lower triangle's rows are put together in pairs, the last one before the first one's entries in
reverse, and so on: each pair has n + 1 entries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold(A: Tensor) -> Tensor:
    """(n, n), of which the lower triangle is read -> (ceil(n / 2), n + 1)."""
    n = len(A)
    half = (n + 1) // 2
    beside = A.new_zeros(half, 1)
    late = torch.cat([A[n - half :].flip(0), beside], dim=1)
    early = torch.cat([beside, A[:half].flip(1)], dim=1)
    return torch.where(_is_late(n, A.device), late, early)


def unfold(folded: Tensor) -> Tensor:
    """The inverse of `fold`: (n, n), both triangles."""
    n = folded.shape[1] - 1
    is_late = _is_late(n, folded.device)
    late = torch.where(is_late, folded, 0)[:, :n].flip(0)
    early = torch.where(is_late, 0, folded).flip(1)[: n // 2, :n]
    lower = torch.cat([early, late])
    return lower + lower.tril(-1).T


def is_folded(matrix: Tensor) -> bool:
    """Whether it has a shape that `fold` gives."""
    return len(matrix) == matrix.shape[1] // 2


def _is_late(n: int, device: torch.device) -> Tensor:
    """(ceil(n / 2), n + 1): whether an entry is of the pair's later row."""
    pair = torch.arange((n + 1) // 2, device=device).unsqueeze(1)
    return torch.arange(n + 1, device=device) < n - pair
