"""Second moments of inputs and of gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pt2gguf.ternary.statistics import second_moments


@pytest.mark.parametrize("columns", [1, 3, 255, 256, 257, 600, 2100])
def test_second_moments(columns: int) -> None:
    """Within the rounding of a float32 sum, and exactly symmetric."""
    tokens = 37
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns))
    x *= torch.logspace(-3, 3, columns)
    found = second_moments(x)
    exact, magnitude = x.double().T @ x.double(), x.double().abs().T @ x.double().abs()
    assert torch.equal(found, found.T)
    assert bool(((found - exact).abs() <= tokens * np.finfo(np.float32).eps * magnitude).all())
