"""Whole layers: against a slow, obvious reference, at the extremes, and what the report says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from pt2gguf.errors import Pt2Error
from pt2gguf.ternary import METHODS, InputStatistics, Method, NonFiniteInputs, ternarize
from pt2gguf.ternary.grid import initial_grid, iterative_ternary_fitting


def statistics(seed: int, columns: int, tokens: int = 400) -> InputStatistics:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mixing + 0.3
    x_full = x + 0.1 * torch.randn(tokens, columns, generator=generator)
    result = InputStatistics(columns, "cpu", with_full_precision=True)
    result.add(x[:150], x_full[:150])
    result.add(x[150:], x_full[150:])
    return result


def weights(seed: int, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(rows, columns, generator=generator)


def slow_paper(W: np.ndarray, H: np.ndarray, C: np.ndarray, method: Method) -> np.ndarray:
    """PT2-LLM with explicit inverses, one row and one column at a time. Returns Q."""
    rows, columns = W.shape
    size = method.block_size
    H_damped = H + method.damping * H.diagonal().mean() * np.eye(columns)
    W = W.copy()
    Q = np.zeros_like(W)
    remaining = list(range(columns))
    if method.reorder_by == "hessian":
        remaining = list(np.argsort(-np.diag(H), kind="stable"))
    while remaining:
        if method.ssr and method.reorder_by == "similarity":
            unit = W[:, remaining] / np.linalg.norm(W[:, remaining], axis=0)
            mean = unit.mean(1)
            cosine = unit.T @ mean / np.linalg.norm(mean)
            block = [remaining[j] for j in np.argsort(-cosine, kind="stable")[:size]]
        else:
            block = remaining[:size]
        rest = [j for j in remaining if j not in block]
        S = H[np.ix_(block, block)]
        for i in range(rows):
            w = W[i, block]
            mu = w.mean()
            t = np.where(np.abs(w - mu) > 0.75 * np.abs(w - mu).mean(), np.sign(w - mu), 0)
            alpha = (t @ (w - mu)) / (t @ t)
            while method.itf:
                A = np.stack([t, np.ones(size)], axis=1)
                alpha, mu = np.linalg.lstsq(A, w, rcond=None)[0]
                levels = np.array([mu - alpha, mu, mu + alpha])
                new = np.abs(w[:, None] - levels).argmin(1) - 1.0
                if (new == t).all():
                    break
                t = new
            if method.aga:
                A = np.stack([t, np.ones(size)], axis=1)
                alpha, mu = np.linalg.solve(A.T @ S @ A, A.T @ S @ w)
            Q[i, block] = np.float64(np.float16(alpha)) * t + np.float64(np.float16(mu))
        if rest:
            order = block + rest
            # Upper factor: inv(H in this order) = U^T U.
            U = np.linalg.cholesky(np.linalg.inv(H_damped[np.ix_(order, order)])).T
            update = np.zeros((rows, len(rest)))
            if method.gptq:
                for j in range(size):
                    error = (W[:, block[j]] - Q[:, block[j]]) / U[j, j]
                    update -= np.outer(error, U[j, size:])
            inverse = np.linalg.inv(H_damped[np.ix_(rest, rest)])
            update += method.gptaq * W[:, block] @ C[np.ix_(block, rest)] @ inverse
            W[:, rest] += update
        remaining = rest
    return Q


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"itf": False},
        {"aga": False},
        {"ssr": False},
        {"reorder_by": "hessian"},
        {"gptq": False},
        {"gptaq": 0.0},
        {"block_size": 32},
        {"itf": False, "aga": False, "ssr": False, "gptq": False, "gptaq": 0.0},
    ],
)
def test_paper_layer_against_the_slow_reference(switches: dict[str, object]) -> None:
    method = dataclasses.replace(METHODS["paper"], **{"block_size": 16, **switches})
    W, stats = weights(0, 9, 96), statistics(1, 96)
    assert stats.cross is not None
    weight, report = ternarize(W, stats, method)
    Q = slow_paper(W.double().numpy(), stats.hessian.numpy(), stats.cross.numpy(), method)
    # Same digits and float16 grid; only the reference's float64 sums against float32's alpha*T+mu.
    np.testing.assert_allclose(weight.dequantize(torch.float64).numpy(), Q, rtol=0, atol=1e-8)
    E, H = W.double().numpy() - Q, stats.hessian.numpy()
    energy = np.trace(W.double().numpy() @ H @ W.double().numpy().T)
    assert report.relative_error == pytest.approx(np.trace(E @ H @ E.T) / energy, rel=1e-5)
    assert report.blocks == 96 // method.block_size
    assert (report.itf_rounds > 0) == method.itf


def test_the_default_has_less_error_than_the_paper() -> None:
    W, stats = weights(2, 64, 256), statistics(3, 256, tokens=2000)
    errors = {
        name: ternarize(W, stats, method)[1].relative_error for name, method in METHODS.items()
    }
    assert errors["default"] < 0.95 * errors["paper"]


def test_random_order_is_a_fixed_permutation() -> None:
    W, stats = weights(0, 9, 256), statistics(1, 256)
    method = dataclasses.replace(METHODS["default"], reorder_by="random")
    weight, _ = ternarize(W, stats, method)
    other, _ = ternarize(weights(2, 9, 256), statistics(3, 256), method)
    assert weight.perm is not None
    assert weight.perm.sort().values.tolist() == list(range(256))
    assert weight.perm.tolist() != list(range(256))
    assert torch.equal(weight.perm, other.perm)


@pytest.mark.parametrize("name", METHODS)
def test_shapes_order_and_determinism(name: str) -> None:
    W, stats = weights(4, 5, 384), statistics(5, 384)
    before = W.clone()
    weight, report = ternarize(W, stats, METHODS[name])
    again, _ = ternarize(W, stats, METHODS[name])
    assert torch.equal(W, before)
    assert weight.alpha.shape == weight.mu.shape == (5, 3)
    assert weight.alpha.dtype == weight.mu.dtype == torch.float16
    assert weight.digits.shape == (5, 384)
    assert weight.digits.dtype == torch.int8
    assert weight.digits.unique().tolist() == [-1, 0, 1]
    assert (weight.alpha >= 0).all()
    assert report.blocks == 3
    if weight.perm is not None:
        assert weight.perm.sort().values.tolist() == list(range(384))
    # Element by element: stored column j is original column perm[j].
    perm = range(384) if weight.perm is None else weight.perm.tolist()
    dense = weight.dequantize()
    for stored, column in enumerate(perm):
        grid = weight.alpha[:, stored // 128].float(), weight.mu[:, stored // 128].float()
        expected = grid[0] * weight.digits[:, stored] + grid[1]
        assert torch.equal(dense[:, column], expected)
    for field in ("alpha", "mu", "digits"):
        assert torch.equal(getattr(weight, field), getattr(again, field))


def test_columns_with_ssr_do_not_depend_on_their_first_order() -> None:
    """Shuffling a layer's columns shuffles its result, because SSR looks at contents only."""
    W, stats = weights(6, 16, 256), statistics(7, 256)
    shuffle = torch.randperm(256, generator=torch.Generator().manual_seed(8))
    shuffled = InputStatistics(256, "cpu", with_full_precision=True)
    shuffled.tokens = stats.tokens
    shuffled._products += stats._products[shuffle][:, shuffle]
    assert stats._cross is not None
    assert shuffled._cross is not None
    shuffled._cross += stats._cross[shuffle][:, shuffle]
    plain, _ = ternarize(W, stats, METHODS["paper"])
    other, _ = ternarize(W[:, shuffle], shuffled, METHODS["paper"])
    assert torch.equal(plain.dequantize()[:, shuffle], other.dequantize())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 60000.0, 1e-30])
