"""Column orders that cost nothing at run time.

The columns of an MLP's down projection are the rows of its gate and up projections: storing those
rows in the order that SSR chose for the columns makes the permutation of the input disappear.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from pt2gguf.ternary import TernaryWeight

_PRODUCERS = {"down_proj": ("gate_proj", "up_proj"), "w2": ("w1", "w3")}


def producers(name: str, available: Collection[str]) -> tuple[str, str] | None:
    """The gate and up weights whose rows are the columns of weight `name`, if it has such.

    None unless both are in `available`, and neither has a bias there (which would have to move
    with the rows).
    """
    module, _, suffix = name.rpartition(".weight")
    parent, _, kind = module.rpartition(".")
    if suffix or kind not in _PRODUCERS:
        return None
    gate, up = (f"{parent}.{producer}" for producer in _PRODUCERS[kind])
    weights = f"{gate}.weight", f"{up}.weight"
    biases = f"{gate}.bias", f"{up}.bias"
    if all(w in available for w in weights) and not any(b in available for b in biases):
        return weights
    return None


def fold_orders(
    weights: Mapping[str, TernaryWeight], biases: Collection[str]
) -> dict[str, TernaryWeight]:
    """A layer's weights with every down projection's order moved into its producers' rows."""
    folded = dict(weights)
    for name, weight in weights.items():
        pair = producers(name, {*weights, *biases})
        if weight.perm is None or pair is None:
            continue
        folded[name] = replace(weight, perm=None)
        for producer in pair:
            folded[producer] = _reorder_rows(folded[producer], weight.perm)
    return folded


def _reorder_rows(weight: TernaryWeight, order: Tensor) -> TernaryWeight:
    return replace(
        weight, alpha=weight.alpha[order], mu=weight.mu[order], digits=weight.digits[order]
    )
