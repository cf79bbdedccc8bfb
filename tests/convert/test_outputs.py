"""Second moments of the gradients at the outputs of linear layers."""

from __future__ import annotations

import errno
import os
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import CONFIGS, VOCABULARY, make_model, save_model
from torch import Tensor, nn

from pt2gguf.convert import gradients, outputs
from pt2gguf.convert.calibration import Calibration
from pt2gguf.convert.outputs import _beginnings, collect_outputs, tokens_read
from pt2gguf.convert.progress import SilentReporter
from pt2gguf.convert.run import split_texts, ternarize_checkpoint
from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.errors import Pt2Error
from pt2gguf.model import Checkpoint, LayerCall, Skeleton, load_model
from pt2gguf.ternary import METHODS, OutputStatistics

CPU = torch.device("cpu")
METHOD = replace(METHODS["default"], tuning_epochs=0, written_windows=0)
SPREAD = {"initializer_range": 0.1}


def _ids(seed: int, samples: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (samples, length), generator=generator)


def _collected(
    path: Path,
    kind: str,
    texts: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    bfloat16: bool = False,
    **changes: object,
) -> dict[str, OutputStatistics]:
    """By group, as they are stored for layers that are still to be ternarized."""
    checkpoint = Checkpoint(save_model(path / "m", kind, **SPREAD))
    monkeypatch.setattr(outputs, "computes_bfloat16", lambda device: bfloat16)
    method = replace(METHOD, **changes)
    calibration = Calibration(texts[0], {})
    with ternarize_checkpoint(
        checkpoint, replace(method, output_tokens=0), calibration, path / "w"
    ) as work:
        for file in work.path.glob("layer-*"):
            file.unlink()
        collect_outputs(Skeleton(checkpoint), texts, method, work, CPU, SilentReporter())
        found: dict[str, OutputStatistics] = {}
        for index in range(work.settings.layers):
            stored = work.load_outputs(index) or {}
            found |= {group: of_group.on(CPU) for group, of_group in stored.items()}
    return found