def test_constant_rows(name: str, value: float) -> None:
    W = torch.full((3, 128), value)
    # GPTAQ's term would move the weights that are to be met.
    method = dataclasses.replace(METHODS[name], gptaq=0.0)
    weight, report = ternarize(W, statistics(9, 128), method)
    half = float(np.float16(value))
    # One block of equal weights is its offset, up to the offset's rounding to float16.
    assert torch.allclose(weight.dequantize(), torch.full_like(W, half), rtol=1e-3, atol=1e-7)
    assert np.isfinite(report.relative_error)


@pytest.mark.parametrize("name", METHODS)
def test_zero_rows_among_others_stay_zero(name: str) -> None:
    W = weights(10, 6, 256)
    W[2] = 0
    method = dataclasses.replace(METHODS[name], gptaq=0.0)
    dense = ternarize(W, statistics(11, 256), method)[0].dequantize()
    assert not dense[2].any()
    assert dense[[0, 1, 3, 4, 5]].any(1).all()


@pytest.mark.parametrize("name", METHODS)
def test_dead_and_rank_deficient_inputs(name: str) -> None:
    stats = InputStatistics(256, "cpu", with_full_precision=True)
    x = torch.randn(10, 256, generator=torch.Generator().manual_seed(12))
    x[:, ::3] = 0
    stats.add(x, x)
    weight, report = ternarize(weights(13, 8, 256), stats, METHODS[name])
    assert torch.isfinite(weight.dequantize()).all()
    assert 0 <= report.relative_error < 1
    assert report.damping == METHODS[name].damping


