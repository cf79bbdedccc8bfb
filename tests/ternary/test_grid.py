"""The grid's closed forms, ITF and AGA against numpy's least squares, all in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt2gguf.errors import Pt2Error
from pt2gguf.ternary.grid import (
    activation_aware_grid,
    fit_grid,
    grid_values,
    initial_grid,
    iterative_ternary_fitting,
    nearest_digits,
    nonnegative_scale,
    round_to_half,
)


def random_block(seed: int, rows: int = 7, columns: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64) + 0.3
    T = torch.randint(-1, 2, (rows, columns), generator=generator).double()
    return W, T


def random_metric(seed: int, columns: int = 33) -> torch.Tensor:
    X = torch.randn(
        3 * columns, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return X.T @ X


def squared_error(
    W: torch.Tensor, alpha: torch.Tensor, mu: torch.Tensor, T: torch.Tensor
) -> torch.Tensor:
    return (W - grid_values(alpha, mu, T)).square().sum(1)


def metric_error(
    W: torch.Tensor, alpha: torch.Tensor, mu: torch.Tensor, T: torch.Tensor, S: torch.Tensor
) -> torch.Tensor:
    E = W - grid_values(alpha, mu, T)
    return ((E @ S) * E).sum(1)


def test_initial_grid_row_by_row() -> None:
    W, _ = random_block(0)
    alpha, mu, T = initial_grid(W)
    for i, row in enumerate(W.numpy()):
        centred = row - row.mean()
        threshold = 0.75 * np.abs(centred).mean()
        digits = np.where(centred > threshold, 1, np.where(centred < -threshold, -1, 0))
        assert mu[i].item() == pytest.approx(row.mean(), rel=1e-12)
        np.testing.assert_array_equal(T[i].numpy(), digits)
        expected = np.linalg.lstsq(digits[:, None].astype(float), centred, rcond=None)[0][0]
        assert alpha[i].item() == pytest.approx(expected, rel=1e-12)


def test_fit_grid_is_least_squares() -> None:
    W, T = random_block(1)
    alpha, mu = fit_grid(W, T)
    for i in range(len(W)):
        A = np.stack([T[i].numpy(), np.ones(W.shape[1])], axis=1)
        expected = np.linalg.lstsq(A, W[i].numpy(), rcond=None)[0]
        np.testing.assert_allclose([alpha[i], mu[i]], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("digit", [-1.0, 0.0, 1.0])
def test_fit_grid_of_equal_digits_is_the_mean(digit: float) -> None:
    W, T = random_block(2)
    alpha, mu = fit_grid(W, torch.full_like(T, digit))
    assert not alpha.any()
    torch.testing.assert_close(mu, W.mean(1), rtol=1e-14, atol=0)


def test_activation_aware_grid_is_weighted_least_squares() -> None:
    W, T = random_block(3)
    S = random_metric(4)
    alpha, mu, singular = activation_aware_grid(W, T, S, torch.zeros(7), torch.zeros(7))
    assert not singular.any()
    root = np.linalg.cholesky(S.numpy()).T  # e S e^T = |root e|^2
    for i in range(len(W)):
        A = root @ np.stack([T[i].numpy(), np.ones(W.shape[1])], axis=1)
        expected = np.linalg.lstsq(A, root @ W[i].numpy(), rcond=None)[0]
        np.testing.assert_allclose([alpha[i], mu[i]], expected, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 5, 33, 128]))
def test_activation_aware_grid_never_raises_the_output_error(seed: int, columns: int) -> None:
    W, _ = random_block(seed, columns=columns)
    S = random_metric(seed + 1, columns)
    alpha, mu, T, _ = iterative_ternary_fitting(W, initial_grid(W)[2])
    before = metric_error(W, alpha, mu, T, S)
    after = metric_error(W, *activation_aware_grid(W, T, S, alpha, mu)[:2], T, S)
    scale = ((W @ S) * W).sum(1)
    assert (after <= before + 1e-10 * scale).all()


def test_singular_rows_keep_their_grid() -> None:
    W, T = random_block(5)
    T[0], T[1], T[2] = 0, 1, -1
    alpha, mu = torch.arange(7).double(), torch.arange(7).double() / 2
    new_alpha, new_mu, singular = activation_aware_grid(W, T, random_metric(6), alpha, mu)
    assert singular.tolist() == [True] * 3 + [False] * 4
    assert new_alpha[:3].tolist() == alpha[:3].tolist()
    assert new_mu[:3].tolist() == mu[:3].tolist()
    # A metric that sees nothing leaves every row as it was.
    nothing = torch.zeros(33, 33, dtype=torch.float64)
    assert activation_aware_grid(W, T, nothing, alpha, mu)[2].all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 5, 33, 128]), st.sampled_from([1e-9, 1, 1e4]))
def test_itf_error_never_rises(seed: int, columns: int, scale: float) -> None:
    W, _ = random_block(seed, columns=columns)
    W *= scale
    alpha, mu, T = initial_grid(W)
    errors = [squared_error(W, alpha, mu, T)]
    for _ in range(12):
        alpha, mu = fit_grid(W, T)
        errors.append(squared_error(W, alpha, mu, T))
        T = nearest_digits(W, alpha, mu)
        errors.append(squared_error(W, alpha, mu, T))
    slack = 1e-12 * W.square().sum(1)
    for before, after in itertools.pairwise(errors):
        assert (after <= before + slack).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_itf_ends_at_a_fixed_point(seed: int) -> None:
    W, _ = random_block(seed, columns=128)
    alpha, mu, T, rounds = iterative_ternary_fitting(W, initial_grid(W)[2])
    assert 1 <= rounds < 100
    torch.testing.assert_close(torch.stack(fit_grid(W, T)), torch.stack([alpha, mu]))
    assert torch.equal(nearest_digits(W, alpha, mu), T)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 65504.0, 1e-30])
def test_itf_of_constant_rows_is_exact(value: float) -> None:
    W = torch.full((3, 128), value, dtype=torch.float64)
    alpha, mu, T, _ = iterative_ternary_fitting(W, initial_grid(W)[2])
    torch.testing.assert_close(grid_values(alpha, mu, T), W, rtol=1e-14, atol=0)


def test_itf_of_an_exact_ternary_row_is_exact() -> None:
    _, T = random_block(7, columns=128)
    W = grid_values(torch.full((7,), 0.7).double(), torch.full((7,), -0.2).double(), T)
    alpha, mu, found, _ = iterative_ternary_fitting(W, initial_grid(W)[2])
    torch.testing.assert_close(grid_values(alpha, mu, found), W, rtol=0, atol=1e-14)


def test_nearest_digits_against_all_three_values() -> None:
    W, _ = random_block(8)
    alpha = torch.linspace(-1, 1, 7).double()  # both signs, and 0
    mu = torch.linspace(0.5, -0.5, 7).double()
    T = nearest_digits(W, alpha, mu)
    distances = torch.stack(
        [(W - grid_values(alpha, mu, torch.full_like(W, t))).abs() for t in (-1.0, 0.0, 1.0)]
    )
    chosen = (W - grid_values(alpha, mu, T)).abs()
    torch.testing.assert_close(chosen, distances.min(0).values, rtol=0, atol=1e-15)
    assert not T[alpha == 0].any()


def test_nonnegative_scale_keeps_the_values() -> None:
    _, T = random_block(9)
    alpha = torch.linspace(-1, 1, 7).double()
    mu = torch.ones(7).double()
    new_alpha, new_T = nonnegative_scale(alpha, T)
    assert (new_alpha >= 0).all()
    assert torch.equal(grid_values(new_alpha, mu, new_T), grid_values(alpha, mu, T))


def test_round_to_half_limits() -> None:
    assert round_to_half(torch.tensor([65519.0]).double(), "scale").item() == 65504
    with pytest.raises(Pt2Error, match=r"scale of 65520 does not fit float16"):
        round_to_half(torch.tensor([65520.0]).double(), "scale")
    with pytest.raises(Pt2Error, match="offset"):
        round_to_half(torch.tensor([-1e9]).double(), "offset")
