"""The numbers behind the picture of one weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pt2gguf.blocks import BLOCK_SIZE
from pt2gguf.ternary import TernaryWeight
from pt2gguf.ternary.ssr import select_block

BINS = 160
WIDEST = 8.0  # standard deviations on either side of the mean that a histogram covers at most

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class MatrixSummary:
    """What the picture of one matrix W (n, m) shows.

    mean, deviation, kurtosis: of all weights; the kurtosis is the excess over a Gaussian's.
    largest: max |w - mean| / deviation; 0 where all weights are equal.
    edges: (BINS + 1,), of the histograms; up to WIDEST deviations from the mean.
    weights: (BINS,), how many full-precision weights lie in each bin.
    levels: (3, BINS), how many ternary values lie in each bin, for the digits -1, 0, 1; None
        without a ternary weight.
    natural, reordered: (m / 128,), the variance of each block in the checkpoint's column order and
        in that of SSR.
    stored_order: whether the latter is the order that the ternary weight is stored in; if not, it
        is what SSR makes of the weights alone.
    """

    name: str
    shape: tuple[int, int]
    mean: float
    deviation: float
    kurtosis: float
    largest: float
    edges: F64
    weights: I64
    levels: I64 | None
    natural: F64
    reordered: F64
    stored_order: bool


def summarize(name: str, W: Tensor, ternary: TernaryWeight | None) -> MatrixSummary:
    """The summary of one matrix.

    W: (n, m) float32, m a multiple of 128. ternary: the same matrix as converted, its rows in any
    order; None if there is no such.
    """
    mean, deviation, kurtosis = _moments(W)
    reach = (W.double() - mean).abs().max().item()
    # A little more than the reach, so that rounding leaves no weight outside.
    half_width = min(reach * (1 + 1e-9), WIDEST * deviation) or 1.0
    edges: F64 = np.linspace(mean - half_width, mean + half_width, BINS + 1, dtype=np.float64)
    stored = None if ternary is None else ternary.perm
    return MatrixSummary(
        name=name,
        shape=(W.shape[0], W.shape[1]),
        mean=mean,
        deviation=deviation,
        kurtosis=kurtosis,
        largest=reach / deviation if deviation > 0 else 0.0,
        edges=edges,
        weights=np.histogram(W.numpy(), edges)[0],
        levels=None if ternary is None else _level_histograms(ternary, edges),
        natural=block_variances(W),
        reordered=block_variances(W[:, similarity_order(W) if stored is None else stored]),
        stored_order=stored is not None,
    )


def block_variances(W: Tensor) -> F64:
    """(m / 128,): the variance of a row's weights in the block, averaged over the rows.

    This is the squared error per weight of the best grid of a single level: what alpha and the
    digits have to work on. W: (n, m).
    """
    blocks = W.unflatten(1, (-1, BLOCK_SIZE)).double()
    return blocks.var(dim=2, correction=0).mean(dim=0).numpy()


def similarity_order(W: Tensor) -> Tensor:
    """(m,) int64: the columns as SSR orders them where no error is compensated (Eq. 15, 16).

    W: (n, m). A conversion chooses from weights that compensation has changed, so its own order
    differs from this one after the first block.
    """
    remaining = torch.arange(W.shape[1])
    order: list[Tensor] = []
    while len(remaining):
        block = select_block(W[:, remaining], BLOCK_SIZE)
        order.append(remaining[block])
        left = torch.ones(len(remaining), dtype=torch.bool)
        left[block] = False
        remaining = remaining[left]
    return torch.cat(order)


def _moments(W: Tensor) -> tuple[float, float, float]:
    """Mean, standard deviation and excess kurtosis; the last is 0 where all weights are equal."""
    values = W.double()
    mean = values.mean()
    squares = (values - mean).square()
    variance = squares.mean()
    kurtosis = squares.square().mean() / variance.square() - 3 if variance > 0 else variance
    return mean.item(), variance.sqrt().item(), kurtosis.item()


def _level_histograms(ternary: TernaryWeight, edges: F64) -> I64:
    """(3, BINS): the values alpha * t + mu of every row and block, once for each digit t."""
    digits = ternary.digits.unflatten(1, (-1, BLOCK_SIZE))
    alpha, mu = ternary.alpha.double(), ternary.mu.double()
    return np.stack(
        [
            np.histogram(
                (alpha * t + mu).numpy(),
                edges,
                weights=(digits == t).sum(dim=2).numpy(),
            )[0]
            for t in (-1, 0, 1)
        ]
    )
