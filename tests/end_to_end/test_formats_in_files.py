"""What is in a converted file, byte by byte: nothing here asks the exporter what it did."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT, VOCABULARY, run_pt2gguf
from safetensors.torch import load_file
from small_models import save_model_with_tokenizer

from pt2gguf import __version__
from pt2gguf.blocks import BLOCK_SIZE, BLOCK_TYPES, BlockType
from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.export.llama_cpp import import_llama_cpp
from pt2gguf.native.installation import find_installation
from pt2gguf.ternary import TernaryWeight

TYPES = pytest.mark.parametrize("type_name", ["tq2_1", "tq1_1"])
NUMBERS = {"tq1_1": 0x50543201, "tq2_1": 0x50543202}
"""As published: no file can be read if one of them changes."""

COMMON = ["--calibration", EXAMPLE_TEXT, "--samples", 16, "--length", 128]
"""The calibration of the fixture `converted`."""

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
CONFIG = json.loads((EXAMPLE_MODEL / "config.json").read_text())


# a reader of our own ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """As it stands in the file: shape with the row length first, offset into the data."""

    shape: tuple[int, ...]
    number: int
    offset: int


def read_raw(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The key-values and tensor infos of a GGUF file, version 3."""
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        version, tensors, pairs = _unpack(file, "IQQ")
        assert version == 3
        values = {}
        for _ in range(pairs):
            key = _read_string(file)
            values[key] = _read_value(file, *_unpack(file, "I"))
        infos = {}
        for _ in range(tensors):
            name = _read_string(file)
            (dimensions,) = _unpack(file, "I")
            shape = _unpack(file, f"{dimensions}Q")
            infos[name] = TensorInfo(shape, *_unpack(file, "IQ"))
    return values, infos


NUMBER_LAYOUTS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
"""Kinds of values in GGUF; the others are numbers."""


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _read_string(file: BinaryIO) -> str:
    return file.read(*_unpack(file, "Q")).decode()


def _read_value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _read_string(file)
    if kind == ARRAY:
        element, count = _unpack(file, "IQ")
        return [_read_value(file, element) for _ in range(count)]
    return _unpack(file, NUMBER_LAYOUTS[kind])[0]


# what should be in the file -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf():
    return import_llama_cpp(find_installation()).gguf


