"""The built libraries, and the kernels compiled for one instruction set at a time."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from instruction_sets import INSTRUCTION_SETS, LIBRARIES, PATCHES, compile_options, runs_here

from pt2gguf.native.installation import Installation, find_installation


@pytest.fixture(scope="session")
def installation() -> Installation:
    return find_installation()


@pytest.fixture(scope="session")
def ggml(installation: Installation) -> ctypes.CDLL:
    """libggml-base."""
    return ctypes.CDLL(str(Path(installation.bin) / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)


@dataclass(frozen=True)
class Kernels:
    """pt2-cpu.c for one instruction set."""

    name: str
    library: ctypes.CDLL


@pytest.fixture(scope="session", params=["host", *INSTRUCTION_SETS])
def kernels(
    request: pytest.FixtureRequest,
    installation: Installation,
    ggml: ctypes.CDLL,
    tmp_path_factory: pytest.TempPathFactory,
) -> Kernels:
    """The kernels as the build made them ("host"), and for each instruction set."""
    name: str = request.param
    host = ctypes.CDLL(str(Path(installation.bin) / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    host.ggml_cpu_init()  # fills the float16 table that the plain version reads
    if name == "host":
        return Kernels(name, host)
    if not runs_here(name):
        pytest.skip(f"this CPU has no {name}")
    library = tmp_path_factory.mktemp("kernels") / f"libpt2-{name}.so"
    command = ["cc", "-O3", "-shared", "-fPIC", *INSTRUCTION_SETS[name][0]]
    command += [*compile_options(installation), PATCHES / "ggml-cpu" / "pt2-cpu.c", *LIBRARIES]
    subprocess.run([*command, "-o", library], check=True)
    return Kernels(name, ctypes.CDLL(str(library)))
