"""Rounding a matrix to a stock type of llama.cpp, with the compensation that ternary ones get.

Such a type stores CHUNK columns of a row as scales, for a few columns each, and a digit 0 ... top
for every column, whose value is low + step * digit. llama.cpp chooses both for each row and chunk
by itself. Here it chooses the scales, for weights that make up for the errors in the columns and
rows before them, and the digits follow one column after the other, with error feedback (GPTQ).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pt2gguf.errors import Pt2Error
from pt2gguf.replay import Replayed
from pt2gguf.ternary.compensation import (
    asymmetric_target,
    damped_inverse,
    exact_update,
    split_block,
)
from pt2gguf.ternary.method import Method
from pt2gguf.ternary.statistics import InputStatistics, OutputStatistics
from pt2gguf.ternary.ternarize import (
    TernarizationReport,
    finite_weights,
    full_precision_moments,
    relative_error,
    steps_of_rows,
)

CHUNK = 256
"""Columns that are fitted and rounded together: the largest block of llama.cpp's types."""


class StockGrid(Protocol):
    """A stock type whose digits can be chosen one by one. All tensors are on the CPU."""

    @property
    def name(self) -> str:
        """Such as q4_k."""

    @property
    def chunk_bytes(self) -> int:
        """Bytes of CHUNK columns of a row."""

    @property
    def top(self) -> int:
        """The highest digit."""

    def fit(self, W: Tensor, importance: Tensor) -> Tensor:
        """(r, bytes) uint8: the type's own choice for W (r, CHUNK) float32; importance: (CHUNK,)
        float32, how much the squared error of a column counts."""

    def levels(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """low and step, (r, CHUNK) float32 each, that the scales in `packed` stand for."""

    def with_digits(self, packed: Tensor, digits: Tensor) -> Tensor:
        """`packed` with the digits (r, CHUNK) uint8 in place of its own."""

    def values(self, packed: Tensor) -> Tensor:
        """(n, m) float32 of whole rows (n, bytes)."""


@dataclass(frozen=True)
class StockWeight:
    """A matrix (n, m) in the stock type `kind`. packed: (n, bytes) uint8, its rows."""

    kind: str
    packed: Tensor


def round_to_stock(
    weights: Tensor,
    statistics: InputStatistics,
    method: Method,
    outputs: OutputStatistics | None,
    grid: StockGrid,
) -> tuple[StockWeight, TernarizationReport]:
    """Round one matrix to the type of `grid`.

    weights: (n, m), m a multiple of CHUNK; all else as in `ternarize`. Of the method, what concerns
    the compensation applies. Raises Pt2Error for weights that are not finite, or too large for the
    type's float16 scales.
    """
    original = finite_weights(weights)
    H = statistics.hessian
    P, damping = damped_inverse(H, method.damping)
    cross = full_precision_moments(statistics, method)
    steps = steps_of_rows(outputs, len(weights), method, weights.device)
    digits_of = Replayed(partial(_digits_with_feedback, grid.top))
    back = torch.cat([step.rows for step in steps]).argsort()

    wanted = original if cross is None else asymmetric_target(original, cross, P, method.gptaq)
    W = wanted  # with what the columns before ask of these
    chunks: list[Tensor] = []
    while W.shape[1]:
        left = torch.arange(W.shape[1], device=W.device)
        factors, P = split_block(P, left[:CHUNK], left[CHUNK:])
        importance = factors.metric.diagonal().float().cpu()
        from_columns = W[:, :CHUNK] - wanted[:, :CHUNK]
        targets = W[:, :CHUNK].clone()
        errors: list[Tensor] = []
        packed: list[Tensor] = []
        for step in steps:
            rows = targets[step.rows]
            fitted = grid.fit(rows.float().cpu(), importance)
            low, size = (v.to(rows) for v in grid.levels(fitted))
            digits, error = digits_of(rows, low, size, factors.L)
            errors.append(error)
            packed.append(grid.with_digits(fitted, digits.to("cpu", torch.uint8)))
            step.compensate(error - from_columns[step.rows], targets)
        chunks.append(torch.cat(packed)[back.cpu()])
        W, wanted = W[:, CHUNK:], wanted[:, CHUNK:]
        if method.gptq:
            W = W + exact_update(torch.cat(errors)[back], factors)

    weight = StockWeight(grid.name, torch.cat(chunks, dim=1))
    values = grid.values(weight.packed).to(weights.device)
    if not torch.isfinite(values).all():
        largest = original.abs().max().item()
        raise Pt2Error(
            f"weights of up to {largest:g} are too large for the float16 scales of {grid.name}: "
            "keep them in bf16 or f32 with --tensor-type"
        )
    report = TernarizationReport(
        relative_error=relative_error(original, values, H),
        damping=damping,
        blocks=len(chunks),
        itf_rounds=0,
        singular_rows=0,
    )
    return weight, report


def _digits_with_feedback(
    top: int, W: Tensor, low: Tensor, step: Tensor, L: Tensor
) -> tuple[Tensor, Tensor]:
    """Digits (r, b), and what is left of W (r, b) without their values; L as in `rounding`."""
    targets = W.T.clone(memory_format=torch.contiguous_format)
    low, step = low.T.contiguous(), step.T.contiguous()
    inverse = torch.where(step == 0, 0.0, 1 / step)
    effects = (L / L.diagonal()).T.contiguous()
    digits = torch.empty_like(targets)
    for j, target in enumerate(targets):
        torch.mul(target - low[j], inverse[j], out=digits[j]).round_().clamp_(0, top)
        error = target - low[j] - digits[j] * step[j]
        targets[j + 1 :].addr_(effects[j, j + 1 :], error, alpha=-1)
    return digits.T.contiguous(), W - (low + digits * step).T
