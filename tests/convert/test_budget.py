"""Where bits are needed most, and spending them there."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import CONFIGS, VOCABULARY, make_model, save_model
from torch import Tensor

from pt2gguf.convert.budget import TERNARY, choose_types
from pt2gguf.convert.sensitivity import divergences
from pt2gguf.model import Checkpoint, Skeleton

CPU = torch.device("cpu")
SPREAD = {"initializer_range": 0.1}


def _ids(samples: int, length: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(VOCABULARY, size=(samples, length)))


@torch.no_grad()
def _measured(kind: str, ids: Tensor, name: str, values: Tensor) -> float:
    """Mean KL divergence between the model and the one with `values` for the weight `name`."""
    full, changed = make_model(kind, **SPREAD).double(), make_model(kind, **SPREAD).double()
    dict(changed.named_parameters())[name].copy_(values)
    wanted, found = (model(ids).logits.log_softmax(-1) for model in (full, changed))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_divergence_of_small_changes_is_what_is_measured(tmp_path: Path, kind: str) -> None:
    skeleton = Skeleton(Checkpoint(save_model(tmp_path, kind, **SPREAD)))
    samples = 400
    ids = _ids(samples, 16)
    names = [
        f"model.layers.{layer}.{part}.weight"
        for layer, part in product(range(2), ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"])
    ]
    noise = torch.Generator().manual_seed(0)
    changes: dict[str, Tensor] = {}

    def versions(name: str, weight: Tensor) -> dict[str, Tensor]:
        changes[name] = 0.01 * torch.randn(weight.shape, generator=noise)
        return {"changed": weight + changes[name], "twice": weight + 2 * changes[name]}

    found = divergences(skeleton, ids, names, versions, tmp_path, CPU)
    assert found.keys() == set(names)
    for name in names:
        weight = skeleton.checkpoint.read(name)
        measured = _measured(kind, ids, name, (weight + changes[name]).double())
        # <G, D> is a sum over tokens, close to normal: its mean square over the samples has a
        # relative standard error of sqrt(2 / samples); the third order of the expansion is
        # far below that for changes this small. Four of them, for six weights.
        assert found[name]["changed"] == pytest.approx(measured, rel=4 * math.sqrt(2 / samples))
        assert found[name]["twice"] == pytest.approx(4 * found[name]["changed"], rel=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_change_costs_nothing(tmp_path: Path, kind: str) -> None:
    skeleton = Skeleton(Checkpoint(save_model(tmp_path, kind)))
    names = [name for name in skeleton.checkpoint.tensors if name.endswith("_proj.weight")]
    found = divergences(
        skeleton, _ids(3, 8), names, lambda name, w: {"same": w.clone()}, tmp_path, CPU
    )
    assert found.keys() == set(names) or "moe" in kind or kind == "mixtral"
    assert all(version == {"same": 0.0} for version in found.values())


BITS = {TERNARY: 2.0, "small": 3.0, "large": 6.0}


def test_the_most_for_the_bits() -> None:
    weights = {"a": 100, "b": 100, "c": 200}
    losses = {
        "a": {TERNARY: 5.0, "small": 1.0, "large": 0.0},  # 4 for 100 bits
        "b": {TERNARY: 1.0, "small": 0.5, "large": 0.4},  # 0.5 for 100 bits
        "c": {TERNARY: 3.0, "small": 2.0, "large": 2.5},  # 1 for 200 bits
    }

    def chosen(budget: float) -> dict[str, str]:
        return choose_types(weights, losses, BITS, budget)

    assert chosen(2.0) == {}
    assert chosen(2.24) == {}
    assert chosen(2.25) == {"a": "small"}
    assert chosen(2.5) == {"a": "small", "b": "small"}
    assert chosen(2.75) == {"a": "small", "c": "small"} or chosen(2.75)["b"] == "small"
    assert chosen(100.0) == {"a": "large", "b": "large", "c": "small"}


@given(
    st.lists(
        st.tuples(
            st.integers(1, 1000),
            st.floats(0, 10, allow_subnormal=False),
            st.floats(0, 10, allow_subnormal=False),
            st.floats(0, 10, allow_subnormal=False),
        ),
        min_size=1,
        max_size=8,
    ),
    st.floats(2, 8),
)
def test_within_the_budget_and_never_for_worse(
    tensors: list[tuple[int, float, float, float]], budget: float
) -> None:
    weights = {str(i): size for i, (size, *_) in enumerate(tensors)}
    losses = {
        str(i): {TERNARY: t, "small": s, "large": x} for i, (_, t, s, x) in enumerate(tensors)
    }
    chosen = choose_types(weights, losses, BITS, budget)
    spent = sum(BITS[chosen.get(t, TERNARY)] * size for t, size in weights.items())
    assert spent <= budget * sum(weights.values()) * (1 + 1e-12)
    for tensor, kind in chosen.items():
        assert losses[tensor][kind] < losses[tensor][TERNARY]
    # Nothing that gains still fits.
    left = budget * sum(weights.values()) - spent
    for tensor, size in weights.items():
        now = chosen.get(tensor, TERNARY)
        for kind, loss in losses[tensor].items():
            cost = (BITS[kind] - BITS[now]) * size
            assert not (0 < cost < left * (1 - 1e-9) and loss < losses[tensor][now])
