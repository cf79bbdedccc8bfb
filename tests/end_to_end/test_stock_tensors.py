"""Matrices that are rounded to a stock type beside ternary ones, from the command line on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT, run_pt2gguf
from small_models import save_model_with_tokenizer
from test_formats_in_files import CONFIG, kill_after_layer, rotary_order, tensors_of

from pt2gguf.convert.calibration import load_tokenizer, tokenize
from pt2gguf.convert.workdir import Layer, WorkDirectory
from pt2gguf.evaluation.reference_model import load_file_model
from pt2gguf.export.llama_cpp import LlamaCpp, import_llama_cpp
from pt2gguf.model import Checkpoint
from pt2gguf.native.installation import Installation

CONTEXT, CHUNKS = 128, 6
OPTIONS: list[object] = [
    *("--calibration", EXAMPLE_TEXT, "--samples", 16, "--length", 128, "--type", "tq1_1"),
    *("--tensor-type", "attn_q=q4_k", "--tensor-type", "ffn_up=q3_k"),
    *("--tensor-type", r"layers\.1\.mlp\.down_proj=q2_k"),
]


@dataclass(frozen=True)
class Converted:
    file: Path
    layers: list[Layer]
    tensors: Mapping[str, Any]


@pytest.fixture(scope="module")
def llama_cpp(installation: Installation) -> LlamaCpp:
    return import_llama_cpp(installation)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp) -> Converted:
    directory = tmp_path_factory.mktemp("stock")
    file = directory / "out.gguf"
    said = run_pt2gguf("convert", EXAMPLE_MODEL, file, *OPTIONS, "--keep-work").stdout
    assert "up_proj.weight (4 of them) stays in a stock type: --tensor-type asks for q3_k" in said
    with WorkDirectory.open_existing(directory / "out.gguf.work") as work:
        layers = [work.final_layer(index) for index in range(CONFIG["num_hidden_layers"])]
    return Converted(file, layers, tensors_of(file, llama_cpp.gguf))


def _name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.{part}.weight"


def _bytes(converted: Converted, name: str) -> torch.Tensor:
    return torch.tensor(converted.tensors[name].data)


def test_types_are_those_asked_for(converted: Converted) -> None:
    types = {name: tensor.tensor_type.name for name, tensor in converted.tensors.items()}
    for layer in range(4):
        assert types[f"blk.{layer}.attn_q.weight"] == "Q4_K"
        assert types[f"blk.{layer}.attn_k.weight"] == "TQ1_1"
        assert types[f"blk.{layer}.ffn_up.weight"] == "Q3_K"
        assert types[f"blk.{layer}.ffn_down.weight"] == ("Q2_K" if layer == 1 else "TQ1_1")


def test_bytes_are_those_that_were_calibrated(converted: Converted) -> None:
    """Rows go where llama.cpp wants them, and where the down projection's columns went."""
    rows = rotary_order(CONFIG["num_attention_heads"], CONFIG["hidden_size"])
    for index, layer in enumerate(converted.layers):
        query = layer.stock[_name(index, "self_attn.q_proj")]
        in_file = _bytes(converted, f"blk.{index}.attn_q.weight")
        assert torch.equal(in_file, query.packed[rows])
        up = layer.stock[_name(index, "mlp.up_proj")].packed
        in_file = _bytes(converted, f"blk.{index}.ffn_up.weight")
        if index == 1:
            down = layer.stock[_name(index, "mlp.down_proj")].packed
            stored = _bytes(converted, f"blk.{index}.ffn_down.weight")
            assert torch.equal(stored, down)
            assert torch.equal(in_file, up)
        else:
            order = layer.weights[_name(index, "mlp.down_proj")].perm
            assert order is not None
            assert torch.equal(in_file, up[order])
        assert f"blk.{index}.ffn_down.perm" not in converted.tensors


def test_llama_cpp_computes_what_the_weights_mean(
    converted: Converted, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    text, record = tmp_path / "prose.txt", tmp_path / "record.json"
    text.write_text(EXAMPLE_TEXT.read_text(encoding="utf-8")[-6000:], encoding="utf-8")
    run_pt2gguf(
        *["eval", converted.file, "--model", EXAMPLE_MODEL, "--text", text, "--json", record],
        *["--engine", "llama.cpp", "--context", CONTEXT, "--chunks", CHUNKS, "--threads", 1],
    )
    rows = json.loads(record.read_text())["rows"]
    (found,) = (row["texts"]["prose"] for row in rows if row["name"] == converted.file.name)

    # By the definition of llama-perplexity: the second half of each window.
    checkpoint = Checkpoint(EXAMPLE_MODEL)
    ids = tokenize(load_tokenizer(EXAMPLE_MODEL), text.read_text(encoding="utf-8"))
    windows = ids[: CHUNKS * CONTEXT].view(CHUNKS, CONTEXT).clone()
    targets = windows[:, CONTEXT // 2 + 1 :].clone()
    windows[:, 0] = checkpoint.config.bos_token_id
    model = load_file_model(checkpoint, converted.file, llama_cpp)
    with torch.inference_mode():
        logits = model(windows).logits[:, CONTEXT // 2 : -1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    # llama.cpp rounds activations to 8 bits, which costs 0.0009 of divergence (docs/quality.md)
    # and moves the loss by about its square root.
    assert math.log(found["llama_cpp_perplexity"]) == pytest.approx(loss, abs=0.03)


def test_killed_and_started_again(converted: Converted, tmp_path: Path) -> None:
    output, work = tmp_path / "out.gguf", tmp_path / "out.gguf.work"
    command: list[object] = ["convert", EXAMPLE_MODEL, output, *OPTIONS]
    kill_after_layer(1, command, work)
    said = run_pt2gguf(*command).stdout
    assert "layer 1/4 done" not in said
    assert output.read_bytes() == converted.file.read_bytes()


def test_other_types_are_other_settings(converted: Converted, tmp_path: Path) -> None:
    work = converted.file.parent / "out.gguf.work"
    other = [*OPTIONS, "--tensor-type", "attn_v=q4_k", "--work", work]
    refused = run_pt2gguf("convert", EXAMPLE_MODEL, tmp_path / "x.gguf", *other, check=False)
    assert refused.returncode == 2
    assert "stock.model.layers.0.self_attn.v_proj.weight was absent and is now q4_k" in (
        refused.stderr
    )


@pytest.mark.parametrize(
    ("rule", "types"),
    [
        # gate, up and down projections of the experts
        ("ffn_up_exps=q3_k", ("TQ1_1", "Q3_K", "TQ1_1")),
        # A file has one type for all experts.
        (r"experts\.1\.w3=q3_k", ("TQ1_1", "Q3_K", "TQ1_1")),
        (r"experts\.2\.w3=q3_k", ("TQ1_1", "Q3_K", "TQ1_1")),
        # What is not rounded here is joined by llama.cpp's converter, which then wants all three.
        (r"experts\.\d+\.w1=q8_0", ("Q8_0", "F16", "F16")),
    ],
)
def test_experts(tmp_path: Path, llama_cpp: LlamaCpp, rule: str, types: tuple[str, ...]) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    model = save_model_with_tokenizer(tmp_path / "model", "mixtral", **shape)
    file = tmp_path / "out.gguf"
    run_pt2gguf("convert", model, file, *OPTIONS[:8], "--length", 48, "--tensor-type", rule)
    tensors = tensors_of(file, llama_cpp.gguf)
    for layer in range(2):
        parts = [tensors[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")]
        assert tuple(tensor.tensor_type.name for tensor in parts) == types
