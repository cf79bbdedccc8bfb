from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import save_model, save_shape
from transformers import LlamaConfig

from pt2gguf.convert import resources, tuning, writing
from pt2gguf.convert.calibration import Calibration
from pt2gguf.convert.pipeline import Windows, _Room
from pt2gguf.convert.progress import SilentReporter
from pt2gguf.convert.resources import (
    CUDA_LIBRARIES,
    LayerSize,
    Needs,
    available_memory,
    estimate,
    fits_easily,
    require_disk,
    room_for_hidden_states,
)
from pt2gguf.convert.run import (
    conversion_needs,
    make_plan,
    ternarize_checkpoint,
    tuning_needs,
)
from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.convert.writing import write_text
from pt2gguf.errors import Pt2Error
from pt2gguf.model import Checkpoint, Skeleton
from pt2gguf.ternary import METHODS

CPU = torch.device("cpu")
IDS = Calibration(torch.zeros(4, 16, dtype=torch.int64), {})
LAYERS_ALONE = replace(METHODS["default"], output_tokens=0, tuning_epochs=0, written_windows=0)
TUNED = replace(METHODS["default"], written_windows=3)
Usage = namedtuple("Usage", "free")
Memory = namedtuple("Memory", "available")


def _no_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resources, "CGROUP", tmp_path / "none")


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    _no_container(monkeypatch, tmp_path)
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: Memory(10_000))
    with pytest.raises(
        Pt2Error,
        match=r"^about 0\.\d\d GB of memory are needed and 0\.00 GB are available to convert",
    ):
        ternarize_checkpoint(checkpoint, LAYERS_ALONE, IDS, tmp_path / "w")
    # Refused before any work, and the directory is free for the next attempt.
    monkeypatch.undo()
    ternarize_checkpoint(checkpoint, LAYERS_ALONE, IDS, tmp_path / "w").close()


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Usage(1000))
    with pytest.raises(
        Pt2Error, match=r"of disk are needed for the work directory and 0\.00 GB are free at /"
    ):
        ternarize_checkpoint(checkpoint, LAYERS_ALONE, IDS, tmp_path / "w")


def test_disk_of_a_place_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(
        resources.shutil, "disk_usage", lambda path: asked.append(path) or Usage(100)
    )
    require_disk(tmp_path / "a" / "b.gguf", 100, "for the output")
    assert asked == [tmp_path]
    with pytest.raises(Pt2Error, match="are needed for the output and"):
        require_disk(tmp_path / "a" / "b.gguf", 101, "for the output")


def test_work_directory_is_no_larger_than_estimated(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m", "llama"))
    skeleton = Skeleton(checkpoint)
    plan = make_plan(skeleton, lambda name: None)
    needs = conversion_needs(skeleton, plan, LAYERS_ALONE, IDS, CPU)
    with ternarize_checkpoint(checkpoint, LAYERS_ALONE, IDS, tmp_path / "w") as work:
        size = sum(file.stat().st_size for file in work.path.glob("layer-*.safetensors"))
        weights = len(list(work.layer_numbers()))
    assert size <= needs.disk
    assert needs.disk <= size + weights * resources.DESCRIPTION


def test_output_statistics_are_no_larger_than_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = Skeleton(Checkpoint(save_model(tmp_path / "m", "llama")))
    plan = make_plan(skeleton, lambda name: None)
    method = replace(LAYERS_ALONE, output_tokens=32)
    without, needs = (conversion_needs(skeleton, plan, m, IDS, CPU) for m in (LAYERS_ALONE, method))
    monkeypatch.setattr(WorkDirectory, "drop_outputs", lambda self, index: None)
    with ternarize_checkpoint(skeleton.checkpoint, method, IDS, tmp_path / "w") as work:
        size = sum(file.stat().st_size for file in work.path.glob("outputs-*.safetensors"))
    inputs = 2 * 32 * skeleton.config.hidden_size * 2
    # From above, but by less than twice: q, k and v count as if their inputs were o's too.
    assert size + inputs <= needs.disk - without.disk < 2 * (size + inputs)
    assert needs.host >= without.host


def test_work_directory_with_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SAVE_SECONDS", 0.0)
    skeleton = Skeleton(Checkpoint(save_model(tmp_path / "m", "llama")))
    plan = make_plan(skeleton, lambda name: None)
    layers = conversion_needs(skeleton, plan, LAYERS_ALONE, IDS, CPU)
    both = conversion_needs(skeleton, plan, TUNED, IDS, CPU)
    assert both.host > layers.host
    with ternarize_checkpoint(skeleton.checkpoint, TUNED, IDS, tmp_path / "w") as work:
        size = sum(file.stat().st_size for file in work.path.glob("*.safetensors"))
    assert size <= both.disk


def test_tuning_needs_more_where_layers_are_kept(tmp_path: Path) -> None:
    skeleton = Skeleton(Checkpoint(save_model(tmp_path / "m", "llama")))
    plan = make_plan(skeleton, lambda name: None)
    needs = {
        recompute: tuning_needs(skeleton, plan, TUNED, IDS, CPU, recompute=recompute)
        for recompute in (True, False)
    }
    # At the least the weights in bfloat16 and every weight matrix's inputs.
    weights = 2 * sum(n * m for n, m in plan.ternary.values())
    inputs = 2 * 64 * sum(m for _, m in plan.ternary.values())
    assert needs[False].host - needs[True].host > weights + inputs
    assert needs[False].disk == needs[True].disk


@pytest.mark.parametrize(("available", "easily"), [(1999, False), (2000, True)])
def test_half_of_the_memory_is_left_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int, easily: bool
) -> None:
    _no_container(monkeypatch, tmp_path)
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: Memory(available))
    assert fits_easily(Needs(host=1000, gpu=0, disk=0), CPU) is easily


