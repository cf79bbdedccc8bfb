"""Whole conversions of small models."""

from __future__ import annotations

import gc
import io
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_models import CONFIGS, VOCABULARY, make_model, save_model
from torch import Tensor, nn

from pt2gguf.convert.calibration import Calibration, load_calibration
from pt2gguf.convert.pipeline import batch_size
from pt2gguf.convert.progress import ConsoleReporter, SilentReporter
from pt2gguf.convert.run import ternarize_checkpoint
from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.errors import Pt2Error
from pt2gguf.model import Checkpoint
from pt2gguf.ternary import METHODS, InputStatistics, TernaryWeight, ternarize

CPU = torch.device("cpu")
# The layers alone: test_tuning.py is about what follows.
DEFAULT = replace(METHODS["default"], tuning_epochs=0, written_windows=0)
NO_OUTPUTS = replace(DEFAULT, output_tokens=0)


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    return _calibration(tmp_path, 10, 48)


def _calibration(tmp_path: Path, samples: int, length: int) -> Calibration:
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(samples, length))
    np.save(tmp_path / "ids.npy", ids)
    return load_calibration([str(tmp_path / "ids.npy")], tmp_path, samples=1, length=1, seed=0)


def _files(work: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(work.glob("layer-*.safetensors"))}


def _weights(work: WorkDirectory) -> dict[str, TernaryWeight]:
    layers = range(work.settings.layers)
    return {n: w for index in layers for n, w in work.load_layer(index).weights.items()}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_architecture(
    tmp_path: Path, calibration: Calibration, kind: str, method: str
) -> None:
    path = save_model(tmp_path / "m", kind)
    reporter = SilentReporter()
    with ternarize_checkpoint(
        Checkpoint(path), METHODS[method], calibration, tmp_path / "w", reporter=reporter
    ) as work:
        assert work.is_complete()
        weights = _weights(work)
        reports = [work.load_layer(index).reports for index in range(2)]
    expected = {
        f"{name}.weight": module
        for name, module in make_model(kind).named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and not name.endswith(".gate")
    }
    assert weights.keys() == expected.keys()
    assert list(work.layer_numbers()) == list(weights)
    errors = [report["relative_error"] for layer in reports for report in layer.values()]
    # Ternary digits of normally distributed weights lose 0.19 of the energy at best without
    # looking at inputs; 1 would be as bad as dropping the matrix.
    assert max(errors) < 0.5
    routers = [name for name in work.kept if name.endswith(".gate.weight")]
    assert len(routers) == (2 if "moe" in kind or kind == "mixtral" else 0)
    assert list(work.kept) == routers
    about_weights = [note for note in reporter.notes if "weight" in note]
    assert bool(about_weights) == bool(routers)


