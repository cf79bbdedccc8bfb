"""Choosing a block's digits jointly, on a fixed grid, for the least error under a metric.

The metric M is (P_BB)^-1 = (L L^T)^-1 (see `compensation`), and a row's error is e M e^T with
e = w - (alpha * t + mu). Both functions work in units of alpha, in which the grid of every row is
{-1, 0, 1}, and on transposed weights, so that each step touches contiguous memory. Rows with
alpha = 0 get digits 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pt2gguf.kernels import kernels_work


def digits_with_feedback(W: Tensor, alpha: Tensor, mu: Tensor, L: Tensor) -> Tensor:
    """Round column by column and feed each column's error forward, as GPTQ does.

    W: (n, b); alpha, mu: (n,); L: (b, b). Column j goes to its nearest grid value, and its error e
    moves the columns k > j by -e * L[k, j] / L[j, j]. Returns T (n, b).
    """
    return _round_columns(_in_grid_units(W, alpha, mu), None, (L / L.diagonal()).T).T.contiguous()


def descend_digits(W: Tensor, alpha: Tensor, mu: Tensor, T: Tensor, M: Tensor) -> Tensor:
    """One sweep of coordinate descent: each column's best digits with all the others fixed.

    W, T: (n, b); alpha, mu: (n,); M: (b, b). Returns the new T; no row's error e M e^T rises.
    """
    T = T.T.contiguous()
    diagonal = M.diagonal()
    # Each digit's optimum: as far from the digit as half the error's slope over its curvature.
    optima = T + (M @ (_in_grid_units(W, alpha, mu) - T)) / diagonal.unsqueeze(1)
    # Row j: what one step of digit j does to the optima of the others.
    return _round_columns(optima, T, -M / diagonal).T.contiguous()


def _round_columns(targets: Tensor, before: Tensor | None, effects: Tensor) -> Tensor:
    """Digits for one column after the other, each of which moves the targets of later ones.

    targets: (b, n), of n rows; before: (b, n), the digits so far, or None for the targets
    themselves; effects: (b, b), [j, k] how much target k moves when digit j rises from `before` by
    one. Returns digits (b, n).
    """
    if targets.is_cuda and kernels_work():
        from pt2gguf.kernels.rounding import round_columns

        return round_columns(targets, before, effects)
    digits = torch.empty_like(targets)
    starts = targets if before is None else before
    columns = zip(targets, digits, starts, effects, strict=True)
    for later, (target, digit, start, effect) in enumerate(columns, 1):
        torch.round(target, out=digit).clamp_(-1, 1)
        targets[later:].addr_(effect[later:], digit - start)
    return digits


def _in_grid_units(W: Tensor, alpha: Tensor, mu: Tensor) -> Tensor:
    """(b, n): (W - mu) / alpha transposed; 0 where alpha is 0."""
    inverse = torch.where(alpha == 0, 0.0, 1 / alpha)
    return ((W - mu.unsqueeze(1)) * inverse.unsqueeze(1)).T.contiguous()
