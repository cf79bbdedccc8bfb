"""Gradients of the model's predictions at the outputs of its linear layers, layer by layer.

They are those of random combinations of the logits, whose covariance is the Fisher information: the
Hessian of the divergence from the model's own predictions.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pt2gguf.convert.activations import hooked, require_finite
from pt2gguf.convert.machine import RepeatableAttention
from pt2gguf.errors import Pt2Error
from pt2gguf.model import LayerCall, Skeleton

# Tokens whose logits are computed together.
TOKENS_PER_HEAD = 512

Passes = dict[str, list[tuple[Tensor, Tensor]]]
"""Inputs of linear layers and the gradients at their outputs in one pass, by module."""


class GradientLayer:
    """A decoder layer of the full-precision model, with all that passes through it."""

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        samples: Sequence[tuple[LayerCall, Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        """samples: for each batch the layer's call, its input (bfloat16), and the gradient at its
        output, in whose place `passes` puts that at the input."""
        self.index = index
        self.layer = layer
        self._samples = samples
        self._device = device

    def forward_passes(self) -> Iterator[Callable[[], object]]:
        """For each batch what runs it."""
        for call, hidden, _ in self._samples:
            yield partial(call, self.layer, hidden.to(self._device).float())

    def passes(self, modules: Sequence[str]) -> Iterator[Passes]:
        """For each batch the passes through `modules`; to be exhausted."""
        for call, hidden, gradient in self._samples:
            x = hidden.to(self._device).float().requires_grad_()
            with (
                torch.enable_grad(),
                RepeatableAttention(),
                _recorded(self.layer, modules) as recorded,
            ):
                y = call(self.layer, x)
            results = [output for calls in recorded.values() for _, output in calls]
            found = torch.autograd.grad(y, [x, *results], gradient.to(self._device))
            of_results = iter(found[1:])
            yield {
                module: [(given, next(of_results)) for given, _ in calls]
                for module, calls in recorded.items()
            }
            gradient.copy_(found[0])


def gradient_layers(
    skeleton: Skeleton,
    texts: Sequence[Tensor],
    batch_tokens: int,
    scratch: Path,
    device: torch.device,
) -> Iterator[GradientLayer]:
    """All decoder layers, the last one first. `passes` of each must be exhausted before the next.

    texts: each (samples, length) int64; batch_tokens: that run together, at least one sample;
    scratch: a directory for a file that holds every layer's inputs meanwhile, in bfloat16. Raises
    Pt2Error for outputs of layers that are not finite.
    """
    width = skeleton.config.hidden_size
    calls: list[Sequence[LayerCall]] = []  # by batch, by layer
    hidden: list[Tensor] = []  # by batch
    for ids in texts:
        size = max(1, batch_tokens // ids.shape[1])
        embedded, of_size = skeleton.embed(ids, size)
        hidden += embedded.split(size)
        calls += [of_size[len(part)] for part in embedded.split(size)]
    inputs = _on_disk(scratch, [len(skeleton), sum(ids.numel() for ids in texts), width])
    batches = [part.shape[0] * part.shape[1] for part in hidden]
    for index, place in enumerate(inputs):
        place.copy_(torch.cat([part.reshape(-1, width) for part in hidden]))
        layer = skeleton.load_layer(index, device)
        hidden = [
            _run(layer, of_batch[index].to(device), part.to(device)).cpu()
            for of_batch, part in zip(calls, hidden, strict=True)
        ]
        for part in hidden:
            require_finite(part, f"the full-precision decoder layer {index}")
    head = skeleton.head(device)
    generator = torch.Generator(device).manual_seed(0)
    gradients = [_at_last_output(head, part.to(device), generator).cpu() for part in hidden]
    del head, hidden
    for index in reversed(range(len(skeleton))):
        of_layer = [of_batch[index].to(device) for of_batch in calls]
        of_batches = inputs[index].split(batches)
        states = [x.view(g.shape) for x, g in zip(of_batches, gradients, strict=True)]
        samples = list(zip(of_layer, states, gradients, strict=True))
        yield GradientLayer(index, skeleton.load_layer(index, device), samples, device)


def _on_disk(directory: Path, shape: Sequence[int]) -> Tensor:
    """bfloat16 in a file without a name, which goes with the tensor, whatever happens."""
    size = math.prod(shape) * torch.bfloat16.itemsize
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # a disk that is full later would kill the process
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.bfloat16).view(shape)
    except OSError as error:
        raise Pt2Error(
            f"{directory} has no room for {size / 1e9:.1f} GB, what enters each layer "
            f"({error.strerror}): free some, or put the work directory elsewhere with --work"
        ) from error


@torch.no_grad()
def _run(layer: nn.Module, call: LayerCall, hidden: Tensor) -> Tensor:
    return call(layer, hidden).float()


def _at_last_output(
    head: Callable[[Tensor], Tensor], hidden: Tensor, generator: torch.Generator
) -> Tensor:
    """(batch, length, hidden_size): the gradient at what leaves the last layer."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    gradients: list[Tensor] = []
    for part in flat.split(TOKENS_PER_HEAD, dim=1):
        x = part.detach().requires_grad_()
        with torch.enable_grad():
            logits = head(x)
        probabilities = logits.detach()[0].float().softmax(-1)
        if not torch.isfinite(probabilities[:, 0]).all():  # as all of a row is, or none
            raise Pt2Error(
                "the full-precision model's predictions are NaN: calibrate on other text, or check "
                "that the checkpoint works in float32"
            )
        slope = _random_slope(probabilities, generator).unsqueeze(0)
        (gradient,) = torch.autograd.grad(logits, x, slope.to(logits.dtype))
        gradients.append(gradient)
    return torch.cat(gradients, dim=1).view_as(hidden)


def _random_slope(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """(tokens, vocabulary), for each row p of the probabilities of covariance diag(p) - p p^T.

    So has the slope of a label drawn from p, but most draws are of a likely label, and so next to
    nothing, and few are large: random signs for all labels give an estimate of less variance.
    """
    signs = torch.randint(
        2, probabilities.shape, generator=generator, dtype=torch.int8, device=generator.device
    )
    mixed = probabilities.sqrt().mul_(2 * signs - 1)
    return mixed - probabilities * mixed.sum(-1, keepdim=True)


@contextmanager
def _recorded(layer: nn.Module, modules: Iterable[str]) -> Iterator[Passes]:
    """Inputs and outputs of the linear layers `modules` in the passes within this context."""
    passes: Passes = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            passes.setdefault(name, []).append((args[0].detach(), output))

        return hook

    hooks: Mapping[str, Callable[..., None]] = {module: record(module) for module in modules}
    with hooked(layer, hooks):
        yield passes