@pytest.mark.parametrize("method", [NO_OUTPUTS, METHODS["paper"], replace(NO_OUTPUTS, gptaq=0.0)])
@torch.no_grad()
def test_against_a_slow_reference(tmp_path: Path, method) -> None:
    """Whole models in memory, every group's inputs from a full forward pass of both."""
    path = save_model(tmp_path / "m", "llama")
    calibration = _calibration(tmp_path, 100, 48)
    quantized, full = make_model("llama"), make_model("llama")
    groups = [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]

    def inputs(model: nn.Module, name: str, ids: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
        model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        hook.remove()
        return seen[0].flatten(0, 1)

    expected: dict[str, TernaryWeight] = {}
    for layer in range(2):
        for group in groups:
            names = [f"model.layers.{layer}.{name}" for name in group]
            columns = quantized.get_submodule(names[0]).in_features
            statistics = InputStatistics(columns, CPU, bool(method.gptaq))
            for ids in calibration.ids.split(batch_size(48, CPU)):
                x = inputs(quantized, names[0], ids)
                statistics.add(x, inputs(full, names[0], ids) if method.gptaq else None)
            matrices = [quantized.get_submodule(name).weight for name in names]
            if method.stack_shared_inputs:
                applied = method.for_tensor(names[0])
                whole, _ = ternarize(torch.cat(matrices), statistics, applied)
                rows = [len(matrix) for matrix in matrices]
                parts = zip(
                    whole.alpha.split(rows),
                    whole.mu.split(rows),
                    whole.digits.split(rows),
                    strict=True,
                )
                results = [TernaryWeight(*part, whole.perm) for part in parts]
            else:
                results = [
                    ternarize(matrix, statistics, method.for_tensor(name))[0]
                    for name, matrix in zip(names, matrices, strict=True)
                ]
            for name, matrix, result in zip(names, matrices, results, strict=True):
                matrix.copy_(result.dequantize())
                expected[f"{name}.weight"] = result

    with ternarize_checkpoint(Checkpoint(path), method, calibration, tmp_path / "w") as work:
        weights = _weights(work)
    assert list(weights) == list(expected)
    for name, weight in weights.items():
        # Sums in another order may tip a digit that lies between two values, not more.
        difference = weight.dequantize() - expected[name].dequantize()
        assert difference.norm() < 1e-3 * expected[name].dequantize().norm(), name


KILLED_CHILD = textwrap.dedent(
    """
    import os, signal, sys
    from dataclasses import replace
    import torch
    from pt2gguf.convert import workdir
    from pt2gguf.convert.calibration import load_calibration
    from pt2gguf.convert.progress import SilentReporter
    from pt2gguf.convert.run import ternarize_checkpoint
    from pt2gguf.model import Checkpoint
    from pt2gguf.ternary import METHODS

    base, moment = sys.argv[1:]
    if moment.startswith("saving"):
        # Every file takes two, itself and its directory: settings.json, the output statistics of
        # three layers, the layers.
        last = 2 * int(moment.removeprefix("saving ")) - 1
        sync = os.fsync
        synced = []
        def sync_or_die(descriptor):
            synced.append(descriptor)
            if len(synced) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)
        os.fsync = sync_or_die

    class Reporter(SilentReporter):
        def weight_done(self, name, shape, error, seconds):
            if name == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    calibration = load_calibration([base + "/ids.npy"], base, samples=1, length=1, seed=0)
    method = replace(METHODS["default"], tuning_epochs=0, written_windows=0)
    ternarize_checkpoint(
        Checkpoint(base + "/m"), method, calibration, base + "/w", threads=1,
        reporter=Reporter(),
    )
    """
)


@pytest.mark.parametrize(
    ("kind", "moment", "finished"),
    [
        ("llama", "model.layers.0.self_attn.o_proj.weight", 0),
        ("llama", "model.layers.2.mlp.down_proj.weight", 2),
        ("llama", "saving 3", 0),
        ("llama", "saving 6", 1),
        ("qwen3_moe", "model.layers.1.mlp.experts.2.up_proj.weight", 1),
    ],
)
def test_killed_and_resumed_gives_the_same_bytes(
    tmp_path: Path, calibration: Calibration, kind: str, moment: str, finished: int
) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", kind, num_hidden_layers=3))
    ternarize_checkpoint(checkpoint, DEFAULT, calibration, tmp_path / "whole", threads=1).close()

    child = subprocess.run(
        [sys.executable, "-c", KILLED_CHILD, str(tmp_path), moment],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    before = _files(tmp_path / "w")
    assert len(before) == finished

    resumed: list[bool] = []

    class Reporter(SilentReporter):
        def layer_done(self, index: int, reused: bool) -> None:
            resumed.append(reused)

    ternarize_checkpoint(
        checkpoint, DEFAULT, calibration, tmp_path / "w", threads=1, reporter=Reporter()
    ).close()
    assert resumed == [index < finished for index in range(3)]
    after = _files(tmp_path / "w")
    assert {name: after[name] for name in before} == before
    assert after == _files(tmp_path / "whole")
    assert sorted(file.name for file in (tmp_path / "w").iterdir()) == sorted(
        [*after, "lock", "settings.json"]
    )


def test_a_damaged_layer_is_made_again(tmp_path: Path, calibration: Calibration) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama", num_hidden_layers=3))
    ternarize_checkpoint(checkpoint, DEFAULT, calibration, tmp_path / "w").close()
    whole = _files(tmp_path / "w")
    (tmp_path / "w" / "layer-0001.safetensors").write_bytes(b"")
    ternarize_checkpoint(checkpoint, DEFAULT, calibration, tmp_path / "w").close()
    assert _files(tmp_path / "w") == whole


def test_a_finished_conversion_is_not_run_again(
    tmp_path: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    ternarize_checkpoint(checkpoint, DEFAULT, calibration, tmp_path / "w").close()
    monkeypatch.setattr("pt2gguf.convert.run.ternarize_layers", None)
    ternarize_checkpoint(checkpoint, DEFAULT, calibration, tmp_path / "w").close()


def test_other_settings_need_force(tmp_path: Path, calibration: Calibration) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    ternarize_checkpoint(checkpoint, DEFAULT, calibration, tmp_path / "w").close()
    other = replace(DEFAULT, damping=0.5)
    with pytest.raises(Pt2Error, match=rf"method.damping was {DEFAULT.damping} and is now 0.5"):
        ternarize_checkpoint(checkpoint, other, calibration, tmp_path / "w")
    work = ternarize_checkpoint(checkpoint, other, calibration, tmp_path / "w", force=True)
    assert work.settings.method["damping"] == 0.5
    work.close()


def test_one_conversion_at_a_time(tmp_path: Path, calibration: Calibration) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    with (
        ternarize_checkpoint(checkpoint, DEFAULT, calibration, tmp_path / "w"),
        pytest.raises(Pt2Error, match="is in use by another conversion"),
    ):
        ternarize_checkpoint(checkpoint, DEFAULT, calibration, tmp_path / "w")


def test_rows_that_are_no_multiple_of_128(tmp_path: Path, calibration: Calibration) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama", intermediate_size=192))
    reporter = SilentReporter()
    with ternarize_checkpoint(
        checkpoint, DEFAULT, calibration, tmp_path / "w", reporter=reporter
    ) as work:
        assert work.kept == {
            f"model.layers.{i}.mlp.down_proj.weight": "its row length 192 is not a multiple of 128"
            for i in range(2)
        }
        assert not any("down_proj" in name for name in list(work.layer_numbers()))
    assert reporter.notes[:1] == [
        "model.layers.*.mlp.down_proj.weight (2 of them) stays in a stock type: its row length 192 "
        "is not a multiple of 128"
    ]


def test_nothing_left(tmp_path: Path, calibration: Calibration) -> None:
    narrow = save_model(tmp_path / "m", "llama", hidden_size=96, intermediate_size=192, head_dim=24)
    with pytest.raises(
        Pt2Error, match=r"nothing in .* can be ternarized: .*row length 96 is not a multiple of 128"
    ):
        ternarize_checkpoint(Checkpoint(narrow), DEFAULT, calibration, tmp_path / "w")
    llama = Checkpoint(save_model(tmp_path / "m2", "llama"))
    with pytest.raises(Pt2Error, match=r"nothing in .*asked for; choose another model or ask for"):
        ternarize_checkpoint(
            llama, DEFAULT, calibration, tmp_path / "w", keep=lambda name: "asked for"
        )


def test_linear_layers_of_another_kind(tmp_path: Path, calibration: Calibration) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=1, n_head=4, n_positions=64)
    ).save_pretrained(tmp_path / "m")
    with pytest.raises(Pt2Error, match="it belongs to Conv1D, not to a linear layer"):
        ternarize_checkpoint(Checkpoint(tmp_path / "m"), DEFAULT, calibration, tmp_path / "w")


def test_kept_by_request(tmp_path: Path, calibration: Calibration) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    kept = "model.layers.1.self_attn.v_proj.weight"
    with ternarize_checkpoint(
        checkpoint,
        DEFAULT,
        calibration,
        tmp_path / "w",
        keep=lambda name: "asked for" if name == kept else None,
    ) as work:
        assert work.kept == {kept: "asked for"}
        assert kept not in list(work.layer_numbers())
        assert len(list(work.layer_numbers())) == 13


def _spoil(path: Path, name: str, value: float) -> Checkpoint:
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[:2] = value
    save_file(tensors, path / "model.safetensors")
    return Checkpoint(path)


def test_weights_that_are_not_finite(tmp_path: Path, calibration: Calibration) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoint = _spoil(save_model(tmp_path / "m", "llama"), name, float("nan"))
    with pytest.raises(Pt2Error, match=f"{name} .* holds 2 values that are NaN or infinite"):
        ternarize_checkpoint(checkpoint, DEFAULT, calibration, tmp_path / "w")
    assert not _files(tmp_path / "w")  # before any work is done


def test_activations_that_are_not_finite(tmp_path: Path, calibration: Calibration) -> None:
    path = save_model(tmp_path / "m", "llama")
    checkpoint = _spoil(path, "model.layers.1.input_layernorm.weight", 1e38)
    with pytest.raises(
        Pt2Error,
        match=r"^\d+ inputs of model.layers.1.self_attn.q_proj.weight are NaN, infinite or too l",
    ):
        ternarize_checkpoint(checkpoint, NO_OUTPUTS, calibration, tmp_path / "w")


def test_gradients_that_are_not_finite(tmp_path: Path, calibration: Calibration) -> None:
    """What the values' projection gives is tiny, and what the next one makes of it is not."""
    path = save_model(tmp_path / "m", "llama")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1e-30
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1e30
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(
        Pt2Error,
        match=r"^the gradients at the outputs of model.layers.1.self_attn\S+ .*"
        "NaN, infinite or too large",
    ):
        ternarize_checkpoint(Checkpoint(path), DEFAULT, calibration, tmp_path / "w")


def test_outputs_that_are_not_finite(tmp_path: Path, calibration: Calibration) -> None:
    """The residual and what attention adds to it overflow together; no input of a matrix does."""
    path = save_model(tmp_path / "m", "llama", attention_bias=True)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 3e38
    tensors["model.layers.0.self_attn.o_proj.bias"][0] = 3e38
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(
        Pt2Error,
        match=r"^\d+ outputs of the full-precision decoder layer 0 are NaN or infin",
    ):
        ternarize_checkpoint(
            Checkpoint(path),
            DEFAULT,
            calibration,
            tmp_path / "w",
            keep=lambda name: "asked for" if "mlp" in name else None,
        )


def test_rank_deficient_inputs_are_reported(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    reporter = SilentReporter()
    method = replace(DEFAULT, damping=1e-18)
    few = _calibration(tmp_path, 1, 20)
    ternarize_checkpoint(checkpoint, method, few, tmp_path / "w", reporter=reporter).close()
    assert any(
        note.startswith("model.layers.0.self_attn.q_proj.weight: damping raised from 1e-18 to")
        for note in reporter.notes
    )


def test_an_expert_that_no_token_chose(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "qwen3_moe", num_experts=16))
    reporter = SilentReporter()
    few = _calibration(tmp_path, 1, 3)
    with ternarize_checkpoint(checkpoint, DEFAULT, few, tmp_path / "w", reporter=reporter) as work:
        weights = _weights(work)
    assert sum("experts" in name for name in weights) == 2 * 16 * 3
    idle = [note for note in reporter.notes if "no calibration token reached it" in note]
    # 3 tokens choose at most 6 of the 16 experts, and each idle one has two inputs.
    assert len(idle) >= 2 * 10 * 2
    gate_and_up = next(note for note in idle if "gate_proj" in note)
    assert "up_proj" in gate_and_up, "grouped as the experts that did run"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, VOCABULARY]], f"calibration ids go from 0 to {VOCABULARY}, and .* has {VOCABULARY}:"),
        ([[-1, 0]], "calibration ids go from -1 to 0"),
        ([[0] * 65], "samples of 65 tokens are longer than the model's context of 64: choose"),
    ],
)
def test_ids_that_the_model_cannot_read(tmp_path: Path, ids: list, message: str) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    calibration = Calibration(torch.tensor(ids), {})
    with pytest.raises(Pt2Error, match=message):
        ternarize_checkpoint(checkpoint, DEFAULT, calibration, tmp_path / "w")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "'gpu' is not a device: choose cpu or cuda"),
        ("meta", "device meta is not supported"),
        ("cuda:99", "device cuda:99 is not there"),
    ],
)
def test_devices(tmp_path: Path, calibration: Calibration, device: str, message: str) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    with pytest.raises(Pt2Error, match=message):
        ternarize_checkpoint(checkpoint, DEFAULT, calibration, tmp_path / "w", device=device)


