"""The numbers of a picture, against numpy in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt2gguf.blocks import BLOCK_SIZE
from pt2gguf.plotting.summary import (
    BINS,
    WIDEST,
    block_variances,
    similarity_order,
    summarize,
)
from pt2gguf.ternary import METHODS, InputStatistics, TernaryWeight, ternarize


def random_weights(rows: int, blocks: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(rows, blocks * BLOCK_SIZE, generator=generator) + 0.003


def random_ternary(rows: int, blocks: int, perm: bool = False) -> TernaryWeight:
    generator = torch.Generator().manual_seed(1)
    columns = blocks * BLOCK_SIZE
    return TernaryWeight(
        alpha=(0.02 * torch.rand(rows, blocks, generator=generator) + 0.01).half(),
        mu=(0.01 * torch.randn(rows, blocks, generator=generator)).half(),
        digits=torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8),
        perm=torch.randperm(columns, generator=generator) if perm else None,
    )


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), blocks=st.integers(1, 4), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_block_variances(rows: int, blocks: int, scale: float) -> None:
    W = random_weights(rows, blocks) * scale
    values = W.numpy().astype(np.float64)
    for block, variance in enumerate(block_variances(W)):
        part = values[:, block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
        expected = np.mean([np.mean((row - row.mean()) ** 2) for row in part])
        assert variance == pytest.approx(expected, rel=1e-12)


def test_variance_is_the_error_of_one_level() -> None:
    """A block whose rows are constant has none, however much its rows differ."""
    W = torch.arange(5.0).unsqueeze(1).expand(5, BLOCK_SIZE)
    assert block_variances(W).tolist() == [0.0]


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 5), seed=st.integers(0, 99))
def test_similarity_order(rows: int, blocks: int, seed: int) -> None:
    """Each block holds the remaining columns of highest cosine similarity to their mean."""
    W = random_weights(rows, blocks, seed)
    order = similarity_order(W).numpy()
    values = W.numpy().astype(np.float64)
    directions = values / np.linalg.norm(values, axis=0)
    assert sorted(order) == list(range(W.shape[1]))
    for start in range(0, len(order), BLOCK_SIZE):
        remaining, chosen = order[start:], order[start : start + BLOCK_SIZE]
        reference = directions[:, remaining].mean(axis=1)
        similarity = dict(zip(remaining, reference @ directions[:, remaining], strict=True))
        left_out = [similarity[column] for column in remaining[BLOCK_SIZE:]]
        # float32 similarities of at most 1 over `rows` terms; those that tie may change places
        tolerance = 1e-5
        assert min(similarity[c] for c in chosen) >= max(left_out, default=-1) - tolerance


def test_order_is_that_of_a_conversion_without_compensation() -> None:
    W = random_weights(33, 4)
    statistics = InputStatistics(W.shape[1], "cpu", with_full_precision=False)
    statistics.add(torch.randn(600, W.shape[1]))
    method = replace(METHODS["paper"], gptq=False, gptaq=0.0)
    weight, _ = ternarize(W, statistics, method)
    assert weight.perm is not None
    assert torch.equal(similarity_order(W.double()), weight.perm)


def test_similar_columns_are_brought_together() -> None:
    """Interleaved columns of two offsets: SSR parts them, and takes the offsets out of blocks."""
    W = random_weights(64, 2)
    W[:, ::2] += 1.0
    W[:, 1::2] -= 0.5
    summary = summarize("w", W, None)
    assert not summary.stored_order
    assert summary.natural.min() > 0.5  # 0.75 ** 2 and a little
    assert summary.reordered.max() < 0.001  # 0.02 ** 2 and a little


def test_histogram_and_moments() -> None:
    W = random_weights(37, 3)
    summary = summarize("w", W, None)
    values = W.numpy().astype(np.float64)
    centred = values - values.mean()
    assert summary.mean == pytest.approx(values.mean(), rel=1e-12)
    assert summary.deviation == pytest.approx(values.std(), rel=1e-12)
    kurtosis = (centred**4).mean() / values.var() ** 2 - 3
    assert summary.kurtosis == pytest.approx(kurtosis, abs=1e-9)
    assert summary.largest == pytest.approx(np.abs(centred).max() / values.std(), rel=1e-9)
    assert summary.edges.shape == (BINS + 1,)
    assert summary.weights.sum() == W.numel()  # nothing of a Gaussian is farther than 8 deviations
    inside = (values >= summary.edges[40]) & (values < summary.edges[41])
    assert summary.weights[40] == inside.sum()
    assert summary.levels is None


def test_outliers_do_not_widen_the_histogram() -> None:
    W = random_weights(200, 2)
    W[3, 5] = 50.0
    summary = summarize("w", W, None)
    assert summary.largest > 100
    assert summary.edges[-1] - summary.mean == pytest.approx(WIDEST * summary.deviation)
    assert summary.weights.sum() == W.numel() - 1


def test_constant_and_huge_weights() -> None:
    constant = summarize("w", torch.full((3, BLOCK_SIZE), 0.25), None)
    assert (constant.deviation, constant.kurtosis, constant.largest) == (0, 0, 0)
    assert constant.weights.sum() == 3 * BLOCK_SIZE
    huge = summarize("w", random_weights(8, 1) * 1e38, None)
    assert np.isfinite([huge.deviation, huge.kurtosis, *huge.natural, *huge.edges]).all()


def test_ternary_levels() -> None:
    W, ternary = random_weights(19, 3), random_ternary(19, 3)
    summary = summarize("w", W, ternary)
    assert summary.levels is not None
    alpha, mu = ternary.alpha.numpy().astype(np.float64), ternary.mu.numpy().astype(np.float64)
    digits = ternary.digits.numpy()
    for index, digit in enumerate((-1, 0, 1)):
        values = (np.repeat(alpha, BLOCK_SIZE, 1) * digit + np.repeat(mu, BLOCK_SIZE, 1))[
            digits == digit
        ]
        assert np.array_equal(summary.levels[index], np.histogram(values, summary.edges)[0])


def test_stored_order() -> None:
    W, ternary = random_weights(19, 3), random_ternary(19, 3, perm=True)
    summary = summarize("w", W, ternary)
    assert summary.stored_order
    assert ternary.perm is not None
    assert np.array_equal(summary.reordered, block_variances(W[:, ternary.perm]))
