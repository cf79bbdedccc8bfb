"""Bad input to `pt2gguf convert`: exit code 2, one sentence, no traceback, no half-written file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT, run_pt2gguf
from safetensors.torch import load_file, save_file
from small_models import save_model_with_tokenizer

SHORT = ["--calibration", EXAMPLE_TEXT, "--samples", 2, "--length", 64]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the example model to spoil."""
    return Path(shutil.copytree(EXAMPLE_MODEL, tmp_path / "model"))


def refusal(tmp_path: Path, model: object, *options: object) -> str:
    """The error of a conversion that must fail, and leave nothing under the final name."""
    output = tmp_path / "out.gguf"
    finished = run_pt2gguf("convert", model, output, *(options or SHORT), check=False)
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    assert not output.exists()
    errors = [line for line in finished.stderr.splitlines() if "pt2gguf: error: " in line]
    assert len(errors) == 1
    return errors[0]


def test_not_a_model_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path, tmp_path / "empty")
    assert "not a directory" in refusal(tmp_path, tmp_path / "nowhere")


def test_truncated_weights(tmp_path: Path, model: Path) -> None:
    weights = model / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size - 1000)
    error = refusal(tmp_path, model)
    assert "truncated" in error
    assert str(size) in error
    assert str(size - 1000) in error


def test_missing_shard(tmp_path: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert "model-00001-of-00001.safetensors is missing" in refusal(tmp_path, model)


def test_unknown_architecture(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "perceptron"}))
    assert "perceptron" in refusal(tmp_path, model)


