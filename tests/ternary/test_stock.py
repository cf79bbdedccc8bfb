"""Rounding to a stock type with compensation, on a grid of the tests' own and on llama.cpp's."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pt2gguf.errors import Pt2Error
from pt2gguf.export.llama_cpp import import_llama_cpp
from pt2gguf.export.stock_grids import GRIDS, GgmlGrid
from pt2gguf.native.installation import find_installation
from pt2gguf.ternary import (
    CHUNK,
    METHODS,
    InputStatistics,
    OutputStatistics,
    StockGrid,
    round_to_stock,
)
from pt2gguf.ternary.compensation import damped_inverse
from pt2gguf.ternary.stock import _digits_with_feedback

PLAIN = dataclasses.replace(METHODS["default"], gptaq=0.0)


@pytest.fixture(scope="module", params=["q2_k", "q3_k", "q4_k", "q4_0"])
def grid(request: pytest.FixtureRequest) -> StockGrid:
    llama_cpp = import_llama_cpp(find_installation())
    assert request.param in GRIDS
    return GgmlGrid(request.param, llama_cpp.gguf, llama_cpp.ggml)


def _weights(seed: int, rows: int, columns: int) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _correlated(seed: int, tokens: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(tokens, width, generator=generator) @ mixing


def _inputs(seed: int, columns: int, cross: bool = False) -> InputStatistics:
    statistics = InputStatistics(columns, "cpu", with_full_precision=cross)
    x = _correlated(seed, 4 * columns, columns)
    statistics.add(x, 1.1 * x if cross else None)
    return statistics


def _outputs(seed: int, rows: int) -> OutputStatistics:
    statistics = OutputStatistics.empty(rows, "cpu")
    statistics.add(_correlated(seed, 4 * rows, rows))
    return statistics


def _plain(W: Tensor, grid: StockGrid) -> Tensor:
    """What the type makes of W by itself."""
    chunks = [grid.fit(part, torch.ones(CHUNK)) for part in W.split(CHUNK, dim=1)]
    return grid.values(torch.cat(chunks, dim=1))


def _loss(W: Tensor, Q: Tensor, H: Tensor, G: Tensor | None = None) -> float:
    E = W.double() - Q.double()
    left = E if G is None else G.double() @ E
    return float(((left @ H) * E).sum())


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    columns=st.integers(1, 20),
    top=st.sampled_from([1, 3, 15]),
)
def test_digits_are_those_of_a_plain_loop(seed: int, rows: int, columns: int, top: int) -> None:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=g).double()
    low = torch.randn(rows, columns, generator=g).double() - 1
    step = torch.randn(rows, columns, generator=g).double()  # of both signs, as Q3_K has them
    step[torch.rand(rows, columns, generator=g) < 0.1] = 0
    inverse, _ = damped_inverse(
        torch.cov(torch.randn(columns, 50, generator=g).double()).reshape(columns, columns), 0.01
    )
    L = torch.linalg.cholesky(inverse)
    found, errors = _digits_with_feedback(top, W, low, step, L)
    for row in range(rows):
        w = W[row].clone()
        for j in range(columns):
            digit = 0.0
            if step[row, j]:
                digit = min(max(round(float((w[j] - low[row, j]) / step[row, j])), 0), top)
            error = w[j] - (low[row, j] + digit * step[row, j])
            assert found[row, j] == digit
            left = W[row, j] - (low[row, j] + digit * step[row, j])
            assert errors[row, j] == pytest.approx(float(left), abs=1e-9)
            for k in range(j + 1, columns):
                w[k] -= error * L[k, j] / L[j, j]


class FixedGrid:
    """Four levels that do not depend on the weights; stored as the digits themselves."""

    name, chunk_bytes, top = "fixed", CHUNK, 3

    def fit(self, W: Tensor, importance: Tensor) -> Tensor:
        return torch.zeros(W.shape, dtype=torch.uint8)

    def levels(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        step = torch.full(packed.shape, 0.02)
        return -1.5 * step, step

    def with_digits(self, packed: Tensor, digits: Tensor) -> Tensor:
        return digits

    def values(self, packed: Tensor) -> Tensor:
        return 0.02 * (packed - 1.5)


def test_chunks_are_rounded_as_one_matrix_would_be() -> None:
    """What later chunks make up for is what plain GPTQ over all columns asks of them."""
    W, statistics, grid = _weights(0, 12, 1024), _inputs(1, 1024), FixedGrid()
    weight, _ = round_to_stock(W, statistics, PLAIN, None, grid)
    inverse, _ = damped_inverse(statistics.hessian, PLAIN.damping)
    low, step = (v.double() for v in grid.levels(torch.empty_like(W)))
    expected, _ = _digits_with_feedback(
        grid.top, W.double(), low, step, torch.linalg.cholesky(inverse)
    )
    # Sums in another order tip a digit now and then, and with it what follows in its row.
    assert (weight.packed == expected).float().mean() > 0.95


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("columns", [256, 768])
def test_less_error_than_the_type_makes_by_itself(grid: StockGrid, rows: int, columns: int) -> None:
    W = _weights(rows, rows, columns)
    statistics = _inputs(1, columns)
    weight, report = round_to_stock(W, statistics, PLAIN, None, grid)
    values = grid.values(weight.packed)
    assert weight.kind == grid.name
    assert weight.packed.shape == (rows, columns // CHUNK * grid.chunk_bytes)
    H = statistics.hessian
    assert _loss(W, values, H) < 0.75 * _loss(W, _plain(W, grid), H)
    assert report.relative_error == pytest.approx(_loss(W, values, H) / _loss(W, 0 * W, H))


def test_later_chunks_make_up_for_earlier_ones(grid: StockGrid) -> None:
    W, statistics = _weights(0, 24, 1024), _inputs(2, 1024)
    alone = dataclasses.replace(PLAIN, gptq=False)
    losses = [
        _loss(W, grid.values(round_to_stock(W, statistics, m, None, grid)[0].packed), H)
        for m, H in ((PLAIN, statistics.hessian), (alone, statistics.hessian))
    ]
    assert losses[0] < losses[1]


def test_later_rows_make_up_for_earlier_ones(grid: StockGrid) -> None:
    W, statistics, outputs = _weights(0, 64, 256), _inputs(3, 256), _outputs(4, 64)
    G, H = outputs.parts[0], statistics.hessian
    with_rows, without = (
        _loss(W, grid.values(round_to_stock(W, statistics, PLAIN, o, grid)[0].packed), H, G)
        for o in (outputs, None)
    )
    assert with_rows < 0.9 * without


def test_aims_at_the_full_precision_inputs(grid: StockGrid) -> None:
    """Whose inputs are 1.1 times as large here, so that 1.1 W is what reproduces its outputs."""
    W, statistics = _weights(0, 8, 256), _inputs(5, 256, cross=True)
    method = dataclasses.replace(PLAIN, gptaq=1.0)
    found = grid.values(round_to_stock(W, statistics, method, None, grid)[0].packed)
    aimed, _ = round_to_stock(1.1 * W, _inputs(5, 256), PLAIN, None, grid)
    H = statistics.hessian
    # The damping keeps a little back.
    assert _loss(1.1 * W, found, H) < 1.2 * _loss(1.1 * W, grid.values(aimed.packed), H)
    assert _loss(1.1 * W, found, H) < _loss(W, found, H)


@pytest.mark.parametrize(
    "W",
    [
        torch.zeros(3, 256),
        torch.full((3, 256), 0.5),
        torch.tensor([[1.0], [0.0], [-2.0]]).repeat(1, 256),
        torch.full((2, 256), 6e4),
        torch.full((2, 256), 1e-4),
    ],
    ids=["zeros", "constant", "rows", "large", "tiny"],
)
def test_extreme_values(grid: StockGrid, W: Tensor) -> None:
    statistics = _inputs(0, 256)
    weight, report = round_to_stock(W, statistics, PLAIN, _outputs(0, len(W)), grid)
    values = grid.values(weight.packed)
    assert torch.isfinite(values).all()
    assert report.relative_error <= 1
    if not W.any():
        assert not values.any()


def test_inputs_of_which_nothing_is_known(grid: StockGrid) -> None:
    """Then the error of the weights counts, and feedback has nothing to go by."""
    W = _weights(0, 5, 512)
    weight, _ = round_to_stock(W, InputStatistics(512, "cpu", False), PLAIN, None, grid)
    eye = torch.eye(512).double()
    assert _loss(W, grid.values(weight.packed), eye) <= 1.05 * _loss(W, _plain(W, grid), eye)


def test_weights_below_the_smallest_scales(grid: StockGrid) -> None:
    """Scales of float16 end at 6e-8: such weights cannot be stored, but do no harm."""
    weight, _ = round_to_stock(torch.full((2, 256), 1e-8), _inputs(0, 256), PLAIN, None, grid)
    assert grid.values(weight.packed).abs().max() < 1e-5


def test_weights_that_are_too_large(grid: StockGrid) -> None:
    W = 1e9 * _weights(0, 3, 256)
    with pytest.raises(Pt2Error, match=f"too large for the float16 scales of {grid.name}"):
        round_to_stock(W, _inputs(0, 256), PLAIN, None, grid)


def test_weights_that_are_not_finite(grid: StockGrid) -> None:
    W = _weights(0, 3, 256)
    W[1, 7] = float("nan")
    with pytest.raises(Pt2Error, match="1 weights are NaN or infinite"):
        round_to_stock(W, _inputs(0, 256), PLAIN, None, grid)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_more_bits_less_error(seed: int) -> None:
    llama_cpp = import_llama_cpp(find_installation())
    W, statistics = _weights(seed, 7, 256), _inputs(seed, 256)
    losses = []
    for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"):
        grid = GgmlGrid(name, llama_cpp.gguf, llama_cpp.ggml)
        weight, _ = round_to_stock(W, statistics, PLAIN, None, grid)
        losses.append(_loss(W, grid.values(weight.packed), statistics.hessian))
    assert all(more > less for more, less in pairwise(losses))
