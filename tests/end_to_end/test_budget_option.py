"""`pt2gguf convert --budget` as users run it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT, run_pt2gguf
from small_models import save_model_with_tokenizer

from pt2gguf.commands.convert import BUDGET_TYPES
from pt2gguf.convert.calibration import load_calibration
from pt2gguf.evaluation.file_weights import bits_per_weight
from pt2gguf.evaluation.reference_model import load_file_model
from pt2gguf.export.llama_cpp import LlamaCpp, import_llama_cpp
from pt2gguf.export.stock_types import bits_per_weight as bits_of_type
from pt2gguf.export.stock_types import stored_values
from pt2gguf.model import Checkpoint, load_model
from pt2gguf.native.installation import Installation

COMMON = ["--calibration", EXAMPLE_TEXT, "--samples", 16, "--length", 128, "--type", "tq1_1"]
BUDGET = 2.4


@pytest.fixture(scope="module")
def llama_cpp(installation: Installation) -> LlamaCpp:
    return import_llama_cpp(installation)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("budget") / "out.gguf"
    finished = run_pt2gguf("convert", EXAMPLE_MODEL, output, *COMMON, "--budget", BUDGET)
    assert "stays in a stock type: --budget asks for" in finished.stdout
    assert sorted(output.parent.iterdir()) == [output], "work directories are removed"
    return output


def test_the_budget_is_spent_and_kept(file: Path, llama_cpp: LlamaCpp) -> None:
    reader = llama_cpp.gguf.GGUFReader(file)
    matrices = [t for t in reader.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    types = {t.tensor_type.name.lower() for t in matrices}
    assert {"tq1_1"} < types <= {"tq1_1", *BUDGET_TYPES}
    # The orders of columns, which bits_per_weight counts, are beyond the budget: 32 bits for each
    # column of a gate or up projection, which has 768 rows.
    found = bits_per_weight(reader)
    assert found <= BUDGET + 32 / 768
    # What is left over would not have paid for making the smallest matrix larger.
    weights = sum(int(t.n_elements) for t in matrices)
    smallest = min(int(t.n_elements) for t in matrices)
    step = bits_of_type("q4_k", llama_cpp.gguf) - 1.875
    assert found >= BUDGET - step * max(smallest, 256 * 768) / weights


@torch.no_grad()
def test_matrices_in_a_stock_type_make_up_for_errors(file: Path, llama_cpp: LlamaCpp) -> None:
    """The model is closer to the full-precision one than with llama.cpp's own rounding of them."""
    gguf = llama_cpp.gguf
    checkpoint = Checkpoint(EXAMPLE_MODEL)
    reader = gguf.GGUFReader(file)
    reordered = reader.get_field("pt2.reordered")
    moved = reordered.contents() if reordered else []
    found = load_file_model(checkpoint, file, llama_cpp)
    by_itself = load_file_model(checkpoint, file, llama_cpp)
    weights = by_itself.state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(found.model.layers))
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    changed = 0
    for name in checkpoint.tensors:
        new_name = names.get_name(name, try_suffixes=(".weight",))
        if types[new_name] in BUDGET_TYPES and new_name not in moved:
            rounded = stored_values(checkpoint.read(name), types[new_name], gguf)
            assert not torch.equal(weights[name], rounded)
            weights[name].copy_(rounded)
            changed += 1
    assert changed >= 4
    text = load_calibration([str(EXAMPLE_TEXT)], EXAMPLE_MODEL, samples=16, length=128, seed=1).ids
    full = load_model(checkpoint, {})(text).logits.log_softmax(-1)

    def divergence(model: Any) -> float:
        return float((full.exp() * (full - model(text).logits.log_softmax(-1))).sum(-1).mean())

    assert divergence(found) < 0.9 * divergence(by_itself)


@torch.no_grad()
def test_closer_to_full_precision_than_all_ternary(
    file: Path, converted, llama_cpp: LlamaCpp
) -> None:
    checkpoint = Checkpoint(EXAMPLE_MODEL)
    text = torch.randint(3, 4000, (4, 128), generator=torch.Generator().manual_seed(0))
    full = load_model(checkpoint, {})(text).logits.log_softmax(-1)

    def divergence(path: Path) -> float:
        found = load_file_model(checkpoint, path, llama_cpp)(text).logits.log_softmax(-1)
        return float((full.exp() * (full - found)).sum(-1).mean())

    assert divergence(file) < divergence(converted.tq1_1)


@pytest.mark.parametrize("intermediate", [256, 384])
def test_rows_that_fit_no_other_type(tmp_path: Path, intermediate: int) -> None:
    """Some of them, or all: llama.cpp's types take 256 weights at a time."""
    model = save_model_with_tokenizer(tmp_path / "model", "llama", intermediate_size=intermediate)
    options = ["--calibration", EXAMPLE_TEXT, "--samples", 16, "--length", 48, "--budget", 2.4]
    finished = run_pt2gguf("convert", model, tmp_path / "out.gguf", *options, check=False)
    if intermediate % 256:
        assert finished.returncode == 2
        assert "nothing to spend bits on" in finished.stderr
    else:
        assert finished.returncode == 0, finished.stderr
        assert "note: 12 of 14 matrices" in finished.stdout


def test_experts_share_a_type(tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    """Those of a projection are one tensor in the file, which llama.cpp computes with."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    model = save_model_with_tokenizer(tmp_path / "model", "mixtral", **shape)
    output, text, record = (tmp_path / name for name in ("out.gguf", "text.txt", "record.json"))
    run_pt2gguf("convert", model, output, *COMMON[:-3], 48, "--type", "tq1_1", "--budget", 2.5)
    tensors = llama_cpp.gguf.GGUFReader(output).tensors
    experts = {t.name: t.tensor_type.name.lower() for t in tensors if "_exps" in t.name}
    assert len(experts) == 2 * 3
    assert set(experts.values()) & set(BUDGET_TYPES)
    assert set(experts.values()) <= {"tq1_1", *BUDGET_TYPES}

    text.write_text(EXAMPLE_TEXT.read_text(encoding="utf-8")[-6000:], encoding="utf-8")
    options = ["--context", 64, "--chunks", 6, "--window", 64, "--threads", 1, "--json", record]
    run_pt2gguf("eval", output, "--model", model, "--text", text, *options)
    rows = {row["name"]: row["texts"]["text"] for row in json.loads(record.read_text())["rows"]}
    losses = {
        key: math.log(rows[output.name][key]) - math.log(rows["F16"][key])
        for key in ("llama_cpp_perplexity", "transformers_perplexity")
    }
    # As in test_stock_tensors.py.
    assert losses["llama_cpp_perplexity"] == pytest.approx(
        losses["transformers_perplexity"], abs=0.03
    )


def test_too_large_a_budget(tmp_path: Path) -> None:
    finished = run_pt2gguf(
        *["convert", EXAMPLE_MODEL, tmp_path / "out.gguf", *COMMON, "--budget", 4.5], check=False
    )
    assert finished.returncode == 2
    assert "ask for less than the 4.5 bits per weight of q4_k" in finished.stderr


def test_too_small_a_budget(tmp_path: Path) -> None:
    finished = run_pt2gguf(
        *["convert", EXAMPLE_MODEL, tmp_path / "out.gguf", *COMMON, "--budget", 1.5], check=False
    )
    assert finished.returncode == 2
    assert "--budget 1.5 is less than the 1.875 bits per weight of tq1_1" in finished.stderr
