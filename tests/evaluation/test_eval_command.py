"""``pt2gguf eval`` as users type it, on the example model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT
from small_models import save_model_with_tokenizer
from task_set import write_task_set
from test_file_weights import write

from pt2gguf import __version__
from pt2gguf.cli import main as pt2gguf
from pt2gguf.convert.calibration import load_tokenizer, tokenize
from pt2gguf.evaluation.perplexity import perplexity
from pt2gguf.evaluation.reference_model import load_file_model
from pt2gguf.model import load_model
from pt2gguf.native import installation

CONTEXT, CHUNKS = 128, 6
QUICK = ["--threads", 1, "--context", CONTEXT, "--chunks", CHUNKS, "--window", 256]
CALIBRATION = ["--calibration", EXAMPLE_TEXT, "--samples", 8, "--length", 128]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(EXAMPLE_TEXT.read_text()[-6000:])
    return file


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path_factory, monkeypatch):
    """Whatever happens, temporary files are gone afterwards."""
    directory = tmp_path_factory.mktemp("tmpdir")
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    yield
    assert not list(directory.iterdir())


def run(capsys, *arguments: object) -> str:
    """What the command prints; it must succeed."""
    code = pt2gguf(["eval", *map(str, arguments)])
    output, errors = capsys.readouterr()
    assert code == 0, errors
    return output


def refuse(capsys, *arguments: object) -> str:
    """The one sentence of an error."""
    assert pt2gguf(["eval", *map(str, arguments)]) == 2
    output, errors = capsys.readouterr()
    assert not output
    line = errors.strip().splitlines()[-1]
    assert line.startswith("pt2gguf: error: ")
    return line


def table(output: str) -> dict[str, dict[str, str]]:
    """The cells by row and column."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()]
    header = lines[0]
    assert all(set(cell) <= {"-", ":"} for cell in lines[1])
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines[2:]}


@pytest.fixture(scope="module")
def measured(converted, text, tmp_path_factory) -> dict[str, Any]:
    """One run with everything but tasks: what it printed, and its JSON."""
    file = tmp_path_factory.mktemp("json") / "found.json"
    arguments = ["eval", converted, "--model", EXAMPLE_MODEL, "--text", text, "--json", file]
    arguments += ["--against", "Q2_K,rtn,gptq", *CALIBRATION, *QUICK]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda line, **_: printed.append(line))
        assert pt2gguf(list(map(str, arguments))) == 0
    return {"table": table("\n".join(printed)), **json.loads(file.read_text())}


def figures(measured: dict[str, Any], name: str) -> dict[str, Any]:
    row = next(row for row in measured["rows"] if row["name"] == name)
    return row | row["texts"]["prose"]


def test_a_row_for_each_model(measured, converted) -> None:
    assert list(measured["table"]) == ["F16", converted.name, "Q2_K", "RTN", "GPTQ"]
    assert [row["name"] for row in measured["rows"]] == list(measured["table"])
    assert figures(measured, converted.name)["bytes"] == converted.stat().st_size
    cells = measured["table"][converted.name]
    assert cells["MB"] == f"{converted.stat().st_size / 1e6:.2f}"
    assert float(cells["prose: KL"]) == pytest.approx(
        figures(measured, converted.name)["kl_divergence"], abs=5e-5
    )
    assert measured["table"]["F16"]["prose: KL"] == ""
    assert measured["table"]["RTN"]["MB"] == ""


def test_the_record_says_how_it_was_made(measured, text) -> None:
    assert measured["command"][:3] == ["pt2gguf", "eval", measured["command"][2]]
    assert str(text) in measured["command"]
    assert measured["versions"]["pt2gguf"] == __version__
    assert measured["versions"]["torch"] == torch.__version__
    assert measured["processor"]


def test_sizes(measured) -> None:
    assert figures(measured, "F16")["bits_per_weight"] == 16
    assert 2.5 < figures(measured, "Q2_K")["bits_per_weight"] < 3.5
    assert figures(measured, "GPTQ")["bits_per_weight"] == pytest.approx(2 + 18 / 128)


def test_better_and_worse(measured, converted) -> None:
    """The order in which these methods must come out, with room for how little was measured."""
    for key in ("transformers_perplexity", "llama_cpp_perplexity"):
        assert figures(measured, "F16")[key] < figures(measured, "Q2_K")[key]
        assert figures(measured, "Q2_K")[key] < figures(measured, converted.name)[key]
    plain = [figures(measured, name)["transformers_perplexity"] for name in ("GPTQ", "RTN")]
    assert figures(measured, converted.name)["transformers_perplexity"] < min(plain)
    ours, stock = figures(measured, converted.name), figures(measured, "Q2_K")
    assert 0 < stock["kl_divergence"] < ours["kl_divergence"]
    assert 1 > stock["same_top"] > ours["same_top"] > 0


