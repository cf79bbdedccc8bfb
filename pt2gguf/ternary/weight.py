"""A ternarized weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TernaryWeight:
    """W ~ alpha * T + mu with one alpha and one mu for every row and block of columns.

    alpha: (n, m / block) float16, never negative.
    mu: (n, m / block) float16.
    digits: (n, m) int8 in {-1, 0, 1}, in stored column order.
    perm: (m,) int64, stored column j is original column perm[j]; None is the identity.
    """

    alpha: Tensor
    mu: Tensor
    digits: Tensor
    perm: Tensor | None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(n, m) in the original column order: alpha * T + mu in float32, then cast to `dtype`."""
        rows, columns = self.digits.shape
        digits = self.digits.view(rows, self.alpha.shape[1], -1).float()
        stored = digits * self.alpha.float().unsqueeze(2) + self.mu.float().unsqueeze(2)
        stored = stored.view(rows, columns).to(dtype)
        if self.perm is None:
            return stored
        return stored.index_select(1, torch.argsort(self.perm))
