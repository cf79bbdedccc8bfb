"""`pt2gguf plot` as users run it, on the example model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT, run_pt2gguf
from safetensors.torch import load_file, save_file
from small_models import save_model
from test_picture import decode_png

from pt2gguf.blocks import BLOCK_TYPES
from pt2gguf.cli import main
from pt2gguf.commands.plot import MOST_MATRICES, matching_matrices
from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.errors import Pt2Error
from pt2gguf.export.llama_cpp import import_llama_cpp
from pt2gguf.model import Checkpoint
from pt2gguf.native.installation import find_installation
from pt2gguf.plotting.stored import GgufWeights, WorkWeights

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.3.mlp.down_proj.weight"


@dataclass(frozen=True)
class Converted:
    file: Path
    work: Path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    directory = tmp_path_factory.mktemp("converted")
    made = Converted(directory / "out.gguf", directory / "work")
    options = ["--calibration", EXAMPLE_TEXT, "--samples", 2, "--length", 64, "--gptaq", 0]
    run_pt2gguf("convert", EXAMPLE_MODEL, made.file, *options, "--work", made.work, "--keep-work")
    return made


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The sentence that `pt2gguf plot MODEL ARGUMENTS` ends with; no picture is left behind."""

    def run(*arguments: object, model: Path = EXAMPLE_MODEL) -> str:
        output = tmp_path / "picture.png"
        assert main(["plot", str(model), "-o", str(output), *map(str, arguments)]) == 2
        assert not output.exists()
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("pt2gguf: error: ")
        return error

    return run


def test_three_ways(tmp_path: Path, converted: Converted) -> None:
    pictures = []
    for number, source in enumerate(([], ["--file", converted.file], ["--work", converted.work])):
        output = tmp_path / f"{number}.png"
        arguments = ["plot", EXAMPLE_MODEL, "--tensor", r"layers\.0\.self_attn", *source]
        assert main([*map(str, arguments), "-o", str(output)]) == 0
        pictures.append(decode_png(output))
    plain, from_file, from_work = pictures
    assert plain.shape == from_file.shape
    assert not np.array_equal(plain, from_file)  # the ternary values are in it
    # The attention's columns keep their order, and its rows' order does not matter here.
    assert np.array_equal(from_file, from_work)


def test_work_directory_and_file_hold_the_same(converted: Converted) -> None:
    llama_cpp = import_llama_cpp(find_installation())
    names = {
        Q_PROJ: "blk.0.attn_q.weight",
        DOWN_PROJ: "blk.3.ffn_down.weight",
        "model.layers.3.mlp.up_proj.weight": "blk.3.ffn_up.weight",
    }
    in_file = GgufWeights(converted.file, llama_cpp.gguf, names.get)
    with WorkDirectory.open_existing(converted.work) as work:
        in_work = WorkWeights(work)
        for name in names:
            stored, original = in_file.weight(name), in_work.weight(name)
            for a, b in ((stored.alpha, original.alpha), (stored.mu, original.mu)):
                assert torch.equal(a.sort(dim=0).values, b.sort(dim=0).values)
            assert torch.equal(stored.digits.sum(0), original.digits.sum(0))
            if name == DOWN_PROJ:
                assert original.perm is not None
                assert stored.perm is None  # folded into the rows of gate and up
            elif original.perm is None:
                assert stored.perm is None
            else:
                assert stored.perm is not None
                assert torch.equal(stored.perm, original.perm)


def test_stacked_experts(tmp_path: Path) -> None:
    gguf = import_llama_cpp(find_installation()).gguf
    generator = np.random.default_rng(0)
    alpha = generator.random((3, 5, 2)).astype(np.float16)
    mu = generator.random((3, 5, 2)).astype(np.float16)
    digits = generator.integers(-1, 2, (3, 5, 256)).astype(np.int8)
    perm = generator.permutation(256).astype(np.int32)
    for block_type in BLOCK_TYPES.values():
        file = tmp_path / f"{block_type.name}.gguf"
        packed = np.stack([block_type.pack(alpha[e], mu[e], digits[e]) for e in range(3)])
        writer = gguf.GGUFWriter(file, "llama")
        qtype = gguf.GGMLQuantizationType[block_type.name.upper()]
        writer.add_tensor("blk.0.ffn_up_exps.weight", packed, raw_dtype=qtype)
        writer.add_tensor("blk.0.ffn_up_exps.perm", perm)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        weights = GgufWeights(file, gguf, lambda name: "blk.0.ffn_up_exps.weight")
        for expert in range(3):
            weight = weights.weight(f"model.layers.0.mlp.experts.{expert}.up_proj.weight")
            assert np.array_equal(weight.alpha.numpy(), alpha[expert])
            assert np.array_equal(weight.mu.numpy(), mu[expert])
            assert np.array_equal(weight.digits.numpy(), digits[expert])
            assert weight.perm is not None
            assert np.array_equal(weight.perm.numpy(), perm)


def test_which_matrices(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama", num_hidden_layers=11)
    checkpoint = Checkpoint(path)
    assert matching_matrices(checkpoint, r"\.o_proj") == [
        f"model.layers.{index}.self_attn.o_proj.weight" for index in range(11)
    ]
    assert matching_matrices(checkpoint, "embed|lm_head") == [
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]
    with pytest.raises(Pt2Error, match=f"matches 79 matrices, .* holds {MOST_MATRICES}"):
        matching_matrices(checkpoint, "")
    with pytest.raises(Pt2Error, match="'norm' matches none of the 79 matrices"):
        matching_matrices(checkpoint, "norm")


def test_rows_of_another_length(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama", hidden_size=64, intermediate_size=96, head_dim=16)
    with pytest.raises(Pt2Error, match="none of the 0 matrices"):
        matching_matrices(Checkpoint(path), "q_proj")


def test_bad_arguments(tmp_path: Path, refusal: Callable[..., str], converted: Converted) -> None:
    assert "'(' is not a regular expression" in refusal("--tensor", "(")
    assert "such as lm_head" in refusal("--tensor", "x", model=save_model(tmp_path / "m", "llama"))
    assert "not a directory" in refusal("--tensor", "x", model=tmp_path / "nowhere")
    assert "is not a readable GGUF file" in refusal("--tensor", Q_PROJ, "--file", EXAMPLE_TEXT)
    assert "is not a work directory" in refusal("--tensor", Q_PROJ, "--work", tmp_path)
    for option, where in (("--file", converted.file), ("--work", converted.work)):
        error = refusal("--tensor", "embed_tokens", option, where)
        assert f"embed_tokens.weight is not a ternary weight of {where}" in error


def test_another_model(tmp_path: Path, refusal: Callable[..., str], converted: Converted) -> None:
    other = Path(shutil.copytree(EXAMPLE_MODEL, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors[Q_PROJ] = tensors[Q_PROJ][:128].contiguous()
    save_file(tensors, other / "model.safetensors")
    error = refusal("--tensor", Q_PROJ, "--work", converted.work, model=other)
    assert "was made of another checkpoint" in error
    error = refusal("--tensor", Q_PROJ, "--file", converted.file, model=other)
    assert f"{Q_PROJ} is (128, 256)" in error
    assert "(256, 256)" in error


def test_existing_picture(tmp_path: Path) -> None:
    output = tmp_path / "picture.svg"
    output.write_text("precious")
    arguments = ["plot", str(EXAMPLE_MODEL), "--tensor", Q_PROJ, "-o", str(output)]
    assert main(arguments) == 2
    assert output.read_text() == "precious"
    assert main([*arguments, "--force"]) == 0
    assert "svg" in output.read_text()[:200]
