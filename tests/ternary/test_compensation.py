"""Orders, factors and updates against explicit inverses and direct minimisation, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt2gguf.errors import Pt2Error
from pt2gguf.ternary.compensation import (
    asymmetric_target,
    asymmetric_update,
    damped_inverse,
    diagonal_update,
    exact_update,
    split_block,
)
from pt2gguf.ternary.grid import grid_values
from pt2gguf.ternary.rounding import descend_digits, digits_with_feedback
from pt2gguf.ternary.ssr import select_block


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian(seed: int, columns: int) -> torch.Tensor:
    X = randn(seed, 2 * columns, columns)
    return X.T @ X / columns


def damped(H: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def metric_error(
    W: torch.Tensor, alpha: torch.Tensor, mu: torch.Tensor, T: torch.Tensor, M: torch.Tensor
) -> torch.Tensor:
    E = W - grid_values(alpha, mu, T)
    return ((E @ M) * E).sum(1)


def test_schur_complements_are_the_inverses_of_what_remains() -> None:
    columns, size = 35, 5
    H = damped(hessian(0, columns))
    P, _ = damped_inverse(hessian(0, columns), 0.01)
    shuffled = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    remaining = torch.arange(columns)
    while len(remaining) > size:
        block = shuffled[torch.isin(shuffled, remaining)][:size]
        inside = torch.isin(remaining, block)
        positions = torch.tensor([remaining.tolist().index(c) for c in block])
        rest = (~inside).nonzero().squeeze(1)
        factors, P_rest = split_block(P, positions, rest)
        expected = torch.linalg.inv(H[remaining][:, remaining])
        torch.testing.assert_close(P, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(
            factors.metric, torch.linalg.inv(expected[positions][:, positions])
        )
        # [L^T, K] are the first rows of the upper Cholesky factor in the new order.
        order = torch.cat([positions, rest])
        U = torch.linalg.cholesky(expected[order][:, order]).T
        torch.testing.assert_close(torch.cat([factors.L.T, factors.K], 1), U[:size])
        P, remaining = P_rest, remaining[rest]


def test_exact_update_minimises_the_output_error() -> None:
    H = damped(hessian(2, 12))
    P, _ = damped_inverse(hessian(2, 12), 0.01)
    block, rest = torch.tensor([3, 0, 7, 9]), torch.tensor([1, 2, 4, 5, 6, 8, 10, 11])
    factors, _ = split_block(P, block, rest)
    E = randn(3, 6, 4)
    update = exact_update(E, factors)
    # The total error is [E, -update]; its gradient by the later columns must vanish.
    total = torch.zeros(6, 12, dtype=torch.float64)
    total[:, block], total[:, rest] = E, -update
    assert (total @ H)[:, rest].abs().max() < 1e-12
    # What then remains is what `metric` says.
    torch.testing.assert_close(((total @ H) * total).sum(1), ((E @ factors.metric) * E).sum(1))


def test_diagonal_update_is_exact_for_one_column() -> None:
    P, _ = damped_inverse(hessian(4, 9), 0.01)
    factors, _ = split_block(P, torch.tensor([4]), torch.tensor([0, 1, 2, 3, 5, 6, 7, 8]))
    E = randn(5, 3, 1)
    torch.testing.assert_close(diagonal_update(E, factors), exact_update(E, factors))


def test_diagonal_update_uses_the_factors_diagonal() -> None:
    P, _ = damped_inverse(hessian(6, 9), 0.01)
    factors, _ = split_block(P, torch.arange(3), torch.arange(3, 9))
    E = randn(7, 3, 3)
    U = torch.linalg.cholesky(P).T
    expected = -(E / U.diagonal()[:3]) @ U[:3, 3:]
    torch.testing.assert_close(diagonal_update(E, factors), expected)


def test_asymmetric_update_minimises_the_difference_to_full_precision() -> None:
    tokens, columns = 40, 10
    X = randn(8, tokens, columns)
    X_full = X + 0.2 * randn(9, tokens, columns)
    H, cross = X.T @ X, (X_full - X).T @ X
    block, rest = torch.arange(3), torch.arange(3, columns)
    W = randn(10, 5, columns)
    update = asymmetric_update(
        W[:, block], cross[block][:, rest], torch.linalg.inv(H[rest][:, rest]), 1.0
    )
    missing = (X_full - X)[:, block] @ W[:, block].T  # (tokens, rows)
    expected = torch.linalg.lstsq(X[:, rest], missing).solution.T
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-11)


def test_feedback_equals_column_by_column_gptq() -> None:
    columns = 17
    H = damped(hessian(11, columns))
    P, _ = damped_inverse(hessian(11, columns), 0.01)
    factors, _ = split_block(P, torch.arange(columns), torch.arange(0))
    W, alpha, mu = randn(12, 6, columns), randn(13, 6).abs(), 0.1 * randn(14, 6)
    T = digits_with_feedback(W, alpha, mu, factors.L)
    work = W.clone()
    for j in range(columns):
        levels = torch.stack([mu - alpha, mu, mu + alpha], dim=1)
        nearest = (work[:, j : j + 1] - levels).abs().argmin(1)
        assert torch.equal(T[:, j], nearest.double() - 1)
        error = work[:, j] - levels.gather(1, nearest.unsqueeze(1)).squeeze(1)
        inverse = torch.linalg.inv(H[j:, j:])
        work[:, j:] -= error.unsqueeze(1) * inverse[0] / inverse[0, 0]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 17, 128]))
def test_descent_never_raises_the_error(seed: int, columns: int) -> None:
    M = hessian(seed, columns) + 0.01 * torch.eye(columns)
    W, alpha, mu = randn(seed + 1, 6, columns), randn(seed + 2, 6), 0.1 * randn(seed + 3, 6)
    T = randn(seed + 4, 6, columns).round().clamp(-1, 1)
    error = metric_error(W, alpha, mu, T, M)
    for _ in range(3):
        T = descend_digits(W, alpha, mu, T, M)
        assert set(T.unique().tolist()) <= {-1.0, 0.0, 1.0}
        after = metric_error(W, alpha, mu, T, M)
        assert (after <= error * (1 + 1e-10) + 1e-12).all()
        error = after


def test_descent_equals_trying_every_digit_in_turn() -> None:
    M = hessian(16, 17)
    W, alpha, mu = randn(17, 6, 17), randn(18, 6), 0.1 * randn(19, 6)
    T = randn(20, 6, 17).round().clamp(-1, 1)
    found = descend_digits(W, alpha, mu, T, M)
    for j in range(17):
        candidates = []
        for digit in (-1.0, 0.0, 1.0):
            trial = T.clone()
            trial[:, j] = digit
            candidates.append(metric_error(W, alpha, mu, trial, M))
        T[:, j] = torch.stack(candidates).argmin(0).double() - 1
    assert torch.equal(found, T)


def test_digits_of_a_flat_grid_are_zero() -> None:
    M, W, zero = hessian(21, 9), randn(22, 4, 9), torch.zeros(4, dtype=torch.float64)
    assert not digits_with_feedback(W, zero, zero, torch.linalg.cholesky(M)).any()
    T = torch.zeros(4, 9, dtype=torch.float64)
    assert not descend_digits(W, zero, zero, T, M).any()


def test_asymmetric_target_minimises_the_difference_to_full_precision() -> None:
    X = randn(23, 40, 10)
    X_full = X + 0.2 * randn(24, 40, 10)
    W = randn(25, 5, 10)
    target = asymmetric_target(W, (X_full - X).T @ X, torch.linalg.inv(X.T @ X), 1.0)
    expected = torch.linalg.lstsq(X, X_full @ W.T).solution.T
    torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-11)
    half = asymmetric_target(W, (X_full - X).T @ X, torch.linalg.inv(X.T @ X), 0.5)
    torch.testing.assert_close(half, (W + expected) / 2, rtol=1e-9, atol=1e-11)


def test_damping_rises_until_cholesky_succeeds() -> None:
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.03]).double())
    P, damping = damped_inverse(indefinite, 0.01)
    assert damping == pytest.approx(0.1)
    torch.testing.assert_close(damped(indefinite, 0.1) @ P, torch.eye(4).double())


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_rank_deficient_and_dead_columns(damping: float) -> None:
    X = randn(15, 3, 20)
    X[:, 4] = 0
    P, used = damped_inverse(X.T @ X, damping)
    assert used == 0.01
    torch.testing.assert_close(damped(X.T @ X) @ P, torch.eye(20).double(), rtol=0, atol=1e-9)


def test_no_inputs_at_all_count_as_identity() -> None:
    P, _ = damped_inverse(torch.zeros(4, 4).double(), 0.01)
    assert torch.equal(P, torch.eye(4).double())


def test_hopeless_hessians_are_refused() -> None:
    with pytest.raises(Pt2Error, match="not finite"):
        damped_inverse(torch.full((3, 3), float("nan")).double(), 0.01)
    H = torch.eye(4).double()
    H[0, 1] = H[1, 0] = 1e6
    with pytest.raises(Pt2Error, match="damping of 100"):
        damped_inverse(H, 0.01)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_ssr_against_direct_cosines(seed: int, size: int) -> None:
    W = randn(seed, 5, 40)
    unit = W / W.norm(dim=0)
    mean = unit.mean(1)
    cosine = [float(torch.dot(unit[:, j], mean) / mean.norm()) for j in range(40)]
    expected = sorted(range(40), key=lambda j: -cosine[j])[:size]
    assert select_block(W, size).tolist() == expected


def test_ssr_ties_go_to_the_lowest_position() -> None:
    assert select_block(torch.ones(3, 8).double(), 4).tolist() == [0, 1, 2, 3]
    assert select_block(torch.zeros(3, 8).double(), 4).tolist() == [0, 1, 2, 3]
    W = torch.ones(3, 4).double()
    W[:, 0] = -0.1
    W[:, 2] = 0
    assert select_block(W, 4).tolist() == [1, 3, 2, 0]
