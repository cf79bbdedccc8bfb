"""The same conversion on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT
from torch import Tensor

from pt2gguf.convert.calibration import load_calibration
from pt2gguf.convert.run import ternarize_checkpoint
from pt2gguf.convert.workdir import Layer
from pt2gguf.export.llama_cpp import import_llama_cpp
from pt2gguf.export.stock_grids import GgmlGrid
from pt2gguf.kernels import kernels_work
from pt2gguf.model import Checkpoint
from pt2gguf.native.installation import find_installation
from pt2gguf.replay import Replayed
from pt2gguf.ternary import METHODS, InputStatistics, OutputStatistics, round_to_stock
from pt2gguf.ternary.rounding import (
    _round_columns,
    descend_digits,
    digits_with_feedback,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# At this length, gradients of attention are sums over several blocks of keys.
WINDOWS = {"samples": 8, "length": 512}


def ternarized(work_directory: Path, device: str) -> tuple[list[Layer], list[bytes]]:
    """The layers, and the bytes of their files."""
    checkpoint = Checkpoint(EXAMPLE_MODEL)
    text = [str(EXAMPLE_TEXT)]
    calibration = load_calibration(text, EXAMPLE_MODEL, **WINDOWS, seed=0)
    with ternarize_checkpoint(
        checkpoint, METHODS["default"], calibration, work_directory, device=device
    ) as work:
        layers = [work.load_layer(index) for index in range(work.settings.layers)]
    files = sorted(work_directory.glob("layer-*.safetensors"))
    return layers, [file.read_bytes() for file in files]


def test_the_gpu_gives_what_the_cpu_gives(tmp_path: Path) -> None:
    on_cpu, _ = ternarized(tmp_path / "cpu", "cpu")
    on_gpu, _ = ternarized(tmp_path / "gpu", "cuda")
    for cpu_layer, gpu_layer in zip(on_cpu, on_gpu, strict=True):
        for name, report in cpu_layer.reports.items():
            # Sums in another order tip single choices of SSR, after which digits are not
            # comparable; the errors are (the largest difference seen is 8%).
            error = gpu_layer.reports[name]["relative_error"]
            assert error == pytest.approx(report["relative_error"], rel=0.2)


def test_one_kernel_rounds_as_many_do() -> None:
    assert kernels_work()
    from pt2gguf.kernels.rounding import round_columns

    generator = torch.Generator("cuda").manual_seed(1)
    for columns, rows in ((1, 1), (5, 3), (128, 2049), (128, 16)):
        targets, before = 1.5 * torch.randn(
            2, columns, rows, dtype=torch.float64, device="cuda", generator=generator
        )
        effects = torch.randn(columns, columns, device="cuda", generator=generator).double() / 8
        targets[0, 0] = 0.5
        for start in (None, before.round()):
            found = round_columns(targets.clone(), start, effects)
            on_cpu = (None if start is None else start.cpu(), effects.cpu())
            assert torch.equal(found.cpu(), _round_columns(targets.cpu(), *on_cpu))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu(tmp_path: Path) -> None:
    assert ternarized(tmp_path / "0", "cuda")[1] == ternarized(tmp_path / "1", "cuda:1")[1]


def test_replayed_rounding_is_the_same_rounding() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def rounded(W: Tensor, alpha: Tensor, mu: Tensor, L: Tensor, M: Tensor) -> tuple[Tensor, ...]:
        T = digits_with_feedback(W, alpha, mu, L)
        return T, descend_digits(W, alpha, mu, T, M)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device="cuda", generator=generator)

    replayed = Replayed(rounded)
    for rows in (5, 300, 5, 5, 300):  # the first call of a shape captures, the others replay
        W, alpha, mu = random(rows, 128), random(rows).abs(), random(rows)
        alpha[0] = 0
        M = random(128, 200) @ random(200, 128)
        M = M @ M.T
        L = torch.linalg.cholesky(torch.linalg.inv(M))
        for found, expected in zip(
            replayed(W, alpha, mu, L, M), rounded(W, alpha, mu, L, M), strict=True
        ):
            assert torch.equal(found, expected)


def test_tuning_on_the_gpu_is_reproducible(tmp_path: Path) -> None:
    for name in ("first", "second"):
        ternarized(tmp_path / name, "cuda")
    for file in sorted((tmp_path / "first").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


def test_gpu_results_are_reproducible_and_resumable(tmp_path: Path) -> None:
    _, first = ternarized(tmp_path / "first", "cuda")
    _, second = ternarized(tmp_path / "second", "cuda")
    assert first == second
    (tmp_path / "first" / "layer-0002.safetensors").unlink()
    _, resumed = ternarized(tmp_path / "first", "cuda")
    assert resumed == first


def test_stock_types_on_the_gpu() -> None:
    llama_cpp = import_llama_cpp(find_installation())
    grid = GgmlGrid("q3_k", llama_cpp.gguf, llama_cpp.ggml)
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(100, 512, generator=generator)
    x, x_full = torch.randn(2, 2048, 512, generator=generator)
    g = torch.randn(400, 100, generator=generator)
    found = []
    for device in ("cpu", "cuda", "cuda"):
        inputs = InputStatistics(512, device, with_full_precision=True)
        inputs.add(x.to(device), (x + 0.1 * x_full).to(device))
        outputs = OutputStatistics.empty(100, device)
        outputs.add(g.to(device))
        found.append(round_to_stock(W.to(device), inputs, METHODS["default"], outputs, grid))
    (_, on_cpu), (first, on_gpu), (second, _) = found
    assert torch.equal(first.packed, second.packed)
    # Sums in another order tip single digits, and with them what later ones make up for.
    assert on_gpu.relative_error == pytest.approx(on_cpu.relative_error, rel=0.02)
