"""Spending a budget of bits where the model gains most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pt2gguf.convert.sensitivity import divergences
from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.model import Skeleton
from pt2gguf.ternary import StockGrid

TERNARY = "ternary"
# Of the calibration text that the costs are measured on.
SAMPLES, LENGTH = 128, 128


def spend_budget(
    skeleton: Skeleton,
    ids: Tensor,
    work: WorkDirectory,
    tensor_of: Callable[[str], str],
    grids: Sequence[StockGrid],
    bits: Mapping[str, float],
    budget: float,
    device: torch.device,
) -> dict[str, str]:
    """Which weights of `work`, all ternary there, should be of another type, by checkpoint name.

    ids: (samples, length) int64, the calibration text; tensor_of: the file's tensor that a weight
    becomes part of, as those that become one must have one type; grids: of the alternatives that
    `work` holds; bits: bits per weight of each of these types and of TERNARY; budget: the most bits
    per weight, on the average over all weights of `work`.
    """
    layer_of = work.layer_numbers()
    load_layer = lru_cache(maxsize=1)(work.load_layer)

    def versions(name: str, _: Tensor) -> dict[str, Tensor]:
        layer = load_layer(layer_of[name])
        alternatives = layer.alternatives.get(name, {})
        return {TERNARY: layer.weights[name].dequantize()} | {
            grid.name: grid.values(alternatives[grid.name].packed)
            for grid in grids
            if grid.name in alternatives
        }

    found = divergences(skeleton, ids[:SAMPLES, :LENGTH], layer_of, versions, work.path, device)
    sizes: dict[str, int] = {}
    losses: dict[str, dict[str, float]] = {}
    for name, of_name in found.items():
        tensor = tensor_of(name)
        sizes[tensor] = sizes.get(tensor, 0) + skeleton.checkpoint.tensors[name].elements
        losses[tensor] = {k: v + losses.get(tensor, {}).get(k, 0.0) for k, v in of_name.items()}
    chosen = choose_types(sizes, losses, bits, budget)
    return {name: chosen[tensor_of(name)] for name in layer_of if tensor_of(name) in chosen}


def choose_types(
    weights: Mapping[str, int],
    losses: Mapping[str, Mapping[str, float]],
    bits: Mapping[str, float],
    budget: float,
) -> dict[str, str]:
    """Which tensors get another type than ternary, and which.

    weights: how many weights each tensor has; losses: by tensor and type what the type costs, among
    them TERNARY; bits: bits per weight of each type; budget: the most bits per weight on the
    average over all tensors. Greedy: all begin ternary, and the change that gains most for its bits
    is made as long as one fits.
    """
    chosen = dict.fromkeys(weights, TERNARY)
    left = (budget - bits[TERNARY]) * sum(weights.values())
    while True:
        best_rate, best = 0.0, None
        for tensor, current in chosen.items():
            for kind, loss in losses[tensor].items():
                cost = (bits[kind] - bits[current]) * weights[tensor]
                gain = losses[tensor][current] - loss
                if 0 < cost <= left and gain / cost > best_rate:
                    best_rate, best = gain / cost, (tensor, kind, cost)
        if best is None:
            return {tensor: kind for tensor, kind in chosen.items() if kind != TERNARY}
        tensor, kind, cost = best
        chosen[tensor] = kind
        left -= cost