def test_against_gradients_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expectation over signs, in the last layer, where a token's gradients know only itself.

    There each token's Fisher information at an output is J F J^T with F = diag(p) - p p^T.
    """
    texts = [_ids(0, 400, 24), _ids(1, 200, 16)]
    found = _collected(tmp_path, "llama", texts, monkeypatch)
    model = make_model("llama", **SPREAD)
    expected = torch.zeros(128, 128, dtype=torch.float64)
    variance = torch.zeros_like(expected)
    seen: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for ids in texts:
        logits = model(ids).logits.detach()
        x = seen.pop().reshape(-1, 128)
        p = logits.reshape(-1, VOCABULARY).double().softmax(-1)
        rows = (
            torch.func.vmap(
                torch.func.jacrev(lambda v: model.lm_head(model.model.norm(v.unsqueeze(0)))[0])
            )(x)
            .detach()
            .double()
        )  # (tokens, vocabulary, 128)
        centred = rows - torch.einsum("tv,tvd->td", p, rows).unsqueeze(1)
        of_tokens = torch.einsum("tv,tvd,tve->tde", p, centred, centred)
        own = of_tokens.diagonal(dim1=1, dim2=2)
        expected += of_tokens.sum(0)
        variance += own.T @ own + of_tokens.square().sum(0)
    (moments,) = found["model.layers.1.mlp.down_proj.weight"].matrices()
    # Each token adds g_d g_e with g = sum of sign_k a_k, of variance below G_dd G_ee + G_de^2; 5
    # standard errors for the largest of 128 x 129 / 2 different entries.
    assert ((moments - expected).abs() <= 5 * variance.sqrt()).all()
    assert float(moments.trace() / expected.trace()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("stacked", [True, False])
def test_groups_of_every_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stacked: bool
) -> None:
    found = _collected(tmp_path, kind, [_ids(0, 4, 24)], monkeypatch, stack_shared_inputs=stacked)
    rows = {
        f"{name}.weight": module.out_features
        for name, module in make_model(kind).named_modules()
        if isinstance(module, nn.Linear)
        and ".layers." in name
        and not name.endswith(".gate")
        and ".experts." not in name
    }
    names = [key.split(" + ") for key in found]
    assert sorted(name for group in names for name in group) == sorted(rows)
    assert stacked == any(len(group) > 1 for group in names)
    for group, statistics in zip(names, found.values(), strict=True):
        assert sum(len(part) for part in statistics.parts) == sum(rows[name] for name in group)


def test_only_what_is_missing_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    calibration = Calibration(_ids(0, 4, 24), {})
    kept = WorkDirectory.drop_outputs
    monkeypatch.setattr(WorkDirectory, "drop_outputs", lambda self, index: None)
    reporter = SilentReporter()
    with ternarize_checkpoint(
        checkpoint, METHOD, calibration, tmp_path / "w", reporter=reporter
    ) as work:
        assert len(reporter.notes) == 2
        arguments = (Skeleton(checkpoint), [calibration.ids], METHOD, work, CPU)
        (work.path / "layer-0001.safetensors").unlink()
        again = SilentReporter()
        collect_outputs(*arguments, again)
        assert not again.notes  # the statistics of layer 1 are there
        kept(work, 0)
        kept(work, 1)
        collect_outputs(*arguments, again)
        assert len(again.notes) == 2
        assert work.load_outputs(0) is None  # that layer is ternary
        assert work.load_outputs(1) is not None


@torch.no_grad()
def test_the_model_gains(tmp_path: Path) -> None:
    """With them the whole ternary model's predictions come closer to the full-precision ones."""
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama", **SPREAD))
    calibration = Calibration(_ids(0, 64, 64), {})
    test = _ids(7, 64, 64)
    wanted = load_model(checkpoint, {})(test).logits.log_softmax(-1)
    divergence = {}
    for tokens in (0, 4096):
        method = replace(METHOD, output_tokens=tokens)
        with ternarize_checkpoint(checkpoint, method, calibration, tmp_path / f"{tokens}") as work:
            replaced = {
                name: weight.dequantize()
                for index in range(work.settings.layers)
                for name, weight in work.final_weights(index).items()
            }
        found = load_model(checkpoint, replaced)(test).logits.log_softmax(-1)
        divergence[tokens] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert divergence[4096] < 0.97 * divergence[0]


def test_predictions_that_are_not_a_number() -> None:
    def head(hidden: Tensor) -> Tensor:
        return hidden * torch.tensor([1.0, torch.nan])

    with pytest.raises(Pt2Error, match="predictions are NaN"):
        gradients._at_last_output(head, torch.ones(1, 4, 2), torch.Generator())


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Pt2Error, match=r"no room for 12\.0 GB.*No space left.*--work"):
        gradients._on_disk(tmp_path, [3, 2 * 10**9])


def test_what_enters_a_layer_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where q, k and v read it as it is, and autocast makes a copy."""
    entered: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    call = LayerCall.__call__

    def remembered(self: LayerCall, layer: nn.Module, hidden: Tensor) -> Tensor:
        if hidden.requires_grad:
            alive.append(sum(there() is not None for there in entered))
            entered.append(weakref.ref(hidden))
        return call(self, layer, hidden)

    monkeypatch.setattr(outputs, "TOKENS_PER_BATCH", 24)
    monkeypatch.setattr(LayerCall, "__call__", remembered)
    _collected(tmp_path, "olmo2", [_ids(0, 8, 24)], monkeypatch, bfloat16=True)
    assert len(alive) == 2 * 8  # layers, batches
    assert max(alive) <= 1


@pytest.mark.parametrize("samples", [1, 4, 128])
@pytest.mark.parametrize("length", [24, 512, 2048])
@pytest.mark.parametrize("tokens", [32, 16384])
def test_no_more_is_read_than_estimated(samples: int, length: int, tokens: int) -> None:
    """Where a long sample gives way to several written ones, of each of which a part is read."""
    written = torch.zeros(64, min(length, 512), dtype=torch.int64)
    ids = torch.zeros(samples, length, dtype=torch.int64)
    for tuned in (False, True):
        texts, _ = split_texts(ids, written, tuned=tuned)
        read = sum(part.numel() for part in _beginnings(texts, tokens))
        assert 0 < read <= tokens_read(tokens, samples, length)
