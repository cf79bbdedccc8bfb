"""Tuning the grids of a whole model, on the calibration text and on text that it writes itself."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import CONFIGS, VOCABULARY, make_model, save_model
from torch import Tensor, nn

from pt2gguf.convert import resources, run, tuning
from pt2gguf.convert.calibration import Calibration, load_calibration
from pt2gguf.convert.progress import SilentReporter
from pt2gguf.convert.run import split_texts, ternarize_checkpoint
from pt2gguf.convert.tuning import _Dense, _Grid, _Order, learning_rate
from pt2gguf.convert.workdir import PackedWeight, WorkDirectory, pack_digits
from pt2gguf.convert.writing import write_text
from pt2gguf.errors import Pt2Error
from pt2gguf.model import Checkpoint
from pt2gguf.ternary import METHODS, TernaryWeight

CPU = torch.device("cpu")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TUNED = replace(METHODS["default"], written_windows=12)
SPREAD = {"initializer_range": 0.1}  # logits that differ enough to matter


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(20, 48))
    np.save(tmp_path / "ids.npy", ids)
    return load_calibration([str(tmp_path / "ids.npy")], tmp_path, samples=1, length=1, seed=0)


def _final(work: WorkDirectory) -> dict[str, TernaryWeight]:
    layers = range(work.settings.layers)
    return {n: w for index in layers for n, w in work.final_weights(index).items()}


@torch.no_grad()
def _divergence(kind: str, weights: dict[str, TernaryWeight], ids: Tensor) -> float:
    """Mean KL divergence from the full-precision model of the one with ternary `weights`."""
    full, ternary = make_model(kind, **SPREAD), make_model(kind, **SPREAD)
    parameters = dict(ternary.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight.dequantize())
    wanted, found = (model(ids).logits.double().log_softmax(-1) for model in (full, ternary))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("kind", CONFIGS)
def test_comes_closer_to_the_full_precision_model(
    tmp_path: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """So much is written that unseen text gains 2% and more: with 12 windows one CPU's roundings
    made it 1% and another's nothing."""
    monkeypatch.setattr(tuning, "TOKENS_PER_STEP", 480)
    checkpoint = Checkpoint(save_model(tmp_path / "m", kind, **SPREAD))
    tuned = replace(TUNED, written_windows=40, tuning_epochs=4)
    with ternarize_checkpoint(checkpoint, tuned, calibration, tmp_path / "w") as directory:
        assert directory.is_complete()
        before = {
            name: weight
            for index in range(directory.settings.layers)
            for name, weight in directory.load_layer(index).weights.items()
        }
        after = _final(directory)
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert torch.equal(weight.digits, before[name].digits)
        assert weight.alpha.dtype == weight.mu.dtype == torch.float16
        assert bool((weight.alpha >= 0).all())
    assert any(not torch.equal(after[name].alpha, before[name].alpha) for name in after)
    unseen = torch.from_numpy(np.random.default_rng(1).integers(VOCABULARY, size=(16, 48)))
    for ids in (calibration.ids, unseen):
        assert _divergence(kind, after, ids) < _divergence(kind, before, ids)


class _Interrupts(SilentReporter):
    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def tuning_step(self, step: int, steps: int, loss: float) -> None:
        if step == self._step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [0, 3])
