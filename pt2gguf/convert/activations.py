"""What the linear layers of a decoder layer receive when it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pt2gguf.convert.groups import Group, Stage
from pt2gguf.errors import Pt2Error


class _Seen(Exception):  # noqa: N818 - a signal, not a failure
    """The forward pass has passed what was asked for."""


def stage_inputs(
    layer: nn.Module, stage: Stage, run: Callable[[], Any], *, to_the_end: bool = False
) -> dict[Group, Tensor]:
    """The inputs (tokens, m) of each group of `stage` in one forward pass of `layer`.

    run: makes that pass; it is cut short once a stage of one group has its input, unless it is to
    go on `to_the_end`. Groups that received nothing are left out.
    """
    received: dict[Group, list[Tensor]] = {}

    def take(group: Group) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            received.setdefault(group, []).append(args[0].reshape(-1, group.columns))
            if len(stage.groups) == 1 and not to_the_end:
                raise _Seen

        return hook

    handles = [
        layer.get_submodule(group.modules[0]).register_forward_pre_hook(take(group))
        for group in stage.groups
    ]
    try:
        run()
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return {group: torch.cat(parts) for group, parts in received.items()}


@contextmanager
def hooked(layer: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within this context, the modules named in `hooks` have these forward hooks."""
    handles = [layer.get_submodule(n).register_forward_hook(hook) for n, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_outputs(layer: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The outputs of the modules `names` in the forward passes within this context."""
    outputs: dict[str, Any] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name] = output

        return hook

    with hooked(layer, {name: record(name) for name in names}):
        yield outputs


@contextmanager
def replayed_outputs(layer: nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Within this context, the named modules give `outputs` instead of their own."""

    def replay(name: str) -> Callable[..., Any]:
        return lambda module, args, output: outputs[name]

    with hooked(layer, {name: replay(name) for name in outputs}):
        yield


def require_finite(values: Tensor, source: str) -> None:
    """Raises Pt2Error naming `source` and the count if any of `values` is NaN or infinite."""
    bad = values.numel() - int(torch.isfinite(values).sum())
    if bad:
        raise Pt2Error(
            f"{bad} outputs of {source} are NaN or infinite: calibrate on other text, or check "
            "that the checkpoint works in float32"
        )
