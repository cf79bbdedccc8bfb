from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import save_model

from pt2gguf.errors import Pt2Error
from pt2gguf.model import Checkpoint


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = save_model(tmp_path / "sharded", "llama")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in (1, 2, 3):
        shard = f"model-{number:05d}-of-00003.safetensors"
        part = names[number - 1 :: 3]
        save_file({name: tensors[name] for name in part}, path / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reads_every_tensor_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save_model(tmp_path / "m", "llama", dtype=dtype)
    expected = load_file(path / "model.safetensors")
    checkpoint = Checkpoint(path)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in checkpoint.read_all(expected):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].float())


def test_shards_give_what_one_file_gives(tmp_path: Path, sharded: Path) -> None:
    whole = Checkpoint(save_model(tmp_path / "whole", "llama"))
    split = Checkpoint(sharded)
    for name in whole.tensors:
        assert torch.equal(whole.read(name), split.read(name))


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    path = save_model(tmp_path / "a", "llama")
    before = Checkpoint(path).fingerprint()
    shutil.copytree(path, tmp_path / "b")
    assert Checkpoint(tmp_path / "b").fingerprint() == before

    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, path / "model.safetensors")
    assert Checkpoint(path).fingerprint() != before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: shutil.rmtree(p), "is not a directory: give the directory"),
        (lambda p: (p / "config.json").unlink(), "is not a model directory: it has no config.json"),
        (lambda p: (p / "config.json").write_text("{"), r"config.json is not JSON"),
        (lambda p: (p / "config.json").write_text("{}"), "names no model_type"),
        (lambda p: (p / "model.safetensors").unlink(), "holds no weights: it has neither"),
        (
            lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
            "pytorch_model.bin, which is not read because unpickling can run code",
        ),
        (
            lambda p: (p / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0[]"),
            "is not a safetensors file",
        ),
        (
            lambda p: (p / "model.safetensors").write_bytes(b"\1\2\3"),
            r"is truncated: its header alone needs 8 bytes and the file has 3",
        ),
    ],
)
def test_bad_directories(tmp_path: Path, spoil, message: str) -> None:
    path = save_model(tmp_path / "m", "llama")
    spoil(path)
    with pytest.raises(Pt2Error, match=message):
        Checkpoint(path)


def _edit_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def test_unknown_architecture(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    _edit_config(path, model_type="frobnicator")
    with pytest.raises(
        Pt2Error, match=r"architecture 'frobnicator' .* is not one that transformer"
    ):
        Checkpoint(path)


def test_quantized_checkpoint(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    _edit_config(path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(
        Pt2Error, match=r"is already quantized \(quantization_config says gptq\): conv"
    ):
        Checkpoint(path)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        Pt2Error, match=r"model-00002-of-00003.safetensors is missing: .* holds 7 tensors; download"
    ):
        Checkpoint(sharded)


@pytest.mark.parametrize("lost", [1, 4096, 100_000])
def test_truncated_shard_names_file_and_figures(sharded: Path, lost: int) -> None:
    shard = sharded / "model-00003-of-00003.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-lost])
    with pytest.raises(
        Pt2Error,
        match=f"00003-of-00003.safetensors is truncated: .* {size} bytes and .* has {size - lost};",
    ):
        Checkpoint(sharded)


def test_index_and_shard_of_different_models(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.9.extra"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(Pt2Error, match=r"lacks tensor model.layers.9.extra"):
        Checkpoint(sharded)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    path = save_model(tmp_path / "m", "llama", dtype=torch.bfloat16)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = load_file(path / "model.safetensors")
    tensors[name][5, 7:10] = value
    save_file(tensors, path / "model.safetensors")
    checkpoint = Checkpoint(path)
    with pytest.raises(Pt2Error, match=f"tensor {name} .* holds 3 values that are NaN or infinite"):
        checkpoint.read(name)


def test_integer_weights(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(Pt2Error, match=r"tensor model.norm.weight .* is stored as I8: only F16"):
        Checkpoint(path).read("model.norm.weight")


def test_absent_tensor(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    with pytest.raises(Pt2Error, match=r"has no tensor model.nothing, which its architecture"):
        Checkpoint(path).read("model.nothing")


def test_rope_of_a_config_from_transformers_5(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    config = json.loads((path / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    scaling = {"rope_type": "linear", "factor": 4.0}
    config["rope_parameters"] = {"rope_theta": 5e5, **scaling}
    (path / "config.json").write_text(json.dumps(config))
    read = Checkpoint(path).config
    assert read.rope_theta == 5e5
    assert {key: read.rope_scaling[key] for key in scaling} == scaling

    whole = {"model_type": "llava", "text_config": config, "vision_config": {}}
    (path / "config.json").write_text(json.dumps(whole))
    assert Checkpoint(path).config.rope_theta == 5e5

    config["rope_parameters"] = {"full_attention": {"rope_theta": 5e5}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Pt2Error, match="rope_parameters for each kind of layer"):
        Checkpoint(path)