def test_interrupted_and_resumed_gives_the_same_bytes(
    tmp_path: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(tuning, "TOKENS_PER_STEP", 200)  # several steps
    monkeypatch.setattr(tuning, "SAVE_SECONDS", 0.0)
    checkpoint = Checkpoint(save_model(tmp_path / "m", "qwen3_moe"))
    ternarize_checkpoint(checkpoint, TUNED, calibration, tmp_path / "at once").close()
    with pytest.raises(KeyboardInterrupt):
        ternarize_checkpoint(
            checkpoint, TUNED, calibration, tmp_path / "w", reporter=_Interrupts(step)
        )
    with WorkDirectory.open_existing(tmp_path / "w") as work:
        assert work.is_rounded()
        assert not work.is_complete()
        assert (work.load_tuning() or (0, {}))[0] == step
    ternarize_checkpoint(checkpoint, TUNED, calibration, tmp_path / "w").close()
    for file in ("tuned-0000.safetensors", "tuned-0001.safetensors", "written.safetensors"):
        assert (tmp_path / "w" / file).read_bytes() == (tmp_path / "at once" / file).read_bytes()


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_same_bytes_with_little_memory_and_with_much(
    tmp_path: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tuning, "TOKENS_PER_STEP", 480)
    checkpoint = Checkpoint(save_model(tmp_path / "m", kind, **SPREAD))
    passes = {"little": 0, "much": 0}
    run_layer = tuning._TernaryLayer.forward
    for memory in passes:

        def counted(layer: nn.Module, text: int, hidden: Tensor, key: str = memory) -> Tensor:
            passes[key] += 1
            return run_layer(layer, text, hidden)

        monkeypatch.setattr(tuning._TernaryLayer, "forward", counted)
        monkeypatch.setattr(run, "fits_easily", lambda *_, ample=memory == "much": ample)
        ternarize_checkpoint(checkpoint, TUNED, calibration, tmp_path / memory).close()
    assert passes["little"] == 2 * passes["much"] > 0
    for file in ("tuned-0000.safetensors", "tuned-0001.safetensors"):
        assert (tmp_path / "little" / file).read_bytes() == (tmp_path / "much" / file).read_bytes()


def test_a_damaged_state_is_a_new_start(tmp_path: Path, calibration: Calibration) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    ternarize_checkpoint(checkpoint, TUNED, calibration, tmp_path / "w").close()
    tuned = (tmp_path / "w" / "tuned-0001.safetensors").read_bytes()
    (tmp_path / "w" / "tuned-0001.safetensors").write_bytes(tuned[:-1])
    (tmp_path / "w" / "tuning.safetensors").write_bytes(b"no safetensors")
    ternarize_checkpoint(checkpoint, TUNED, calibration, tmp_path / "w").close()
    assert (tmp_path / "w" / "tuned-0001.safetensors").read_bytes() == tuned


def test_diverging_is_an_error(
    tmp_path: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TOKENS_PER_STEP", 200)
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    method = replace(TUNED, tuning_rate=float("inf"))
    with pytest.raises(Pt2Error, match=r"diverged at step 2 .*--no-tuning"):
        ternarize_checkpoint(checkpoint, method, calibration, tmp_path / "w")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "blocks", "permuted"), [(7, 3, False), (7, 3, True), (5, 43, True)]
)
def test_dense_weight_and_its_gradients(
    rows: int, blocks: int, permuted: bool, dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(rows, blocks, generator=generator)
    mu = torch.randn(rows, blocks, generator=generator)
    digits = torch.randint(-1, 2, (rows, blocks * 128), generator=generator, dtype=torch.int8)
    perm = torch.randperm(blocks * 128, generator=generator) if permuted else None
    wanted = TernaryWeight(alpha.half(), mu.half(), digits, perm)
    alpha, mu = (v.float().to(device).requires_grad_() for v in (wanted.alpha, wanted.mu))
    order = None if perm is None else _Order.of(perm.to(device))
    dense = _Dense.apply(alpha, mu, pack_digits(digits).to(device), order, dtype)
    assert torch.equal(dense.cpu(), wanted.dequantize().to(dtype))

    upstream = torch.randn(rows, blocks * 128, generator=generator).to(dtype)
    dense.backward(upstream.to(device))
    stored = upstream.double() if perm is None else upstream.double()[:, perm]
    by_block = stored.view(rows, blocks, 128)
    by_digit = (by_block * digits.view(rows, blocks, 128)).sum(2)
    # 128 float32 terms: an error of at most 127 roundings of partial sums, each of which is at most
    # the sum of the absolute values.
    bound = 127 * 2**-24 * by_block.abs().sum(2)
    assert bool(((alpha.grad.cpu() - by_digit).abs() <= bound).all())
    assert bool(((mu.grad.cpu() - by_block.sum(2)).abs() <= bound).all())


def test_grid_starts_where_the_ternary_weight_is() -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(5, 2, generator=generator).half()
    alpha[0, 0] = 0
    mu = torch.randn(5, 2, generator=generator).half()
    digits = torch.randint(-1, 2, (5, 256), generator=generator, dtype=torch.int8)
    weight = TernaryWeight(alpha, mu, digits, None)
    grid = _Grid(PackedWeight(alpha, mu, pack_digits(digits), None), CPU)
    assert torch.equal(grid(), weight.dequantize())
    assert torch.equal(grid.rounded()[0], alpha)
    assert torch.equal(grid.rounded()[1], mu)
    nn.init.constant_(grid.alpha_change, -2.0)  # a scale that has crossed zero stops there
    assert bool((grid.rounded()[0] == 0).all())


@pytest.mark.parametrize(
    ("shape", "written", "expected"),
    [
        ((128, 512), (64, 512), ([(32, 512), (32, 512)], [(32, 512), (32, 512)])),
        ((128, 512), (1024, 512), ([(32, 512), (32, 512)], [(32, 512), (992, 512)])),
        ((128, 2048), (64, 512), ([(56, 2048), (32, 512)], [(56, 2048), (32, 512)])),
        ((4, 10), (1, 10), ([(2, 10), (1, 10)], [(1, 10)])),
        ((1, 10), (5, 10), ([(1, 10)], [(5, 10)])),
        ((4, 10), (0, 10), ([(2, 10)], [(2, 10)])),
    ],
)
def test_texts_are_shared_out(
    shape: tuple[int, int], written: tuple[int, int], expected: tuple[list, list]
) -> None:
    ids = torch.arange(shape[0] * shape[1]).view(shape)
    own = -1 - torch.arange(written[0] * written[1]).view(written)
    texts, further = split_texts(ids, own, tuned=True)
    assert ([tuple(t.shape) for t in texts], [tuple(t.shape) for t in further]) == expected
    together = torch.cat([t.flatten() for t in [*texts, *further]]).sort().values
    assert len(together) == len(together.unique())  # nothing counts twice
    assert torch.equal(together[: own.numel()], own.flatten().sort().values)  # and all written does

    untuned, further = split_texts(ids, own, tuned=False)
    assert sum(t.numel() for t in untuned) == ids.numel()
    assert not further


def test_divergence_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against PyTorch's own, by autograd."""
    monkeypatch.setattr(tuning, "TOKENS_PER_HEAD", 5)  # the last part is shorter
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(8, 31, dtype=torch.float64, generator=generator)
    model = SimpleNamespace(_head=lambda hidden: hidden @ weight)
    loss, gradient = tuning._TernaryModel._divergence(model, student, teacher)
    student.requires_grad_()
    found, wanted = ((x @ weight).log_softmax(-1) for x in (student, teacher))
    expected = nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / 12
    expected.backward()
    # It compares in float32.
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient, student.grad, rtol=1e-4, atol=1e-6)


