"""Second moments of inputs and of gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pt2gguf.ternary.statistics import OutputStatistics, second_moments


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


def test_output_statistics_of_bfloat16() -> None:
    """Sums are float32, of products that are rounded to eight bits."""
    statistics = OutputStatistics.empty(300, "cpu")
    g = torch.randn(4, 100, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    for batch in g:
        statistics.add(batch)
    (found,) = statistics.parts
    assert found.dtype == torch.float32
    exact = sum(batch.double().T @ batch.double() for batch in g)
    # 2^-9 of each of four products, whose sum is at most the sum of the absolute ones.
    magnitude = sum(batch.double().abs().T @ batch.double().abs() for batch in g)
    assert bool(((found - exact).abs() <= 2**-8 * magnitude).all())
