"""The example model, converted once for all tests, with the real tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT, run_pt2gguf
from llama_tools import CHUNKS, CONTEXT

from pt2gguf.convert.calibration import load_tokenizer, tokenize
from pt2gguf.evaluation.logits_file import write_logits_file
from pt2gguf.evaluation.reference_model import load_file_model
from pt2gguf.export.llama_cpp import import_llama_cpp
from pt2gguf.model import Checkpoint
from pt2gguf.native.installation import Installation, find_installation


@pytest.fixture(scope="session")
def installation() -> Installation:
    return find_installation()


@dataclass(frozen=True)
class Converted:
    """The example model in both types, with the work directory that they were written from."""

    tq2_1: Path
    tq1_1: Path
    work: Path


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    directory = tmp_path_factory.mktemp("converted")
    files = Converted(directory / "tq2_1.gguf", directory / "tq1_1.gguf", directory / "work")
    common = ["--calibration", EXAMPLE_TEXT, "--samples", 16, "--length", 128]
    common += ["--work", files.work, "--keep-work"]
    run_pt2gguf("convert", EXAMPLE_MODEL, files.tq2_1, "--type", "tq2_1", *common)
    run_pt2gguf("convert", EXAMPLE_MODEL, files.tq1_1, "--type", "tq1_1", *common)
    return files


@pytest.fixture(scope="session")
def float_logits(installation, converted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers computes with the weights that both files hold, in float32."""
    checkpoint = Checkpoint(EXAMPLE_MODEL)
    model = load_file_model(checkpoint, converted.tq2_1, import_llama_cpp(installation))
    ids = tokenize(load_tokenizer(EXAMPLE_MODEL), EXAMPLE_TEXT.read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("logits") / "logits"
    windows = ids[: CHUNKS * CONTEXT].view(CHUNKS, CONTEXT)
    write_logits_file(path, model, windows, checkpoint.config.bos_token_id)
    return path