def test_figures_are_those_of_transformers(
    measured, converted, text, checkpoint, llama_cpp
) -> None:
    """llama.cpp's figures computed anew from the weights, by their definition."""
    ids = tokenize(load_tokenizer(EXAMPLE_MODEL), text.read_text())
    full, ternary = load_model(checkpoint, {}), load_file_model(checkpoint, converted, llama_cpp)
    windows = ids[: CHUNKS * CONTEXT].view(CHUNKS, CONTEXT).clone()
    targets = windows[:, CONTEXT // 2 + 1 :].clone()
    windows[:, 0] = checkpoint.config.bos_token_id
    with torch.inference_mode():
        p, q = (
            model(windows).logits[:, CONTEXT // 2 : -1].double().log_softmax(-1)
            for model in (full, ternary)
        )
    loss = -q.gather(2, targets[..., None]).mean().item()
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    found = figures(measured, converted.name)
    # llama.cpp rounds activations to 8 bits, which costs 0.0009 of divergence (docs/quality.md)
    # and moves the other figures by about its square root.
    assert math.log(found["llama_cpp_perplexity"]) == pytest.approx(loss, abs=0.03)
    assert found["kl_divergence"] == pytest.approx(divergence, rel=0.03)
    assert found["same_top"] == pytest.approx(agreement, abs=0.03)
    for model, name in ((full, "F16"), (ternary, converted.name)):
        expected = perplexity(model, ids, 256)
        assert figures(measured, name)["transformers_perplexity"] == pytest.approx(expected)


def test_a_checkpoint_alone(capsys, text) -> None:
    output = run(capsys, EXAMPLE_MODEL, "--text", text, "--engine", "llama.cpp", *QUICK)
    cells = table(output)
    assert list(cells) == ["F16"]
    assert list(cells["F16"]) == ["model", "MB", "bits/weight", "prose: llama.cpp"]
    assert math.isfinite(float(cells["F16"]["prose: llama.cpp"]))


def test_transformers_alone_needs_no_full_precision_file(
    capsys, converted, text, monkeypatch
) -> None:
    monkeypatch.setattr("pt2gguf.evaluation.evaluate.write_full_precision", None)
    options = ["--model", EXAMPLE_MODEL, "--text", text, "--engine", "transformers", *QUICK]
    cells = table(run(capsys, converted, *options))
    assert cells["F16"]["MB"] == ""
    assert list(cells[converted.name])[3:] == ["prose: transformers"]


def test_tasks(capsys, converted, tmp_path) -> None:
    tasks = write_task_set(tmp_path / "tasks")
    options = ["--model", EXAMPLE_MODEL, "--tasks", "piqa,boolq", "--task-path", tasks]
    cells = table(run(capsys, converted, *options, "--limit", 4, "--threads", 1))
    for row in cells.values():
        for engine in ("llama.cpp", "transformers"):
            found = [float(row[f"{task}: {engine}"].rstrip("%")) for task in ("piqa", "boolq")]
            assert all(figure % 25 == 0 for figure in found)  # of four items
            assert row[f"average: {engine}"] == f"{np.mean(found):.2f}%"


# refusals -------------------------------------------------------------------------------------


def test_nothing_to_measure(capsys, converted) -> None:
    assert "--text" in refuse(capsys, converted, "--model", EXAMPLE_MODEL)


def test_a_file_needs_its_model(capsys, converted, text) -> None:
    assert "--model" in refuse(capsys, converted, "--text", text)


def test_neither_file_nor_model(capsys, text) -> None:
    assert "nowhere.gguf" in refuse(capsys, "nowhere.gguf", "--text", text)
    assert "not a file" in refuse(capsys, "nowhere.gguf", "--model", EXAMPLE_MODEL, "--text", text)


def test_not_gguf(capsys, text) -> None:
    sentence = refuse(capsys, text, "--model", EXAMPLE_MODEL, "--text", text, *QUICK)
    assert "not a readable GGUF file" in sentence


def test_another_vocabulary(capsys, tmp_path, llama_cpp, text) -> None:
    writer = llama_cpp.gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "word"])
    writer.add_tensor("token_embd.weight", np.ones((4, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    options = ["--model", EXAMPLE_MODEL, "--text", text, *QUICK]
    sentence = refuse(capsys, tmp_path / "other.gguf", *options)
    assert re.search(r"\(4 tokens\).*\(4096 tokens\)", sentence)
    write(tmp_path / "none.gguf", llama_cpp.gguf, {"a": np.ones((4, 32), np.float32)})
    assert "(0 tokens)" in refuse(capsys, tmp_path / "none.gguf", *options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--window", 2048, "--context", 128], "a window in transformers takes 2048"),
        (["--context", 2048, "--engine", "llama.cpp"], "two windows of 2048"),
        (["--context", 128, "--chunks", 1, "--engine", "llama.cpp"], "100 positions"),
        (["--window", 4096], "the model's context of 2048"),
        (["--against", "Q2_K,Q9"], "'Q9' is neither rtn nor gptq nor a type"),
        (["--device", "tpu"], "choose cpu or cuda"),
        (["--against", "rtn", "--engine", "llama.cpp", "--context", 128], "rtn exists in trans"),
        (["--against", "gptq", "--calibration", "nowhere"], "'nowhere' is neither a file"),
        (["--json", "nowhere/x.json"], "nowhere is not a directory"),
        (["--tasks", "piqa", "--task-path", "nowhere"], "nowhere is not a directory"),
    ],
)
def test_what_cannot_be_measured(capsys, text, options, reason) -> None:
    assert reason in refuse(capsys, EXAMPLE_MODEL, "--text", text, *options)


def test_texts_that_cannot_be_read(capsys, tmp_path, text) -> None:
    assert "cannot be read" in refuse(capsys, EXAMPLE_MODEL, "--text", tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refuse(capsys, EXAMPLE_MODEL, "--text", tmp_path / "binary.txt")
    shutil.copy(text, tmp_path / text.name)
    both = ["--text", text, "--text", tmp_path / text.name]
    assert "two texts are called prose" in refuse(capsys, EXAMPLE_MODEL, *both)


def test_too_little_memory_and_disk(capsys, text, monkeypatch) -> None:
    options = [EXAMPLE_MODEL, "--text", text, *QUICK]
    monkeypatch.setattr("pt2gguf.evaluation.evaluate.available_memory", lambda: 2**20)
    assert "--engine llama.cpp" in refuse(capsys, *options)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20})())
    assert "--chunks" in refuse(capsys, *options, "--engine", "llama.cpp")


