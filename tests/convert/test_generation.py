"""Text that models write, and its attention of one token after the other."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from small_models import CONFIGS, MORE_CONFIGS, VOCABULARY, make_model
from torch import Tensor, nn
from transformers import Cache, CompileConfig

from pt2gguf.convert import generation
from pt2gguf.convert.generation import _grouped_attention, continue_text
from pt2gguf.convert.sampling import draw
from pt2gguf.replay import Replayed, replayed_if_possible

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
NEVER = [7, 11]
# One cannot compute in float64; the other's cache has the second token in a wrong place.
COMPARABLE = [kind for kind in CONFIGS | MORE_CONFIGS if kind not in ("deepseek_v3", "lfm2")]
LONGER_ROPE = {
    "original_max_position_embeddings": 24,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.5] * 16},
}


@torch.no_grad()
def read_anew(model: Any, first: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """What `continue_text` gives, by reading all of the text for each token."""
    ids = first
    while ids.shape[1] < length:
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        logits[:, NEVER] = -torch.inf
        ids = torch.cat([ids, draw(logits.softmax(-1), generator)], dim=1)
    return ids


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but that a graph is the function itself, called with what changes."""
    cache = generation._cache
    monkeypatch.setattr(generation, "_cache", lambda model, length, _: cache(model, length, True))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True
    config = partial(generation.GenerationConfig, compile_config=everywhere)
    monkeypatch.setattr(generation, "GenerationConfig", config)


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("kind", COMPARABLE)
def test_same_text_when_replayed(kind: str) -> None:
    test_same_text_as_read_anew("cpu", kind, {})


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {"num_key_value_heads": 1}), *((kind, {}) for kind in COMPARABLE)],
)
def test_same_text_as_read_anew(device: str, kind: str, changes: dict[str, Any]) -> None:
    """In float64, as roundings choose, too."""
    model = make_model(kind, initializer_range=0.1, **changes).double().to(device)
    first = torch.randint(VOCABULARY, (20, 1), generator=torch.Generator().manual_seed(1))
    first = first.to(device)
    wanted = read_anew(model, first, 40, torch.Generator().manual_seed(2))
    assert torch.equal(
        continue_text(model, first, 40, NEVER, torch.Generator().manual_seed(2)), wanted
    )
    assert len(wanted.unique()) > 40  # logits differ, but none rules


@NEEDS_GPU
@pytest.mark.parametrize(
    ("kind", "changes", "replayed"),
    [
        ("llama", {}, True),
        ("qwen3", {}, True),
        ("mixtral", {}, False),
        ("phi3", LONGER_ROPE, False),
    ],
)
def test_kernels_are_replayed(
    monkeypatch: pytest.MonkeyPatch, kind: str, changes: dict[str, Any], replayed: bool
) -> None:
    """Where neither routers nor a switch between two kinds of rotation wait for the GPU."""
    calls = []

    def counted(self: Replayed, *tensors: Tensor) -> tuple[Tensor, ...]:
        calls.append(tensors)
        return replay(self, *tensors)

    replay = Replayed.__call__
    monkeypatch.setattr(Replayed, "__call__", counted)
    first = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    with torch.no_grad():
        continue_text(make_model(kind, **changes).cuda(), first, 20, [], torch.Generator())
    assert len(calls) == (19 if replayed else 0)  # one to try, and all but the first


@pytest.mark.usefixtures("replayed")
def test_nothing_stays_in_memory() -> None:
    """On a GPU the next windows have no room otherwise; collecting garbage comes too late."""
    model = make_model("llama")
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            continue_text(model, torch.zeros(2, 1, dtype=torch.int64), 30, [], torch.Generator())
        caches = [c for c in gc.get_objects() if issubclass(type(c), Cache)]
        held = weakref.ref(model)
        del model
        assert not caches
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("replayed")
def test_what_fails_is_not_replayed() -> None:
    def waits(x: Tensor) -> tuple[Tensor]:
        raise RuntimeError("called a synchronizing CUDA operation")

    assert replayed_if_possible(waits, torch.zeros(1)) is None
    replayed = replayed_if_possible(lambda x: (x + 1,), torch.zeros(1))
    assert replayed is not None
    assert replayed(torch.ones(1)) == (2,)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"num_key_value_heads": 1}),
        ("mistral", {"sliding_window": 16}),
        ("qwen3", {}),
        ("qwen2", {}),
    ],
)
def test_shared_keys_are_read_once(
    monkeypatch: pytest.MonkeyPatch, kind: str, changes: dict[str, int]
) -> None:
    attention, calls = generation._grouped_attention, []

    def counted(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append(args)
        return attention(*args, **kwargs)

    monkeypatch.setattr(generation, "_grouped_attention", counted)
    model = make_model(kind, **changes)
    with torch.no_grad():
        continue_text(model, torch.zeros(2, 1, dtype=torch.int64), 30, [], torch.Generator())
    assert len(calls) == 29 * model.config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_against_float64(dtype: torch.dtype, shared: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(shared)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query, key, value = some(3, 2 * shared, 1, 32), some(3, 2, 45, 32), some(3, 2, 45, 32)
    mask = torch.rand(3, 1, 1, 48, generator=generator) < 0.5 if masked else None
    found, _ = _grouped_attention(nn.Identity(), query, key, value, mask, scaling=0.3)
    scores = query.double() @ key.double().repeat_interleave(shared, 1).mT * 0.3
    if mask is not None:
        scores = scores.masked_fill(~mask[..., :45], -torch.inf)
    wanted = scores.softmax(-1) @ value.double().repeat_interleave(shared, 1)
    # The shares and the result are rounded, sums are float32's.
    bound = (2 * torch.finfo(dtype).eps + 64 * 2**-23) * float(value.abs().max())
    assert found.shape == (3, 1, 2 * shared, 32)
    assert (found.double() - wanted.transpose(1, 2)).abs().max() <= bound
