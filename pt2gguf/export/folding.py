"""Column orders that cost nothing at run time.

The columns of an MLP's down projection are the rows of its gate and up projections: storing those
rows in the order that SSR chose for the columns makes the permutation of the input disappear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from pt2gguf.model.mlp import producers
from pt2gguf.ternary import StockWeight, TernaryWeight

Weights = Mapping[str, TernaryWeight | StockWeight]


def fold_orders(
    weights: Weights, biases: Collection[str]
) -> dict[str, TernaryWeight | StockWeight]:
    """A layer's weights with every down projection's order moved into its producers' rows."""
    folded = dict(weights)
    for name, weight, order, pair in _foldable(weights, biases):
        folded[name] = replace(weight, perm=None)
        for producer in pair:
            folded[producer] = _reorder_rows(folded[producer], order)
    return folded


def reordered(weights: Weights, biases: Collection[str]) -> set[str]:
    """The names of those weights whose rows or columns :func:`fold_orders` moves for good."""
    return {moved for name, _, _, pair in _foldable(weights, biases) for moved in (name, *pair)}


def _foldable(
    weights: Weights, biases: Collection[str]
) -> Iterator[tuple[str, TernaryWeight, Tensor, tuple[str, str]]]:
    """Down projections whose order can be folded: name, weight, order, and the producers' names."""
    available = {*weights, *biases}
    for name, weight in weights.items():
        pair = producers(name, available)
        if isinstance(weight, TernaryWeight) and weight.perm is not None and pair is not None:
            yield name, weight, weight.perm, pair


def _reorder_rows(
    weight: TernaryWeight | StockWeight, order: Tensor
) -> TernaryWeight | StockWeight:
    if isinstance(weight, StockWeight):
        return replace(weight, packed=weight.packed[order])
    return replace(
        weight, alpha=weight.alpha[order], mu=weight.mu[order], digits=weight.digits[order]
    )