def tensors_of(path: Path, gguf) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def stock_weights(tensor: Any, gguf) -> np.ndarray:
    """The values of a tensor that is not ternary, (n, m) float32."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
        tensor.shape[::-1].tolist()
    )


@pytest.fixture(scope="module")
def work(converted) -> dict[str, TernaryWeight]:
    """All weights of the work directory by checkpoint name."""
    weights: dict[str, TernaryWeight] = {}
    with WorkDirectory.open_existing(converted.work) as work:
        for index in range(CONFIG["num_hidden_layers"]):
            weights |= work.final_weights(index)
    return weights


def rotary_order(heads: int, rows: int) -> list[int]:
    """The rows of q and k in llama.cpp: within a head, halves are interleaved."""
    half = rows // heads // 2
    return [
        head * 2 * half + side * half + i
        for head in range(heads)
        for i in range(half)
        for side in range(2)
    ]


def expected_rows(layer: int, part: str, work: dict[str, TernaryWeight]) -> list[int]:
    """Row i of the file's tensor is row [i] of the work directory's weight."""
    rows = len(work[f"model.layers.{layer}.{part}.weight"].digits)
    if part == "self_attn.q_proj":
        return rotary_order(CONFIG["num_attention_heads"], rows)
    if part == "self_attn.k_proj":
        return rotary_order(CONFIG["num_key_value_heads"], rows)
    if part in ("mlp.gate_proj", "mlp.up_proj"):
        # Their outputs come in the order in which down's columns are stored.
        return work[f"model.layers.{layer}.mlp.down_proj.weight"].perm.tolist()
    return list(range(rows))


def layers_and_parts() -> list[tuple[int, str]]:
    return [(layer, part) for layer in range(CONFIG["num_hidden_layers"]) for part in PARTS]


# tests --------------------------------------------------------------------------------------------


@TYPES
def test_type_numbers_and_offsets(converted, type_name) -> None:
    path = getattr(converted, type_name)
    values, infos = read_raw(path)
    names = [f"blk.{layer}.{PARTS[part]}.weight" for layer, part in layers_and_parts()]
    assert {name for name, info in infos.items() if info.number >= 43} == set(names)
    for name in names:
        assert infos[name].number == NUMBERS[type_name]
    assert values["general.file_type"] == NUMBERS[type_name]
    # Tensors follow each other; each has the bytes of its blocks, filled up to the alignment.
    alignment = values.get("general.alignment", 32)
    by_offset = sorted(infos.values(), key=lambda info: info.offset)
    for info, following in itertools.pairwise(by_offset):
        if info.number == NUMBERS[type_name]:
            bytes_ = int(np.prod(info.shape)) // 128 * {"tq1_1": 30, "tq2_1": 36}[type_name]
            assert following.offset - info.offset == -(-bytes_ // alignment) * alignment


@TYPES
def test_metadata(converted, type_name) -> None:
    values, _ = read_raw(getattr(converted, type_name))
    assert values["pt2.version"] == 1
    assert values["pt2.block_size"] == BLOCK_SIZE == 128
    assert values["pt2.tool_version"] == __version__
    assert values["pt2.method"] == "default"
    assert {"itf", "aga", "ssr", "gptq", "gptaq", "tuning_epochs", "written_windows"} <= json.loads(
        values["pt2.method.switches"]
    ).keys()
    calibration = {k.removeprefix("pt2.calibration."): v for k, v in values.items()}
    assert calibration["sources"] == EXAMPLE_TEXT.name
    assert (calibration["samples"], calibration["length"], calibration["seed"]) == (16, 128, 0)
    assert len(bytes.fromhex(calibration["sha256"])) == 32
    assert set(values["pt2.reordered"]) == {
        f"blk.{layer}.ffn_{part}.weight"
        for layer in range(CONFIG["num_hidden_layers"])
        for part in ("gate", "up", "down")
    }
    assert values["general.architecture"] == "llama"
    assert values["llama.block_count"] == CONFIG["num_hidden_layers"]
    assert len(values["tokenizer.ggml.tokens"]) == VOCABULARY


@TYPES
def test_ternary_weights_are_those_of_the_work_directory(converted, work, gguf, type_name) -> None:
    tensors = tensors_of(getattr(converted, type_name), gguf)
    block_type: BlockType = BLOCK_TYPES[type_name]
    for layer, part in layers_and_parts():
        weight = work[f"model.layers.{layer}.{part}.weight"]
        alpha, mu, digits = block_type.unpack(tensors[f"blk.{layer}.{PARTS[part]}.weight"].data)
        rows = expected_rows(layer, part, work)
        assert sorted(rows) == list(range(len(weight.digits)))
        np.testing.assert_array_equal(digits, weight.digits.numpy()[rows])
        # Bit for bit, so that 0 and -0 differ.
        for found, expected in ((alpha, weight.alpha), (mu, weight.mu)):
            np.testing.assert_array_equal(
                np.ascontiguousarray(found).view(np.uint16), expected.numpy()[rows].view(np.uint16)
            )


@TYPES
def test_column_orders_are_those_of_the_work_directory(converted, work, gguf, type_name) -> None:
    tensors = tensors_of(getattr(converted, type_name), gguf)
    expected = {}
    for layer, part in layers_and_parts():
        perm = work[f"model.layers.{layer}.{part}.weight"].perm
        if perm is not None and part != "mlp.down_proj":
            expected[f"blk.{layer}.{PARTS[part]}.perm"] = perm.numpy()
    assert {name for name in tensors if name.endswith(".perm")} == expected.keys()
    assert expected
    for name, perm in expected.items():
        assert tensors[name].tensor_type.name == "I32"
        assert sorted(perm) == list(range(len(perm)))
        np.testing.assert_array_equal(tensors[name].data, perm)


def test_the_folded_order_is_the_function_of_the_model(converted, work) -> None:
    """down(x) for x in stored order is what the unpermuted weight makes of x."""
    name = "model.layers.0.mlp.down_proj.weight"
    perm = work[name].perm
    assert perm is not None
    assert perm.tolist() != list(range(len(perm)))
    x = np.random.default_rng(0).standard_normal(len(perm))
    stored = TernaryWeight(work[name].alpha, work[name].mu, work[name].digits, None)
    np.testing.assert_allclose(
        stored.dequantize().double().numpy() @ x[perm.numpy()],
        work[name].dequantize().double().numpy() @ x,
        rtol=0,
        atol=1e-12,
    )


@TYPES
def test_other_tensors_are_those_of_the_checkpoint(converted, gguf, type_name) -> None:
    tensors = tensors_of(getattr(converted, type_name), gguf)
    checkpoint = load_file(EXAMPLE_MODEL / "model.safetensors")
    norms = {"model.norm.weight": "output_norm.weight"}
    for layer in range(CONFIG["num_hidden_layers"]):
        for theirs, ours in NORMS.items():
            norms[f"model.layers.{layer}.{theirs}.weight"] = f"blk.{layer}.{ours}.weight"
    for theirs, ours in norms.items():
        assert tensors[ours].tensor_type.name == "F32"
        np.testing.assert_array_equal(tensors[ours].data, checkpoint[theirs].float().numpy())
    embeddings = tensors["token_embd.weight"]
    assert embeddings.tensor_type.name == "Q6_K"
    assert_close(stock_weights(embeddings, gguf), checkpoint["model.embed_tokens.weight"], 0.03)
    ternary = {f"blk.{layer}.{PARTS[part]}.weight" for layer, part in layers_and_parts()}
    perms = {name for name in tensors if name.endswith(".perm")}
    assert tensors.keys() == {*ternary, *perms, *norms.values(), "token_embd.weight"}


def assert_close(actual: np.ndarray, tensor: Any, tolerance: float) -> None:
    """The error's norm is at most `tolerance` of the tensor's."""
    expected = tensor.double().numpy()
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


def test_stock_types_are_those_asked_for(tmp_path, gguf) -> None:
    """By GGUF name and by checkpoint name; rows then stay where the converter puts them."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    model = save_model_with_tokenizer(tmp_path / "model", "llama", **shape)
    file = tmp_path / "out.gguf"
    options = ["--output-type", "q8_0", "--embedding-type", "q4_k"]
    options += ["--tensor-type", r"blk\.\d+\.attn_v=f16"]
    options += ["--tensor-type", r"layers\.1\.mlp\.down_proj=q8_0"]
    options += ["--calibration", EXAMPLE_TEXT, "--samples", 4, "--length", 48]
    said = run_pt2gguf("convert", model, file, *options).stdout
    assert "v_proj.weight (2 of them) stays in a stock type: --tensor-type asks for f16" in said
    tensors = tensors_of(file, gguf)
    found = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert found["output.weight"] == "Q8_0"
    assert found["token_embd.weight"] == "Q4_K"
    assert found["blk.0.attn_v.weight"] == found["blk.1.attn_v.weight"] == "F16"
    assert found["blk.1.ffn_down.weight"] == "Q8_0"
    stock = {name for name in found if found[name] in ("Q8_0", "Q4_K", "F16")}
    assert len(stock) == 5
    assert {found[name] for name in found.keys() - stock} == {"TQ2_1", "F32", "I32"}
    assert not {name for name in found if name.removesuffix(".perm") + ".weight" in stock}
    checkpoint = load_file(model / "model.safetensors")
    for ours, theirs, tolerance in (
        ("output.weight", "lm_head.weight", 0.01),
        ("token_embd.weight", "model.embed_tokens.weight", 0.1),
        ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight", 0.001),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight", 0.01),
    ):
        assert_close(stock_weights(tensors[ours], gguf), checkpoint[theirs], tolerance)


