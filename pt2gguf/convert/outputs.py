"""How much the model's predictions depend on each output of its linear layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pt2gguf.convert.gradients import GradientLayer, gradient_layers
from pt2gguf.convert.groups import EXPERT, rounded_together, watched_stages
from pt2gguf.convert.machine import computes_bfloat16
from pt2gguf.convert.progress import Reporter
from pt2gguf.convert.workdir import WorkDirectory, group_key
from pt2gguf.errors import Pt2Error
from pt2gguf.model import Skeleton
from pt2gguf.ternary import Method, OutputStatistics

# Tokens in one pass. Part of the result, as sums over batches depend on it.
TOKENS_PER_BATCH = 2048
# Tokens of a sample that are read. More samples say more than longer ones, and take less time.
READ_LENGTH = 256


def collect_outputs(
    skeleton: Skeleton,
    texts: Sequence[Tensor],
    method: Method,
    work: WorkDirectory,
    device: torch.device,
    reporter: Reporter,
) -> None:
    """Store the output statistics of every layer that `work` has neither those nor weights of.

    texts: each (samples, length) int64, of which method.output_tokens are read.
    """
    layers = range(len(skeleton))
    if all(work.has_layer(index) or work.load_outputs(index) is not None for index in layers):
        return
    begun = time.monotonic()
    reporter.note("the gradients at each layer's outputs are taken, to know which matter")
    read = _beginnings(texts, method.output_tokens)
    # Autocast's cache would keep what enters each layer, which needs gradients, to the end.
    with torch.autocast(
        device.type,
        dtype=torch.bfloat16,
        enabled=computes_bfloat16(device),
        cache_enabled=False,
    ):
        for gradients in gradient_layers(skeleton, read, TOKENS_PER_BATCH, work.path, device):
            _collect(gradients, skeleton, method, work, device)
    reporter.note(f"that took {time.monotonic() - begun:.0f} s")


def _collect(
    gradients: GradientLayer,
    skeleton: Skeleton,
    method: Method,
    work: WorkDirectory,
    device: torch.device,
) -> None:
    """One layer's, in a function of its own, so that they are gone before the next one's."""
    index = gradients.index
    names = {
        module: skeleton.stored_name(index, f"{module}.weight")
        for module, linear in gradients.layer.named_modules()
        if isinstance(linear, nn.Linear) and has_output_statistics(module)
    }
    rounded = [module for module, name in names.items() if name not in work.kept]

    def alone(module: str) -> bool:
        return not method.stack_shared_inputs or names[module] in work.stock

    statistics = _statistics(gradients, rounded, alone, device)
    named = {
        group_key([names[module] for module in modules]): found
        for modules, found in statistics.items()
    }
    for key, found in named.items():
        _require_finite(key, found)
    if not work.has_layer(index):
        work.save_outputs(index, named)


def has_output_statistics(name: str) -> bool:
    """Whether they are collected for the matrix `name`: not for experts.

    Each expert sees few of the tokens, so that its statistics would say little, and they would take
    several times the space of the model.
    """
    return EXPERT.search(name) is None


def tokens_read(tokens: int, samples: int, length: int) -> int:
    """At most, of a calibration text (samples, length) where `tokens` are asked for."""
    longest = min(length, READ_LENGTH)
    # Two texts, of each of which at least one sample is read.
    return min(samples * length, max(tokens, longest) + longest)


def _beginnings(texts: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Those of the first samples of each text, about `tokens` altogether and in proportion."""
    texts = [ids[:, :READ_LENGTH] for ids in texts]
    share = min(1.0, tokens / sum(ids.numel() for ids in texts))
    return [ids[: max(1, round(share * len(ids)))] for ids in texts]


def _statistics(
    gradients: GradientLayer,
    linears: Sequence[str],
    alone: Callable[[str], bool],
    device: torch.device,
) -> dict[tuple[str, ...], OutputStatistics]:
    """By the modules that are rounded together."""
    found = {
        modules: OutputStatistics.empty(
            sum(_rows(gradients.layer, module) for module in modules), device
        )
        for stage in watched_stages(gradients.layer, linears, gradients.forward_passes())
        for group in stage.groups
        for modules in rounded_together(group.modules, alone)
    }
    for passes in gradients.passes(linears):
        for modules, statistics in found.items():
            for calls in zip(*(passes.get(module, []) for module in modules), strict=True):
                together = torch.cat([g.flatten(0, -2) for _, g in calls], dim=1)
                statistics.add(together)
    return found


def _require_finite(names: str, statistics: OutputStatistics) -> None:
    if not all(torch.isfinite(part).all() for part in statistics.parts):
        raise Pt2Error(
            f"the gradients at the outputs of {names} are NaN, infinite or too large to square: "
            "calibrate on other text, or check that the checkpoint works in float32"
        )


def _rows(layer: nn.Module, module: str) -> int:
    return len(layer.get_submodule(module).get_parameter("weight"))
