"""The kernels touch no byte beyond their rows and do nothing undefined, in every version."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from instruction_sets import INSTRUCTION_SETS, compile_driver, runs_here

SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def driver(request, installation, tmp_path_factory) -> Path:
    """The program of run_kernels.c for one instruction set."""
    # Hardly optimised: with the checks, what is unrolled takes the optimiser half a minute.
    directory = tmp_path_factory.mktemp("sanitized")
    return compile_for(request.param, ["-O1", "-g", *SANITIZERS], installation, directory)


@pytest.fixture(scope="module")
def guarded_driver(installation, tmp_path_factory) -> Path:
    """The program with AMX and without sanitizers: pages that may not be touched follow buffers."""
    return compile_for("amx", ["-O3"], installation, tmp_path_factory.mktemp("guarded"))


def compile_for(name: str, options: list[str], installation, directory: Path) -> Path:
    if not runs_here(name):
        pytest.skip(f"this CPU has no {name}")
    return compile_driver(
        ["cc", *options, *INSTRUCTION_SETS[name][0]], installation, directory / name
    )


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Not all that the driver has is freed.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [str(driver), *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def test_kernels_stay_within_their_rows(driver: Path) -> None:
    finished = run(driver)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout == "all kernels ran\n"


def test_an_overrun_would_be_seen(driver: Path) -> None:
    finished = run(driver, "overrun")
    assert finished.returncode != 0
    assert "heap-buffer-overflow" in finished.stderr


def test_tile_registers_stay_within_their_rows(guarded_driver: Path) -> None:
    """The sanitizers do not see what they load."""
    finished = run(guarded_driver)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout == "all kernels ran\n"
    assert run(guarded_driver, "overrun").returncode == -signal.SIGSEGV
