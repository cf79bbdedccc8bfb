from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import VOCABULARY, save_model
from torch import nn

from pt2gguf.convert.activations import recorded_outputs, replayed_outputs, stage_inputs
from pt2gguf.convert.groups import (
    STATISTICS_BYTES,
    Group,
    InputGroups,
    Stage,
    _within_budget,
    routers,
    select_linears,
)
from pt2gguf.model import Checkpoint, Skeleton

CPU = torch.device("cpu")
DENSE = [
    [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")],
    [("self_attn.o_proj",)],
    [("mlp.gate_proj", "mlp.up_proj")],
    [("mlp.down_proj",)],
]


def _load(path: Path, kind: str, samples: int = 4, **changes: object):
    skeleton = Skeleton(Checkpoint(save_model(path, kind, **changes)))
    ids = torch.randint(VOCABULARY, (samples, 16), generator=torch.Generator().manual_seed(0))
    hidden, calls = skeleton.embed(ids, samples)
    layer = skeleton.load_layer(1, CPU)
    return skeleton, layer, calls[samples][1], hidden


def _stages(path: Path, kind: str, samples: int = 4, **changes: object) -> list[Stage]:
    skeleton, layer, call, hidden = _load(path, kind, samples, **changes)
    linears = select_linears(layer, skeleton.config, str, lambda name: None).ternary
    groups = InputGroups(layer, linears)
    with groups.watch(), torch.no_grad():
        call(layer, hidden)
    return groups.stages()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_dense_layers(tmp_path: Path, kind: str) -> None:
    stages = _stages(tmp_path, kind)
    assert [[group.modules for group in stage.groups] for stage in stages] == DENSE
    assert [stage.groups[0].columns for stage in stages] == [128, 128, 128, 256]


@pytest.mark.parametrize(
    ("kind", "block", "up", "down", "experts"),
    [
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj"), "down_proj", 4),
        ("mixtral", "block_sparse_moe", ("w1", "w3"), "w2", 3),
        ("olmoe", "mlp", ("gate_proj", "up_proj"), "down_proj", 8),
    ],
)
@pytest.mark.parametrize("samples", [1, 4])
def test_experts_are_handled_together(
    tmp_path: Path,
    kind: str,
    block: str,
    up: tuple[str, ...],
    down: str,
    experts: int,
    samples: int,
) -> None:
    stages = _stages(tmp_path, kind, samples)
    assert [[group.modules for group in stage.groups] for stage in stages[:2]] == DENSE[:2]
    assert len(stages) == 4
    names = [f"{block}.experts.{i}" for i in range(experts)]
    assert {group.modules for group in stages[2].groups} == {
        tuple(f"{name}.{part}" for part in up) for name in names
    }
    assert {group.modules for group in stages[3].groups} == {(f"{n}.{down}",) for n in names}


def test_equal_values_are_not_the_same_input() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(128, 128) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.a(x) + self.b(x.clone())
            x += 1  # in place: the same memory, another input
            return first + self.c(x) + self.d(x.view(-1, 128)).view_as(x)

    layer = Layer()
    groups = InputGroups(layer, ["a", "b", "c", "d"])
    with groups.watch(), torch.no_grad():
        layer(torch.zeros(2, 3, 128))
    assert [stage.groups[0].modules for stage in groups.stages()] == [("a",), ("b",), ("c", "d")]


def test_temporaries_at_the_same_address_are_different_inputs() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(128, 128) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(part(x * i) for i, part in enumerate(self.parts))  # each freed at once

    layer = Layer()
    groups = InputGroups(layer, [f"parts.{i}" for i in range(6)])
    with groups.watch(), torch.no_grad():
        layer(torch.ones(2, 128))
    assert [len(stage.groups) for stage in groups.stages()] == [1] * 6


def test_routers_only_where_there_are_experts(tmp_path: Path) -> None:
    skeleton, layer, *_ = _load(tmp_path / "a", "llama")
    assert routers(layer, skeleton.config) == []
    skeleton, layer, *_ = _load(tmp_path / "b", "qwen3_moe")
    assert routers(layer, skeleton.config) == ["mlp.gate"]


def test_statistics_stay_within_their_budget() -> None:
    groups = [Group((str(i),), 4096) for i in range(40)]
    parts = list(_within_budget(groups))
    assert [group for part in parts for group in part] == groups
    assert all(len(part) * 16 * 4096**2 <= STATISTICS_BYTES for part in parts)
    assert len(parts) == 3
    assert list(_within_budget([Group(("x",), 10**6)])) == [(Group(("x",), 10**6),)]


@torch.no_grad()
def test_both_models_give_their_experts_the_same_tokens(tmp_path: Path) -> None:
    """Even where the ternarized attention makes the router choose otherwise."""
    _, full, call, hidden = _load(tmp_path, "qwen3_moe")
    other = Skeleton(Checkpoint(tmp_path)).load_layer(1, CPU)
    torch.manual_seed(1)
    other.get_parameter("self_attn.o_proj.weight").normal_()
    blocks: dict[str, torch.Tensor] = {}
    for which, layer in (("other", other), ("full", full)):
        layer.get_submodule("mlp").register_forward_pre_hook(
            lambda _, args, which=which: blocks.update({which: args[0].flatten(0, 1)})
        )
    stage = Stage(tuple(Group((f"mlp.experts.{i}.gate_proj",), 128) for i in range(4)))

    with recorded_outputs(other, ["mlp.gate"]) as routed:
        inputs = stage_inputs(other, stage, lambda: call(other, hidden))
    alone = stage_inputs(full, stage, lambda: call(full, hidden))
    with replayed_outputs(full, routed):
        paired = stage_inputs(full, stage, lambda: call(full, hidden))

    assert any(inputs[g].shape != alone[g].shape for g in inputs), "the routing does differ"
    for group, x in inputs.items():
        tokens = (x[:, None] == blocks["other"][None]).all(2).int().argmax(1)
        assert torch.equal(paired[group], blocks["full"][tokens])
    again = stage_inputs(full, stage, lambda: call(full, hidden))
    assert all(torch.equal(again[g], alone[g]) for g in alone), "nothing is left behind"


@torch.no_grad()
def test_forward_is_cut_short(tmp_path: Path) -> None:
    _, layer, call, hidden = _load(tmp_path, "llama")
    ran: list[str] = []
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    group = Group(("mlp.gate_proj", "mlp.up_proj"), 128)
    inputs = stage_inputs(layer, Stage((group,)), lambda: call(layer, hidden))
    assert inputs[group].shape == (4 * 16, 128)
    assert ran == ["self_attn.q_proj", "self_attn.o_proj"]
