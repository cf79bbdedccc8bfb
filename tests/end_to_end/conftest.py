"""The example model, converted once for all tests, with the real tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT, run_pt2gguf

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