@pytest.mark.parametrize(
    ("tied", "options", "expected"),
    [
        (False, [], ("Q4_K", "Q6_K")),
        (False, ["--output-type", "q8_0"], ("Q4_K", "Q8_0")),
        (True, [], ("Q6_K", None)),
        (True, ["--output-type", "q8_0"], ("Q8_0", None)),  # which the embeddings are
        (True, ["--output-type", "q8_0", "--embedding-type", "q5_k"], ("Q5_K", None)),
    ],
)
def test_types_of_embeddings_and_output(tmp_path, gguf, tied, options, expected) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 256, "tie_word_embeddings": tied}
    model = save_model_with_tokenizer(tmp_path / "model", "llama", **shape)
    file = tmp_path / "out.gguf"
    quickly = ["--samples", 4, "--length", 48, "--written", 0, "--no-tuning"]
    run_pt2gguf("convert", model, file, "--calibration", EXAMPLE_TEXT, *quickly, *options)
    tensors = tensors_of(file, gguf)
    found = [tensors.get(name) for name in ("token_embd.weight", "output.weight")]
    assert tuple(tensor and tensor.tensor_type.name for tensor in found) == expected


def test_finished_work_serves_other_files_of_the_same_settings(converted, gguf, tmp_path) -> None:
    """Types of embeddings are no setting of the ternarization; which tensors are ternary is."""
    work = shutil.copytree(converted.work, tmp_path / "work")
    stamps = {path.name: path.stat().st_mtime_ns for path in work.glob("layer-*")}
    file = tmp_path / "out.gguf"
    options = [*COMMON, "--work", work, "--keep-work"]
    run_pt2gguf("convert", EXAMPLE_MODEL, file, *options, "--embedding-type", "f16")
    assert {path.name: path.stat().st_mtime_ns for path in work.glob("layer-*")} == stamps
    embeddings = tensors_of(file, gguf)["token_embd.weight"]
    assert embeddings.tensor_type.name == "F16"
    checkpoint = load_file(EXAMPLE_MODEL / "model.safetensors")
    np.testing.assert_array_equal(
        embeddings.data, checkpoint["model.embed_tokens.weight"].half().numpy()
    )

    other = [*options, "--tensor-type", "attn_v=q8_0"]
    refused = run_pt2gguf("convert", EXAMPLE_MODEL, tmp_path / "x.gguf", *other, check=False)
    assert refused.returncode == 2
    assert "kept.model.layers.0.self_attn.v_proj.weight was absent" in refused.stderr
    assert "is now --tensor-type asks for q8_0" in refused.stderr


