"""Attention in tiles: every instruction set against float64, and in graphs against llama.cpp's."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from instruction_sets import AARCH64, INSTRUCTION_SETS, PATCHES, header_options, runs_here
from test_kernels_aarch64 import EMULATOR, MISSING
from test_kernels_sanitized import SANITIZERS

SOURCES = [PATCHES / "ggml-cpu" / "pt2-attention.cpp", Path(__file__).with_name("attention.cpp")]
# Without what is not used of ggml's headers, no library is needed.
OPTIONS = ["-std=c++17", "-ffunction-sections", "-Wl,--gc-sections"]


def compile_and_run(compiler: list[str], installation, program: Path, emulator: list[str]) -> str:
    """What attention.cpp printed."""
    command = [*compiler, *OPTIONS, *header_options(installation), *SOURCES, "-o", program]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    finished = subprocess.run([*emulator, program], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def expected(name: str) -> str:
    return "no vectors\n" if name == "plain" else "shapes attended\n"


@pytest.mark.parametrize("checks", [["-O3"], ["-O1", "-g", *SANITIZERS]], ids=["fast", "sanitized"])
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_attends_as_float64(name: str, checks: list[str], installation, tmp_path) -> None:
    if not runs_here(name):
        pytest.skip(f"this CPU has no {name}")
    compiler = ["c++", *checks, *INSTRUCTION_SETS[name][0]]
    output = compile_and_run(compiler, installation, tmp_path / "attention", [])
    assert output.endswith(expected(name))


@pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}")
@pytest.mark.parametrize("name", AARCH64)
def test_attends_as_float64_on_arm(name: str, installation, tmp_path) -> None:
    compiler = ["aarch64-linux-gnu-g++", "-O3", "-static", *AARCH64[name]]
    emulator = [EMULATOR, "-cpu", "max"]
    output = compile_and_run(compiler, installation, tmp_path / "attention", emulator)
    assert output.endswith(expected(name))


def test_graphs_attend_as_the_reference(installation) -> None:
    # More threads than processors, which would wait for each other busily.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [Path(installation.bin) / "test-backend-ops", "test", "-b", "CPU"]
    # Some of the cases, which take minutes together: one query (of several heads), a few, and many.
    command += ["-o", "FLASH_ATTN_EXT", "-p", "hsk=(64|80|192),.*kv=113,nb=(1|3|75)"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-4000:]
    tested = re.search(r"(\d+)/(\d+) tests passed", finished.stdout)
    assert tested
    assert 0 < int(tested[1]) == int(tested[2])