def test_learning_rate() -> None:
    rates = [learning_rate(step, 9, 0.5) for step in range(9)]
    assert rates[0] == 0.5
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert 0 < rates[-1] < 0.02


class TestWriting:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Checkpoint:
        return Checkpoint(save_model(tmp_path / "m", "llama", bos_token_id=5, eos_token_id=7))

    def _write(self, checkpoint: Checkpoint, calibration: Calibration, windows: int = 40) -> Tensor:
        return write_text(checkpoint, windows, calibration, CPU, SilentReporter())

    def test_windows(self, checkpoint: Checkpoint, calibration: Calibration) -> None:
        ids = self._write(checkpoint, calibration)
        assert ids.shape == (40, 48)
        assert ids.dtype == torch.int64
        assert bool((ids[:, 0] == 5).all())
        assert not bool((ids == 7).any())  # the end of the text is never written
        assert len({tuple(window.tolist()) for window in ids}) == 40

    def test_depends_on_the_seed_alone(
        self, checkpoint: Checkpoint, calibration: Calibration
    ) -> None:
        torch.manual_seed(1)
        first = self._write(checkpoint, calibration)
        torch.manual_seed(2)
        untouched = torch.random.get_rng_state()
        assert torch.equal(self._write(checkpoint, calibration), first)
        assert torch.equal(torch.random.get_rng_state(), untouched)
        other = replace(calibration, provenance=calibration.provenance | {"seed": 3})
        assert not torch.equal(self._write(checkpoint, other), first)

    def test_follows_the_model(self, tmp_path: Path, calibration: Calibration) -> None:
        """A model whose head prefers one token by far writes that token."""
        model = make_model("llama", bos_token_id=5)
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.weight[11] = 1e4 * model.model.norm.weight
            model.model.norm.weight.fill_(1.0)
            model.model.embed_tokens.weight.fill_(1.0)
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        model.save_pretrained(tmp_path / "one")
        ids = self._write(Checkpoint(tmp_path / "one"), calibration)
        assert bool((ids[:, 1:] == 11).all())

    def test_without_a_first_token(self, tmp_path: Path, calibration: Calibration) -> None:
        path = save_model(tmp_path / "m", "llama", bos_token_id=None)
        ids = self._write(Checkpoint(path), calibration)
        assert torch.equal(ids[:20, 0], calibration.ids[:, 0])

    def test_settings_of_the_checkpoint_do_not_count(
        self, checkpoint: Checkpoint, calibration: Calibration
    ) -> None:
        before = self._write(checkpoint, calibration)
        (checkpoint.path / "generation_config.json").write_text('{"top_k": 1, "temperature": 0.1}')
        assert torch.equal(self._write(checkpoint, calibration), before)

    def test_too_large(
        self, checkpoint: Checkpoint, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resources, "available_memory", lambda: 1000)
        with pytest.raises(Pt2Error, match=r"memory are needed .*--written 0"):
            self._write(checkpoint, calibration)


def test_nothing_is_written_without_need(
    tmp_path: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError("the model was asked to write")

    monkeypatch.setattr("pt2gguf.convert.run.write_text", refuse)
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    for method in (METHODS["paper"], replace(TUNED, written_windows=0)):
        ternarize_checkpoint(checkpoint, method, calibration, tmp_path / "w", force=True).close()
    assert not (tmp_path / "w" / "written.safetensors").exists()
