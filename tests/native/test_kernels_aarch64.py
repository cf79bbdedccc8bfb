"""The kernels of 64-bit ARM processors, which qemu runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from instruction_sets import AARCH64, compile_driver

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
NEEDED = [COMPILER, "aarch64-linux-gnu-g++", EMULATOR]
MISSING = [tool for tool in NEEDED if not shutil.which(tool)]

pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"no {', '.join(MISSING)} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)


@pytest.fixture(scope="module", params=AARCH64)
def driver(request, installation, tmp_path_factory) -> Path:
    """The program of run_kernels.c for one instruction set."""
    name: str = request.param
    compiler = [COMPILER, "-O3", "-static", *AARCH64[name]]
    return compile_driver(compiler, installation, tmp_path_factory.mktemp("aarch64") / name)


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EMULATOR, "-cpu", "max", str(driver), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_kernels_compute_what_they_should(driver: Path) -> None:
    finished = run(driver)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout == "all kernels ran\n"


def test_an_overrun_would_be_seen(driver: Path) -> None:
    assert run(driver, "overrun").returncode != 0
