"""The example model, converted once for all tests of the evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT

from pt2gguf.cli import main as pt2gguf
from pt2gguf.export.llama_cpp import LlamaCpp, import_llama_cpp
from pt2gguf.model import Checkpoint
from pt2gguf.native.installation import find_installation


@pytest.fixture(scope="session")
def llama_cpp() -> LlamaCpp:
    return import_llama_cpp(find_installation())


@pytest.fixture(scope="session")
def checkpoint(llama_cpp) -> Checkpoint:
    return Checkpoint(EXAMPLE_MODEL)


@pytest.fixture(scope="session")
def converted(tmp_path_factory, llama_cpp) -> Path:
    """With column orders in the attention, which the paper's method has and the default has not."""
    file = tmp_path_factory.mktemp("converted") / "tiny.gguf"
    options = ["--calibration", EXAMPLE_TEXT, "--samples", 8, "--length", 128, "--method", "paper"]
    assert pt2gguf(list(map(str, ["convert", EXAMPLE_MODEL, file, *options]))) == 0
    return file