@pytest.mark.parametrize("name", METHODS)
def test_no_inputs_at_all(name: str) -> None:
    stats = InputStatistics(128, "cpu", with_full_precision=True)
    stats.add(torch.zeros(4, 128), torch.zeros(4, 128))
    weight, report = ternarize(weights(14, 4, 128), stats, METHODS[name])
    assert torch.isfinite(weight.dequantize()).all()
    assert report.relative_error == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    W = weights(15, 4, 128)
    W[1, 5] = W[2, 7] = bad
    with pytest.raises(Pt2Error, match="2 weights are NaN or infinite"):
        ternarize(W, statistics(16, 128), METHODS["default"])


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(Pt2Error, match=r"does not fit float16 \(largest 65504\)"):
        ternarize(1e8 * weights(17, 4, 128), statistics(18, 128), METHODS["default"])


def test_what_callers_must_not_do() -> None:
    with pytest.raises(ValueError, match="no multiple of the block size 128"):
        ternarize(weights(19, 4, 130), statistics(20, 130), METHODS["default"])
    alone = InputStatistics(128, "cpu", with_full_precision=False)
    alone.add(torch.ones(3, 128))
    with pytest.raises(ValueError, match="full-precision inputs"):
        ternarize(weights(21, 4, 128), alone, METHODS["paper"])
    with pytest.raises(ValueError, match="x_full"):
        alone.add(torch.ones(3, 128), torch.ones(3, 128))


def test_statistics_are_the_second_moments() -> None:
    generator = torch.Generator().manual_seed(22)
    x = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    x_full = x + torch.randn(50, 7, generator=generator, dtype=torch.float64)
    stats = InputStatistics(7, "cpu", with_full_precision=True)
    for part in torch.arange(50).split(13):
        stats.add(x[part], x_full[part])
    assert stats.tokens == 50
    # Products of 13 float32 terms: their rounding is below 13 * 2^-24 of the terms' size.
    torch.testing.assert_close(stats.hessian, 2 / 50 * x.T @ x, rtol=1e-5, atol=1e-6)
    assert stats.cross is not None
    torch.testing.assert_close(stats.cross, 2 / 50 * (x_full - x).T @ x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("where", ["x", "x_full"])
def test_inputs_that_are_not_finite_are_counted(bad: float, where: str) -> None:
    stats = InputStatistics(8, "cpu", with_full_precision=True)
    inputs = {"x": torch.ones(5, 8), "x_full": torch.ones(5, 8)}
    stats.add(**inputs)
    inputs[where][1, 2] = inputs[where][3, 3] = bad
    if where == "x_full" and bad == 1e30:
        stats.add(**inputs)  # its square overflows, but its products with x do not
        return
    before = stats.hessian
    with pytest.raises(NonFiniteInputs, match="2 calibration inputs") as caught:
        stats.add(**inputs)
    assert caught.value.count == 2
    assert stats.tokens == 5
    assert torch.equal(stats.hessian, before)


def test_block_error_after_itf_never_exceeds_the_initialisation() -> None:
    W, stats = weights(23, 32, 256), statistics(24, 256)
    plain = dataclasses.replace(METHODS["paper"], aga=False, ssr=False, gptq=False, gptaq=0.0)
    with_itf = W.double() - ternarize(W, stats, plain)[0].dequantize(torch.float64)
    without = W.double() - ternarize(W, stats, dataclasses.replace(plain, itf=False))[0].dequantize(
        torch.float64
    )
    # float16 moves a value by at most 2^-11 of it.
    slack = W.double().square().sum(1) * 2**-10
    assert (with_itf.square().sum(1) <= without.square().sum(1) + slack).all()
    blocks = W.double().view(32, 2, 128)
    expected = torch.cat(
        [iterative_ternary_fitting(b, initial_grid(b)[2])[2] for b in blocks.unbind(1)], dim=1
    )
    assert torch.equal(ternarize(W, stats, plain)[0].digits.double(), expected)


def test_methods_are_hashable_json_and_know_their_tensors() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert hash(method) == hash(dataclasses.replace(method))
        assert json.loads(json.dumps(dataclasses.asdict(method)))["name"] == name
    paper = METHODS["paper"]
    assert not paper.for_tensor("model.layers.0.mlp.down_proj.weight").ssr
    assert paper.for_tensor("model.layers.0.mlp.up_proj.weight") == paper