def test_estimate_follows_its_parts() -> None:
    base = {
        "layer": LayerSize(10**6, [(2048, 1024)], 16 * 1024**2, 16 * 1024**2),
        "body_parameters": 10**6,
        "ternary": [(2048, 1024)],
        "stock_bytes": 0,
        "tokens": 128 * 512,
        "further_tokens": 0,
        "batch_tokens": 8 * 512,
        "hidden_size": 1024,
        "full_precision": True,
        "on_gpu": False,
    }
    needs = estimate(**base)
    hidden = 2 * 128 * 512 * 1024 * 4
    assert needs.gpu == 0
    assert needs.host > hidden + 2 * 4 * 10**6 + 16 * 1024**2
    assert estimate(**{**base, "tokens": 256 * 512}).host - needs.host >= hidden
    assert estimate(**{**base, "full_precision": False}).host < needs.host - hidden // 2
    assert estimate(**{**base, "further_tokens": 64 * 512}).host - needs.host >= hidden // 4
    assert estimate(**{**base, "stock_bytes": 12345}).disk == needs.disk + 12345
    on_gpu = estimate(**{**base, "on_gpu": True})
    assert on_gpu.gpu >= 2 * 4 * 10**6 + 16 * 1024**2
    assert on_gpu.disk == needs.disk
    # The layer and its copy are on the GPU, and the hidden states may have to stay on the host.
    assert hidden < on_gpu.host - CUDA_LIBRARIES < needs.host
    one = estimate(**{**base, "on_gpu": True, "full_precision": False})
    assert one.host == on_gpu.host - hidden // 2


LLAMA_65B = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=22016,
    num_hidden_layers=80,
    num_attention_heads=64,
    max_position_embeddings=2048,
)


def test_host_memory_for_65b_on_a_gpu(tmp_path: Path) -> None:
    skeleton = Skeleton(Checkpoint(save_shape(tmp_path, LLAMA_65B)))
    plan = make_plan(skeleton, lambda name: None)
    method = replace(METHODS["default"], written_windows=64)
    calibration = Calibration(torch.zeros(128, 2048, dtype=torch.int64), {})
    needs = conversion_needs(skeleton, plan, method, calibration, torch.device("cuda"))
    # While the grids are tuned: hidden states before and after the layers, and what is saved of
    # the changes of alpha and mu and of Adam's moments.
    hidden = 2 * 128 * 2048 * 8192 * 4
    saved = 3 * 2 * sum(n * m for n, m in plan.ternary.values()) // 128 * 4
    assert hidden + saved <= needs.host < 40e9
    # The largest layer, twice, and its statistics have to find room.
    assert needs.gpu > 2 * plan.layer.parameters * 4 + plan.layer.statistics


def test_host_memory_of_writing_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model goes to the GPU; through the host goes one tensor at a time."""
    checkpoint = Checkpoint(save_shape(tmp_path, LLAMA_65B))

    class AskedFor(Exception):  # noqa: N818
        pass

    def stop(needs: Needs, device: torch.device, purpose: str) -> None:
        raise AskedFor(needs)

    monkeypatch.setattr(writing, "require_memory", stop)
    monkeypatch.setattr(writing, "computes_bfloat16", lambda device: True)
    found = {}
    for device in ("cuda", "cpu"):
        with pytest.raises(AskedFor) as asked:
            write_text(checkpoint, 64, IDS, torch.device(device), SilentReporter())
        found[device] = asked.value.args[0]
    weights = 2 * sum(tensor.elements for tensor in checkpoint.tensors.values())
    assert 32000 * 8192 * 6 < found["cuda"].host - CUDA_LIBRARIES < 4e9
    assert found["cuda"].gpu > weights
    assert found["cpu"].host > weights
    assert found["cpu"].gpu == 0


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 5000), ("9000", 5000), ("2000", 2000 - 900 + 300)]
)
def test_memory_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 600\nfile 300\n")
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: Memory(5000))
    assert available_memory() == expected


@pytest.mark.parametrize(("room", "moved"), [(0, 0), (511, 0), (512, 1), (1536, 3), (2000, 3)])
def test_hidden_states_take_the_room_there_is(room: int, moved: int) -> None:
    """Of four texts with 4 x 8 x 4 float32 each."""
    texts = [Windows(torch.zeros(4, 8, 4), {}, 1) for _ in range(4)]
    placed = _Room(torch.device("meta"), room)
    found = [windows for half in (texts[:2], texts[2:]) for windows in placed.take(half)]
    assert [windows.hidden.is_meta for windows in found] == [i < moved for i in range(4)]


def test_room_is_what_the_layers_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_gpu_memory", lambda device: 1000)
    needs = Needs(host=0, gpu=700, disk=0)
    assert room_for_hidden_states(needs, torch.device("cuda")) == 300
    assert room_for_hidden_states(needs, CPU) == 0
