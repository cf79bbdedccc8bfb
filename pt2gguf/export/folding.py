"""Column orders that cost nothing at run time.

The columns of an MLP's down projection are the rows of its gate and up projections: storing those
rows in the order that SSR chose for the columns makes the permutation of the input disappear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from pt2gguf.model.mlp import producers
from pt2gguf.ternary import TernaryWeight


def fold_orders(
    weights: Mapping[str, TernaryWeight], biases: Collection[str]
) -> dict[str, TernaryWeight]:
    """A layer's weights with every down projection's order moved into its producers' rows."""
    folded = dict(weights)
    for name, order, pair in _foldable(weights, biases):
        folded[name] = replace(weights[name], perm=None)
        for producer in pair:
            folded[producer] = _reorder_rows(folded[producer], order)
    return folded


def reordered(weights: Mapping[str, TernaryWeight], biases: Collection[str]) -> set[str]:
    """The names of those weights whose rows or columns :func:`fold_orders` moves for good."""
    return {moved for name, _, pair in _foldable(weights, biases) for moved in (name, *pair)}


def _foldable(
    weights: Mapping[str, TernaryWeight], biases: Collection[str]
) -> Iterator[tuple[str, Tensor, tuple[str, str]]]:
    """Down projections whose order can be folded, it, and the weights that produce their inputs."""
    available = {*weights, *biases}
    for name, weight in weights.items():
        pair = producers(name, available)
        if weight.perm is not None and pair is not None:
            yield name, weight.perm, pair


def _reorder_rows(weight: TernaryWeight, order: Tensor) -> TernaryWeight:
    return replace(
        weight, alpha=weight.alpha[order], mu=weight.mu[order], digits=weight.digits[order]
    )