def test_two_layers_in_memory_at_most(tmp_path: Path, calibration: Calibration) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama", num_hidden_layers=6))
    layer_bytes = sum(
        stored.size for name, stored in checkpoint.tensors.items() if ".layers.3." in name
    )

    def resident() -> int:
        parameters = [o for o in gc.get_objects() if type(o) is nn.Parameter and not o.is_meta]
        return sum(p.nbytes for p in parameters)

    between: list[int] = []
    within: list[int] = []

    class Reporter(SilentReporter):
        def layer_started(self, index: int) -> None:
            between.append(resident())

        def weight_done(
            self, name: str, shape: tuple[int, ...], error: float, seconds: float
        ) -> None:
            within.append(resident())

    gc.collect()
    before = resident()
    ternarize_checkpoint(
        checkpoint, DEFAULT, calibration, tmp_path / "w", reporter=Reporter()
    ).close()
    assert between == [before] * 6, "nothing is left when the next layer is loaded"
    assert layer_bytes <= max(within) - before <= 2 * layer_bytes


def test_console_without_a_terminal(tmp_path: Path, calibration: Calibration) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    out = io.StringIO()
    reporter = ConsoleReporter(Console(file=out, width=40), CPU)
    ternarize_checkpoint(
        checkpoint, DEFAULT, calibration, tmp_path / "w", reporter=reporter
    ).close()
    lines = out.getvalue().splitlines()
    kinds = Counter("layer" if line.startswith("layer ") else line[:8] for line in lines)
    assert kinds == {"layer": 2, "  model.": 14, "note: th": 2}
    lines = lines[2:]  # after the notes about the gradients
    assert lines[0].startswith("  model.layers.0.self_attn.q_proj.weight  128x128  error 0.")
    assert lines[7].startswith("layer 1/2 done in ")
    assert lines[7].endswith(" left")
    assert "peak memory" in lines[15]
