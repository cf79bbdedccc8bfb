"""Rows that make up for the errors of rows before them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pt2gguf.ternary import METHODS, InputStatistics, OutputStatistics, output_bytes, ternarize
from pt2gguf.ternary import statistics as statistics_module
from pt2gguf.ternary.row_feedback import STEPS, all_rows_at_once, row_steps

METHOD = replace(METHODS["default"], output_damping=0.1)


def _moments(seed: int, size: int) -> Tensor:
    """Second moments of correlated vectors."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    mixing *= torch.logspace(0, -2, size, dtype=torch.float64).unsqueeze(1)
    x = torch.randn(4 * size, size, generator=generator, dtype=torch.float64) @ mixing
    return x.T @ x / len(x)


def _inputs(seed: int, columns: int) -> InputStatistics:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator) / columns**0.5
    found = InputStatistics(columns, "cpu", with_full_precision=True)
    found.add(x, x + 0.1 * torch.randn(x.shape, generator=generator))
    return found


def _weights(seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("sizes", [[1], [5], [16], [37], [100, 99], [64, 3]])
def test_later_rows_move_to_their_optimum(sizes: list[int]) -> None:
    """Against the minimum over all rows that are left, from a dense system of equations."""
    moments = [_moments(seed, size) for seed, size in enumerate(sizes)]
    G = torch.block_diag(
        *(m + 0.1 * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype) for m in moments)
    )
    rows = len(G)
    wanted = torch.randn(rows, 7, generator=torch.Generator().manual_seed(9)).double()
    targets, found = wanted.clone(), torch.zeros_like(wanted)
    done: list[int] = []
    steps = row_steps(moments, damping=0.1)
    assert len(steps) <= STEPS
    for step in steps:
        found[step.rows] = targets[step.rows].round()
        step.compensate(targets[step.rows] - found[step.rows], targets)
        done += step.rows.tolist()
        left = [i for i in range(rows) if i not in done]
        if left:
            asked = G[left][:, done] @ (wanted - found)[done]
            best = wanted[left] + torch.linalg.solve(G[left][:, left], asked)
            assert torch.allclose(targets[left], best, rtol=0, atol=1e-9)
    assert sorted(done) == list(range(rows))


def _loss(W: Tensor, Q: Tensor, G: Tensor, H: Tensor) -> float:
    E = W.double() - Q.double()
    return float(((G @ E @ H) * E).sum())


@pytest.mark.parametrize(("rows", "columns"), [(96, 256), (33, 384)])
@pytest.mark.parametrize("ssr", [False, True])
def test_the_loss_of_both_sides_falls(rows: int, columns: int, ssr: bool) -> None:
    W, inputs = _weights(0, rows, columns), _inputs(1, columns)
    G = _moments(2, rows)
    method = replace(METHOD, gptaq=0.0, ssr=ssr)
    alone, _ = ternarize(W, inputs, method)
    together, _ = ternarize(W, inputs, method, OutputStatistics([G.float()]))
    G = G.float().double()
    before = _loss(W, alone.dequantize(), G, inputs.hessian)
    after = _loss(W, together.dequantize(), G, inputs.hessian)
    # What feedback in this order can win at best: the share of G's diagonal that is left of each
    # row once the rows before it are known. Steps of several rows win less, but most of it.
    damped = G + method.output_damping * G.diagonal().mean() * torch.eye(rows, dtype=G.dtype)
    left = torch.linalg.cholesky(damped.flip(0, 1)).diagonal().square().mean()
    ideal = float(left / damped.diagonal().mean())
    assert ideal < 0.5
    assert after < (1 + ideal) / 2 * before


def test_outputs_that_do_not_depend_on_each_other_change_nothing() -> None:
    W, inputs = _weights(0, 70, 256), _inputs(1, 256)
    G = torch.diag(torch.rand(70, generator=torch.Generator().manual_seed(3)) + 0.1)
    alone, _ = ternarize(W, inputs, METHOD)
    together, _ = ternarize(W, inputs, METHOD, OutputStatistics([G]))
    assert torch.equal(alone.digits, together.digits)
    assert torch.equal(alone.alpha, together.alpha)
    assert torch.equal(alone.mu, together.mu)


def test_nothing_known_of_the_outputs() -> None:
    """All gradients zero, as for an expert that no token reached."""
    W, inputs = _weights(0, 40, 128), _inputs(1, 128)
    alone, _ = ternarize(W, inputs, METHOD)
    together, _ = ternarize(W, inputs, METHOD, OutputStatistics.empty(40, "cpu"))
    assert torch.equal(alone.digits, together.digits)


def test_scale_of_the_gradients_does_not_matter() -> None:
    W, inputs = _weights(0, 40, 128), _inputs(1, 128)
    G = _moments(4, 40).float()
    one, _ = ternarize(W, inputs, METHOD, OutputStatistics([G]))
    other, _ = ternarize(W, inputs, METHOD, OutputStatistics([G * 2.0**-40]))
    assert torch.equal(one.digits, other.digits)


def test_statistics_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_module, "PART_ROWS", 64)
    gradients = torch.randn(50, 130, generator=torch.Generator().manual_seed(0))
    found = OutputStatistics.empty(130, "cpu")
    found.add(gradients[:20])
    found.add(gradients[20:])
    assert [len(part) for part in found.parts] == [44, 43, 43]
    expected = gradients.double().T @ gradients.double()
    begin = 0
    for matrix in found.matrices():
        end = begin + len(matrix)
        # Sums of 50 products of float32: their errors stay below 50 roundings of the largest sum.
        bound = 50 * 2**-24 * float(expected.abs().max())
        assert torch.allclose(matrix, expected[begin:end, begin:end], rtol=0, atol=bound)
        begin = end
    assert begin == 130
    assert sum(part.nbytes for part in found.parts) <= output_bytes(130) == 4 * 130 * 64


def test_all_rows_at_once() -> None:
    (step,) = all_rows_at_once(5, torch.device("cpu"))
    targets = torch.ones(5, 3)
    step.compensate(torch.ones(5, 3), targets)
    assert step.rows.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(targets, torch.ones(5, 3))
