"""Drawing tokens."""

from __future__ import annotations

import pytest
import torch

from pt2gguf.convert.sampling import draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequencies_are_the_probabilities(dtype: torch.dtype) -> None:
    count, size = 200_000, 23
    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(size, generator=generator)).softmax(-1).to(dtype)
    probabilities[[0, 7, size - 1]] = 0.0
    probabilities /= probabilities.sum()
    tokens = draw(probabilities.expand(count, size), generator)
    assert tokens.shape == (count, 1)
    found = torch.bincount(tokens[:, 0], minlength=size)
    assert not found[[0, 7, size - 1]].any()
    expected = count * probabilities
    spread = (expected * (1 - probabilities)).sqrt()
    assert bool(((found - expected).abs() <= 5 * spread).all())


def test_each_row_has_its_own_probabilities() -> None:
    certain = torch.eye(9).flip(1)
    tokens = draw(certain, torch.Generator().manual_seed(0))
    assert tokens[:, 0].tolist() == list(range(8, -1, -1))


def test_the_generator_decides() -> None:
    probabilities = torch.full((50, 100), 0.01)
    first, again, other = (
        draw(probabilities, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
