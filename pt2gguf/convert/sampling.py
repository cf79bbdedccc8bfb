"""Drawing tokens from a model's predictions."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 1) int64: an index into each row of probabilities (n, v), by a generator of the CPU.

    torch.multinomial takes several times as long on a CPU. Integers sum up to the same everywhere.
    """
    cumulative = (probabilities * 2.0**40).long().cumsum(-1)
    shares = torch.rand(len(probabilities), 1, dtype=torch.float64, generator=generator)
    thresholds = (shares.to(probabilities.device) * cumulative[:, -1:]).long()
    return torch.searchsorted(cumulative, thresholds, right=True)
