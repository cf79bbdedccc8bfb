from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import CONFIGS, VOCABULARY, save_model
from transformers import AutoModelForCausalLM

from pt2gguf.errors import Pt2Error
from pt2gguf.model import Checkpoint, Skeleton, load_model
from pt2gguf.model.checkpoint import StoredTensor

# Values that go to this device are gone from the host, as on a GPU.
ELSEWHERE = torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_is_the_model_that_transformers_loads(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    path = save_model(tmp_path, kind, dtype=torch.bfloat16)
    model = load_model(Checkpoint(path), {}, dtype=dtype)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    for tensors in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, tensors)()) for m in (model, expected))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not model.training
    ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_weights_to_use_instead(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path, "qwen3"))  # its head is its embeddings
    name = "model.embed_tokens.weight"
    ones = torch.ones(checkpoint.tensors[name].shape)
    model = load_model(checkpoint, {name: ones})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, ones)
    with pytest.raises(Pt2Error, match=r"embed_tokens.weight has shape \(1, 2\) where"):
        load_model(checkpoint, {name: torch.ones(1, 2)})


def test_a_missing_tensor(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path, "llama"))
    del checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(Pt2Error, match=r"has no tensor model.layers.1.mlp.up_proj.weight"):
        load_model(checkpoint, {})


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Appended to at each reading: how many of the tensors read before are still in memory."""
    counts: list[int] = []
    arrays: list[weakref.ref] = []
    read: Callable[[Checkpoint, StoredTensor], torch.Tensor] = Checkpoint._read

    def watched(self: Checkpoint, stored: StoredTensor) -> torch.Tensor:
        counts.append(sum(array() is not None for array in arrays))
        array = read(self, stored).numpy().copy()  # lives as long as the tensor's values do
        arrays.append(weakref.ref(array))
        return torch.from_numpy(array)

    monkeypatch.setattr(Checkpoint, "_read", watched)
    return counts


@pytest.mark.parametrize("part", ["model", "layer", "head"])
def test_the_host_holds_one_tensor_at_a_time(
    tmp_path: Path, on_the_host: list[int], part: str
) -> None:
    checkpoint = Checkpoint(save_model(tmp_path, "llama"))
    skeleton = Skeleton(checkpoint)
    loaders = {
        "model": lambda device: load_model(checkpoint, {}, device),
        "layer": lambda device: skeleton.load_layer(1, device),
        "head": skeleton.head,
    }
    loaders[part](ELSEWHERE)
    assert len(on_the_host) > 2
    assert set(on_the_host) == {0}
    on_the_host.clear()
    # On the CPU they stay, which the counts show.
    loaders[part](torch.device("cpu"))
    assert on_the_host == list(range(len(on_the_host)))
