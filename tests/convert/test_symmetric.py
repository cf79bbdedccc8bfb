"""Symmetric matrices in half of their space."""

from __future__ import annotations

import pytest
import torch

from pt2gguf.convert.resources import FOLDED
from pt2gguf.convert.symmetric import fold, is_folded, unfold


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 64, 129])
def test_exactly_the_lower_triangle(n: int) -> None:
    A = torch.randn(n, n)
    folded = fold(A)
    assert is_folded(folded)
    assert not is_folded(A)
    assert folded.nbytes <= A.nbytes // 2 + FOLDED * n
    assert torch.equal(unfold(folded), A.tril() + A.tril(-1).T)
