"""What it costs the model to change one of its weights, to second order.

With G the gradients of a weight as `gradients` has them, E[G G^T] is the Hessian of the divergence:
a change D of the weight moves the model's predictions by KL = 1/2 E[<G, D>^2]. One pass forwards
and one backwards give this for any number of changes of every weight, and <G, D> is a sum over
tokens of g . (D x), with x the inputs and g the gradients of the outputs, so that no G is ever
formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pt2gguf.convert.gradients import gradient_layers
from pt2gguf.model import Skeleton

Versions = Callable[[str, Tensor], Mapping[str, Tensor]]
"""From a weight's checkpoint name and its values (n, m) to its versions by name, (n, m) each."""


def divergences(
    skeleton: Skeleton,
    ids: Tensor,
    names: Iterable[str],
    versions: Versions,
    scratch: Path,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Mean KL divergence over the tokens, in nats, that each version of a weight alone causes.

    ids: (samples, length) int64, the more samples the better: with s of them, the relative standard
    error is about sqrt(2 / s). names: of the weights, which must belong to linear layers. scratch:
    a directory for what is needed meanwhile. Gives by checkpoint name, by version.
    """
    wanted = set(names)
    found: dict[str, dict[str, float]] = {}
    for gradients in gradient_layers(skeleton, [ids], 1, scratch, device):
        layer = gradients.layer
        modules = {
            module: name
            for module, linear in layer.named_modules()
            if isinstance(linear, nn.Linear)
            and (name := skeleton.stored_name(gradients.index, f"{module}.weight")) in wanted
        }
        changes = {
            module: _changes(_weight(layer, module), versions(name, _weight(layer, module).cpu()))
            for module, name in modules.items()
        }
        sums = {m: torch.zeros(len(c), dtype=torch.float64) for m, c in changes.items()}
        for passes in gradients.passes(list(modules)):
            for module, pairs in passes.items():
                sums[module] += _products(changes[module], pairs).square()
        for module, name in modules.items():
            mean = sums[module] / (2 * ids.numel())
            found[name] = dict(zip(changes[module], mean.tolist(), strict=True))
    return found


def _weight(layer: nn.Module, module: str) -> Tensor:
    return layer.get_submodule(module).get_parameter("weight").detach()


def _changes(weight: Tensor, versions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {version: values.to(weight) - weight for version, values in versions.items()}


def _products(changes: Mapping[str, Tensor], pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(versions,) float64: <G, D> of each change D, summed over the tokens of `pairs`."""
    return torch.stack(
        [
            torch.stack([((x @ change.T) * g).sum(dtype=torch.float64) for x, g in pairs]).sum()
            for change in changes.values()
        ]
    ).cpu()
