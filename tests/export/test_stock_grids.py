"""The digits of ggml's types, found by flipping bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pt2gguf.export.llama_cpp import LlamaCpp, import_llama_cpp
from pt2gguf.export.stock_grids import GRIDS, GgmlGrid
from pt2gguf.native.installation import find_installation
from pt2gguf.ternary import CHUNK

LEVELS = {"q2_k": 4, "q3_k": 8, "q4_k": 16, "q5_k": 32, "q6_k": 64, "q4_0": 16, "q5_0": 32}


@pytest.fixture(scope="module")
def llama_cpp() -> LlamaCpp:
    return import_llama_cpp(find_installation())


@pytest.fixture(params=GRIDS)
def grid(request: pytest.FixtureRequest, llama_cpp: LlamaCpp) -> GgmlGrid:
    return GgmlGrid(request.param, llama_cpp.gguf, llama_cpp.ggml)


def test_values_are_those_that_gguf_py_reads(grid: GgmlGrid, llama_cpp: LlamaCpp) -> None:
    gguf = llama_cpp.gguf
    packed = torch.cat([grid.fit(torch.randn(5, CHUNK), torch.ones(CHUNK)) for _ in range(3)], 1)
    expected = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[grid.name.upper()])
    np.testing.assert_array_equal(grid.values(packed).numpy(), expected)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_any_digits_can_be_set_and_nothing_else_changes(grid: GgmlGrid, rows: int) -> None:
    assert grid.top + 1 == LEVELS[grid.name]
    fitted = grid.fit(torch.randn(rows, CHUNK), torch.rand(CHUNK) + 0.1)
    assert fitted.shape == (rows, grid.chunk_bytes)
    low, step = grid.levels(fitted)
    digits = torch.randint(0, grid.top + 1, (rows, CHUNK), dtype=torch.uint8)
    packed = grid.with_digits(fitted, digits)
    # low and step are differences of float32 numbers as large as the highest value.
    largest = torch.maximum(low.abs(), (low + grid.top * step).abs())
    error = (grid.values(packed) - (low + digits * step)).abs()
    assert (error <= 2**-22 * largest).all()
    for again, before in zip(grid.levels(packed), (low, step), strict=True):
        assert torch.equal(again, before)
    assert torch.equal(
        grid.with_digits(packed, torch.zeros_like(digits)),
        grid.with_digits(fitted, torch.zeros_like(digits)),
    )


def test_its_own_digits_are_the_nearest(grid: GgmlGrid) -> None:
    """So the levels are the ones that ggml rounds to."""
    W = torch.rand(50, CHUNK) + torch.randn(50, 1)
    fitted = grid.fit(W, torch.ones(CHUNK))
    low, step = grid.levels(fitted)
    digits = torch.where(step == 0, 0.0, (grid.values(fitted) - low) / step).round()
    assert torch.equal(grid.with_digits(fitted, digits.to(torch.uint8)), fitted)


def test_importance_decides_whose_error_is_small(grid: GgmlGrid) -> None:
    W = torch.randn(200, CHUNK)
    importance = torch.full((CHUNK,), 1e-3)
    importance[::2] = 1.0
    error = (grid.values(grid.fit(W, importance)) - W).square().mean(0)
    assert error[::2].mean() < error[1::2].mean()