def broken_installation(monkeypatch, directory: Path) -> None:
    """Tools are looked for in `directory`."""
    found = installation.find_installation()
    broken = dataclasses.replace(found, bin=str(directory))
    monkeypatch.setattr(installation, "find_installation", lambda: broken)


def test_a_missing_tool(capsys, text, monkeypatch, tmp_path) -> None:
    broken_installation(monkeypatch, tmp_path)
    options = [EXAMPLE_MODEL, "--text", text, "--engine", "llama.cpp", *QUICK]
    assert "llama-perplexity is missing" in refuse(capsys, *options)


@pytest.mark.parametrize(("code", "says"), [(3, "ended with code 3"), (0, "measured nothing")])
def test_a_tool_that_fails(capsys, text, monkeypatch, tmp_path, code, says) -> None:
    tool = tmp_path / "llama-perplexity"
    lines = ["#!/bin/sh", "echo loading", "echo '0.00.1 E main: the reason' >&2", "echo done"]
    tool.write_text("\n".join([*lines, f"exit {code}", ""]))
    tool.chmod(0o755)
    broken_installation(monkeypatch, tmp_path)
    options = [EXAMPLE_MODEL, "--text", text, "--engine", "llama.cpp", *QUICK]
    sentence = refuse(capsys, *options)
    assert says in sentence
    assert "(main: the reason)" in sentence


def test_types_that_do_not_fit_the_ends(capsys, text, tmp_path) -> None:
    """Rows of 128, where Q6_K needs 256."""
    model = save_model_with_tokenizer(tmp_path / "model", "llama", max_position_embeddings=512)
    options = ["--against", "Q2_K", *CALIBRATION, "--text", text, "--engine", "llama.cpp", *QUICK]
    found = table(run(capsys, model, *options))["Q2_K"]
    assert float(found["prose: KL"]) > 0


def test_too_little_calibration_for_importances(capsys, text) -> None:
    options = ["--against", "IQ2_XXS", "--calibration", EXAMPLE_TEXT, "--samples", 1]
    options += ["--length", 128, "--text", text, "--engine", "llama.cpp", *QUICK]
    assert "needs 1024" in refuse(capsys, EXAMPLE_MODEL, *options)
