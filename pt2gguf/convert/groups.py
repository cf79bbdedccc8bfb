"""Which linear layers of a decoder layer to ternarize, and in which order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pt2gguf.blocks import BLOCK_SIZE

ROUTER = re.compile(r"(^|\.)(\w*_)?(gate|router)$")
EXPERT = re.compile(r"(?<=\bexperts\.)\d+\b")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
STATISTICS_BYTES = 2**32  # of one stage, unless a single group needs more


Keep = Callable[[str], str | None]
"""From the checkpoint name of a matrix to why it is to stay in a stock type; None if it is not."""


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same input, by their names within the decoder layer."""

    modules: tuple[str, ...]
    columns: int


@dataclass(frozen=True)
class Stage:
    """Groups that do not depend on each other: one, or those of the experts of a mixture."""

    groups: tuple[Group, ...]


def routers(layer: nn.Module, config: Any) -> list[str]:
    """Names of the modules that choose experts; none in a model without experts."""
    if not any(getattr(config, key, None) for key in EXPERT_COUNTS):
        return []
    return [
        name for name, _ in layer.named_modules() if ROUTER.search(name) and not EXPERT.search(name)
    ]


@dataclass(frozen=True)
class Selection:
    """What becomes of the matrices of a decoder layer.

    ternary: names of the linear layers (nn.Linear) to ternarize; asked_for: of those that `Keep`
    wants in a stock type; reasons: for every matrix that is not ternary, by checkpoint name.
    """

    ternary: list[str]
    asked_for: list[str]
    reasons: dict[str, str]


def select_linears(
    layer: nn.Module, config: Any, stored_name: Callable[[str], str], keep: Keep
) -> Selection:
    """What to ternarize in a decoder layer, and what not.

    stored_name: from a parameter's name within the layer to its name in the checkpoint.
    """
    selected = Selection([], [], {})
    reasons = selected.reasons
    choosing = routers(layer, config)
    for owner_name, owner in layer.named_modules():
        for key, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            name = stored_name(f"{owner_name}.{key}" if owner_name else key)
            if any(f"{owner_name}.".startswith(f"{router}.") for router in choosing):
                reasons[name] = "it chooses experts"
            elif not isinstance(owner, nn.Linear) or key != "weight":
                reasons[name] = f"it belongs to {type(owner).__name__}, not to a linear layer"
            elif owner.in_features % BLOCK_SIZE:
                reasons[name] = (
                    f"its row length {owner.in_features} is not a multiple of {BLOCK_SIZE}"
                )
            elif (reason := keep(name)) is not None:
                reasons[name] = reason
                selected.asked_for.append(owner_name)
            else:
                selected.ternary.append(owner_name)
    return selected


def rounded_together(modules: Sequence[str], alone: Callable[[str], bool]) -> list[tuple[str, ...]]:
    """What of a group is rounded as one matrix; a module that is `alone` by itself."""
    together = tuple(module for module in modules if not alone(module))
    by_themselves = [(module,) for module in modules if alone(module)]
    return [*([together] if together else []), *by_themselves]


class InputGroups:
    """Finds the groups by watching forward passes."""

    def __init__(self, layer: nn.Module, linears: Sequence[str]) -> None:
        self._modules = {name: layer.get_submodule(name) for name in linears}
        # For each linear layer that ran: the inputs of its calls in its first forward pass.
        self._inputs: dict[str, tuple[Any, ...]] = {}

    @contextmanager
    def watch(self) -> Any:
        """Within this context, one forward pass of the layer."""
        calls: dict[str, list[tuple[Any, ...]]] = {}
        alive: list[Tensor] = []  # or a later tensor could take an earlier one's address

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0]
                if not x.numel():
                    return  # as an expert's that no token chose: nothing tells it from others
                alive.append(x)
                identity = (x.data_ptr(), x._version, x.numel(), x.shape[-1], x.stride(-1))
                calls.setdefault(name, []).append(identity)

            return hook

        handles = [m.register_forward_pre_hook(note(name)) for name, m in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        run = len(self._inputs)  # tells the passes apart, whose addresses may be the same
        for name, identities in calls.items():
            self._inputs.setdefault(name, (run, *identities))

    def all_seen(self) -> bool:
        return len(self._inputs) == len(self._modules)

    def stages(self) -> list[Stage]:
        """The groups in the order of the forward pass, those of sibling experts together.

        A linear layer that never ran (an expert that no token chose) is grouped as its siblings
        are; without any, it is a group of its own, at the end.
        """
        by_input: dict[Any, list[str]] = {}
        for name, inputs in self._inputs.items():
            by_input.setdefault(inputs, []).append(name)
        siblings: dict[str, int] = {}  # template of a name -> the group kind that it is in
        members: dict[Any, list[str]] = {}
        for number, names in enumerate(by_input.values()):
            kind = siblings.setdefault(_template(names[0]), number)
            for name in names:
                siblings.setdefault(_template(name), kind)
            members[(kind, number)] = names
        for name in self._modules:
            if name not in self._inputs:
                kind = siblings.setdefault(_template(name), len(by_input) + len(siblings))
                members.setdefault((kind, _expert(name)), []).append(name)
        kinds: dict[int, list[Group]] = {}
        for (kind, _), names in sorted(members.items(), key=lambda item: item[0][0]):
            group = Group(tuple(names), self._columns(names[0]))
            kinds.setdefault(kind, []).append(group)
        return [Stage(part) for groups in kinds.values() for part in _within_budget(groups)]

    def _columns(self, name: str) -> int:
        module = self._modules[name]
        assert isinstance(module, nn.Linear)
        return module.in_features


@torch.no_grad()
def watched_stages(
    layer: nn.Module, linears: Sequence[str], passes: Iterable[Callable[[], object]]
) -> list[Stage]:
    """The stages of `linears`, as they show in forward passes of `layer`, as many as that takes."""
    groups = InputGroups(layer, linears)
    for run in passes:
        with groups.watch():
            run()
        if groups.all_seen():
            break
    return groups.stages()


def statistics_bytes(columns: int) -> int:
    """Of one group: two float64 matrices."""
    return 16 * columns * columns


def _within_budget(groups: Iterable[Group]) -> Iterable[tuple[Group, ...]]:
    part: list[Group] = []
    for group in groups:
        if part and statistics_bytes(group.columns) * (len(part) + 1) > STATISTICS_BYTES:
            yield tuple(part)
            part = []
        part.append(group)
    yield tuple(part)


def _template(name: str) -> str:
    """The name without the expert's number: equal for the experts of a mixture."""
    return EXPERT.sub("#", name)


def _expert(name: str) -> tuple[str, ...]:
    return tuple(EXPERT.findall(name))
