"""What it costs the model to change one of its weights, to second order.

With labels y drawn from the model's own predictions and G the gradient of their log-likelihood,
E[G G^T] is the Fisher information, which is the Hessian of the divergence: a change D of a weight
moves the model's predictions by KL = 1/2 E[<G, D>^2]. One pass forwards and one backwards give this
for any number of changes of every weight, and <G, D> is a sum over tokens of g . (D x), with x the
inputs and g the gradients of the outputs, so that no G is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pt2gguf.convert.activations import hooked
from pt2gguf.model import LayerCall, Skeleton

Versions = Callable[[str, Tensor], Mapping[str, Tensor]]
"""From a weight's checkpoint name and its values (n, m) to its versions by name, (n, m) each."""


def divergences(
    skeleton: Skeleton, ids: Tensor, names: Iterable[str], versions: Versions, device: torch.device
) -> dict[str, dict[str, float]]:
    """Mean KL divergence over the tokens, in nats, that each version of a weight alone causes.

    ids: (samples, length) int64, the more samples the better: with s of them, the relative standard
    error is about sqrt(2 / s). names: of the weights, which must belong to linear layers.
    Gives by checkpoint name, by version.
    """
    wanted = set(names)
    hidden, calls = skeleton.embed(ids, batch=1)
    inputs, outputs = _run_forwards(skeleton, hidden, calls, device)
    gradients = _gradients_of_outputs(skeleton, outputs, device)
    found: dict[str, dict[str, float]] = {}
    for index in reversed(range(len(skeleton))):
        layer = skeleton.load_layer(index, device)
        modules = {
            module: name
            for module, linear in layer.named_modules()
            if isinstance(linear, nn.Linear)
            and (name := skeleton.stored_name(index, f"{module}.weight")) in wanted
        }
        changes = {
            module: _changes(_weight(layer, module), versions(name, _weight(layer, module).cpu()))
            for module, name in modules.items()
        }
        sums = {m: torch.zeros(len(c), dtype=torch.float64) for m, c in changes.items()}
        call = calls[1][index].to(device)
        for sample in range(len(ids)):
            x = inputs[index][sample : sample + 1].to(device).requires_grad_()
            with _recorded(layer, list(modules)) as passes:
                y = call(layer, x)
            results = [out for recorded in passes.values() for _, out in recorded]
            upstream = gradients[sample : sample + 1].to(device)
            into, *of_results = torch.autograd.grad(y, [x, *results], upstream)
            remaining = iter(of_results)
            for module, recorded in passes.items():
                pairs = [(given, next(remaining)) for given, _ in recorded]
                sums[module] += _products(changes[module], pairs).square()
            gradients[sample] = into[0].cpu()  # last: a result's gradient may be `upstream` itself
        for module, name in modules.items():
            mean = sums[module] / (2 * ids.numel())
            found[name] = dict(zip(changes[module], mean.tolist(), strict=True))
    return found


@torch.no_grad()
def _run_forwards(
    skeleton: Skeleton,
    hidden: Tensor,
    calls: Mapping[int, Sequence[LayerCall]],
    device: torch.device,
) -> tuple[list[Tensor], Tensor]:
    """What enters each layer, and what leaves the last."""
    inputs: list[Tensor] = []
    for index in range(len(skeleton)):
        layer = skeleton.load_layer(index, device)
        call = calls[1][index].to(device)
        inputs.append(hidden)
        hidden = torch.cat([call(layer, part.to(device)).cpu() for part in hidden.split(1)])
    return inputs, hidden


def _gradients_of_outputs(skeleton: Skeleton, outputs: Tensor, device: torch.device) -> Tensor:
    """Of the log-likelihood of drawn labels with respect to what leaves the last layer."""
    head = skeleton.head(device)
    generator = torch.Generator().manual_seed(0)
    gradients: list[Tensor] = []
    for sample in outputs.split(1):
        x = sample.to(device).requires_grad_()
        logits = head(x).float().log_softmax(-1)[0]
        labels = torch.multinomial(logits.detach().exp().cpu(), 1, generator=generator).to(device)
        (gradient,) = torch.autograd.grad(logits.gather(1, labels).sum(), x)
        gradients.append(gradient.cpu())
    return torch.cat(gradients)


def _weight(layer: nn.Module, module: str) -> Tensor:
    return layer.get_submodule(module).get_parameter("weight").detach()


def _changes(weight: Tensor, versions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {version: values.to(weight) - weight for version, values in versions.items()}


Passes = dict[str, list[tuple[Tensor, Tensor]]]
"""Inputs and outputs of linear layers, by module."""


@contextmanager
def _recorded(layer: nn.Module, modules: list[str]) -> Iterator[Passes]:
    """Inputs and outputs of the linear layers `modules` in the passes within this context."""
    passes: Passes = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            passes.setdefault(name, []).append((args[0].detach(), output))

        return hook

    with hooked(layer, {module: record(module) for module in modules}):
        yield passes


def _products(changes: Mapping[str, Tensor], pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(versions,) float64: <G, D> of each change D, summed over the tokens of `pairs`."""
    return torch.stack(
        [
            torch.stack([((x @ change.T) * g).sum(dtype=torch.float64) for x, g in pairs]).sum()
            for change in changes.values()
        ]
    ).cpu()
