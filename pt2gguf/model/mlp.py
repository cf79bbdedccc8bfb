"""What the names of a gated MLP's weights say about each other."""

from __future__ import annotations

from collections.abc import Collection

_PRODUCERS = {"down_proj": ("gate_proj", "up_proj"), "w2": ("w1", "w3")}


def producers(name: str, available: Collection[str]) -> tuple[str, str] | None:
    """The gate and up weights whose rows are the columns of the weight `name`, if it has such.

    available: checkpoint names. None unless both weights are among them, and neither has a bias
    there, which would have to move with the rows.
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