def test_the_same_command_gives_the_same_bytes(converted, tmp_path) -> None:
    again = tmp_path / "again.gguf"
    run_pt2gguf("convert", EXAMPLE_MODEL, again, *COMMON)
    assert again.read_bytes() == converted.tq2_1.read_bytes()
    assert list(tmp_path.iterdir()) == [again]  # the work directory goes when it has served


def test_killed_and_started_again(converted, tmp_path) -> None:
    """SIGKILL after the first and again after the third layer: the uninterrupted file's bytes."""
    output, work = tmp_path / "out.gguf", tmp_path / "out.gguf.work"
    command = ["convert", EXAMPLE_MODEL, output, *COMMON]
    stamps: dict[str, int] = {}
    for last in (0, 2):
        kill_after_layer(last, command, work)
        assert not output.exists()
        finished = {path.name: path.stat().st_mtime_ns for path in work.glob("layer-*.safetensors")}
        assert last + 1 <= len(finished) < CONFIG["num_hidden_layers"]
        assert stamps.items() <= finished.items()  # what was finished is not made again
        stamps = finished
    said = run_pt2gguf(*command).stdout
    assert "layer 1/4 done" not in said
    assert "layer 4/4 done" in said
    assert output.read_bytes() == converted.tq2_1.read_bytes()


def kill_after_layer(layer: int, command: list[object], work: Path) -> None:
    arguments = [sys.executable, "-m", "pt2gguf", *map(str, command)]
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not (work / f"layer-{layer:04d}.safetensors").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.002)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