def test_architecture_that_llama_cpp_does_not_know(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    error = refusal(tmp_path, model)
    assert "llama.cpp's converter does not know the architecture OddForCausalLM" in error
    assert "vocabulary" not in error


def test_config_that_llama_cpp_does_not_understand(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["Cohere2ForCausalLM"]  # would want parameters that are not there
    (model / "config.json").write_text(json.dumps(config))
    assert "config.json (KeyError: " in refusal(tmp_path, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, model: Path, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name].view(-1)[:3] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    error = refusal(tmp_path, model)
    assert name in error
    assert " 3 values" in error


def test_calibration_text(tmp_path: Path, model: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("")
    assert "too short" in refusal(tmp_path, model, "--calibration", text)
    text.write_text("A few words.")
    error = refusal(tmp_path, model, "--calibration", text, "--samples", 4, "--length", 100)
    assert "need 400" in error
    error = refusal(tmp_path, model, "--calibration", tmp_path / "nowhere.txt")
    assert "neither a file nor a data set" in error


def test_output(tmp_path: Path, model: Path) -> None:
    output = tmp_path / "there.gguf"
    output.write_bytes(b"precious")
    finished = run_pt2gguf("convert", model, output, *SHORT, check=False)
    assert finished.returncode == 2
    assert f"{output} exists: choose another name, or --force" in finished.stderr
    assert output.read_bytes() == b"precious"

    nowhere = tmp_path / "nowhere" / "out.gguf"
    finished = run_pt2gguf("convert", model, nowhere, *SHORT, check=False)
    assert finished.returncode == 2
    assert f"{nowhere.parent} is not a directory" in finished.stderr

    finished = run_pt2gguf("convert", model, tmp_path, *SHORT, check=False)
    assert finished.returncode == 2
    assert "is a directory" in finished.stderr


def test_options(tmp_path: Path, model: Path) -> None:
    assert "not REGEX=TYPE" in refusal(tmp_path, model, "--tensor-type", "attn")
    assert "'q9_9' is not a type" in refusal(tmp_path, model, "--tensor-type", "attn=q9_9")
    assert "not a regular expression" in refusal(tmp_path, model, "--tensor-type", "(=q8_0")
    assert "'iq2' is not a type" in refusal(tmp_path, model, "--output-type", "iq2")
    assert "'tpu' is not a device" in refusal(tmp_path, model, *SHORT, "--device", "tpu")


def test_nothing_left_to_ternarize(tmp_path: Path, model: Path) -> None:
    error = refusal(tmp_path, model, *SHORT, "--tensor-type", "layers=q8_0")
    assert "nothing in" in error
    assert "--tensor-type asks for q8_0" in error


def test_rows_that_are_not_a_multiple_of_128_stay_in_a_stock_type(tmp_path: Path) -> None:
    model = save_model_with_tokenizer(tmp_path / "odd", "llama", intermediate_size=160)
    finished = run_pt2gguf("convert", model, tmp_path / "odd.gguf", *SHORT[:-1], 48)
    assert "row length 160 is not a multiple of 128" in finished.stdout
    assert "down_proj" in finished.stdout


def test_settings_of_a_work_directory(tmp_path: Path, model: Path) -> None:
    work = tmp_path / "work"
    run_pt2gguf(*["convert", model, tmp_path / "first.gguf", *SHORT, "--work", work, "--keep-work"])
    error = refusal(tmp_path, model, *SHORT, "--work", work, "--no-aga")
    assert "method.aga was True and is now False" in error
    error = refusal(tmp_path, model, *SHORT, "--work", work, "--seed", 7)
    assert "calibration.seed was 0 and is now 7" in error


def test_traceback_only_when_asked_for(tmp_path: Path) -> None:
    finished = run_pt2gguf("convert", tmp_path, tmp_path / "out.gguf", *SHORT, "-v", check=False)
    assert "Traceback" in finished.stderr


def test_interpreter_without_llama_cpp(tmp_path: Path, monkeypatch, model: Path) -> None:
    from pt2gguf.errors import Pt2Error
    from pt2gguf.native import installation

    record = tmp_path / "native.json"
    monkeypatch.setattr(installation, "_RECORD", record)
    with pytest.raises(Pt2Error, match=r"not built for .*: run 'pt2gguf build'"):
        installation.find_installation()
    record.write_text('{"bin": "/x", "source": "/x", "version": "0.3.1"}')
    with pytest.raises(Pt2Error, match=r"is of llama-cpp-python 0\.3\.1, and this pt2gguf needs"):
        installation.find_installation()


def test_tokenizer_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    model = save_model_with_tokenizer(tmp_path / "moe", "qwen3_moe")
    error = refusal(tmp_path, model, *SHORT[:-1], 48)
    assert "cannot write the vocabulary" in error
    assert "BPE pre-tokenizer was not recognized" in error


def test_tensors_of_another_dtype(tmp_path: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert name in refusal(tmp_path, model)


def test_numbers_out_of_range(tmp_path: Path, model: Path) -> None:
    for option, value in (("--seed", -1), ("--seed", 2**32), ("--length", 0), ("--threads", -1)):
        finished = run_pt2gguf("convert", model, tmp_path / "o.gguf", option, value, check=False)
        assert finished.returncode == 2
        assert f"argument {option}" in finished.stderr


def test_a_work_directory_loses_only_what_a_conversion_made(tmp_path: Path, model: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "precious.txt").write_text("mine")
    run_pt2gguf("convert", model, tmp_path / "out.gguf", *SHORT, "--work", work)
    assert [file.name for file in work.iterdir()] == ["precious.txt"]


def test_experts_of_one_projection_stay_together(tmp_path: Path, monkeypatch, capsys) -> None:
    """A file has one tensor for all experts: one asked for in a stock type takes the rest along."""
    from pt2gguf.cli import main
    from pt2gguf.export.llama_cpp import import_llama_cpp
    from pt2gguf.native.installation import find_installation

    llama_cpp = import_llama_cpp(find_installation())
    monkeypatch.setattr(llama_cpp.conversion.TextModel, "get_vocab_base_pre", lambda *_: "qwen2")
    model = save_model_with_tokenizer(tmp_path / "moe", "qwen3_moe")
    for rule in (r"experts\.\d+\.up_proj=q8_0", "ffn_up_exps=q8_0"):
        output = tmp_path / f"{len(rule)}.gguf"
        arguments = ["convert", model, output, *SHORT[:-1], 48, "--tensor-type", rule]
        assert main(list(map(str, arguments))) == 0
        assert "joins it with what stays as it is" in capsys.readouterr().out
        types = {t.name: t for t in llama_cpp.gguf.GGUFReader(output).tensors}
        assert types["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q8_0"
        for name, tensor in types.items():
            if "_exps" in name and tensor.tensor_type.name != "Q8_0":
                assert tensor.tensor_type.name == "F16"
                assert np.isfinite(tensor.data.astype(np.float32)).all()
        assert types["blk.0.attn_q.weight"].tensor_type.name == "TQ2_1"
