"""The built libraries, and the kernels compiled for one instruction set at a time."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from instruction_sets import (
    INSTRUCTION_SETS,
    KERNEL_SOURCES,
    header_options,
    library_options,
    runs_here,
)

from pt2gguf.blocks import BLOCK_TYPES
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
    """KERNEL_SOURCES for one instruction set."""

    name: str
    library: ctypes.CDLL
    slots: dict[str, int]
    """enum ggml_type by the type's name."""


def slot_of(ggml: ctypes.CDLL, type_name: str) -> int:
    """The enum ggml_type of a type that this build has."""
    return next(i for i in itertools.count() if ggml.ggml_type_name(i) == type_name.encode())


@pytest.fixture(scope="session", params=["host", *INSTRUCTION_SETS])
def kernels(
    request: pytest.FixtureRequest,
    installation: Installation,
    ggml: ctypes.CDLL,
    tmp_path_factory: pytest.TempPathFactory,
) -> Kernels:
    """The kernels as the build made them ("host"), and for each instruction set."""
    name: str = request.param
    ggml.ggml_type_name.restype = ctypes.c_char_p
    slots = {name: slot_of(ggml, name) for name in BLOCK_TYPES}
    host = ctypes.CDLL(str(Path(installation.bin) / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    host.ggml_cpu_init()  # fills the float16 table that the plain version reads
    if name == "host":
        return Kernels(name, host, slots)
    if not runs_here(name):
        pytest.skip(f"this CPU has no {name}")
    library = tmp_path_factory.mktemp("kernels") / f"libpt2-{name}.so"
    # -Bsymbolic: else the functions of libggml-cpu.so, which have the same names, would be called.
    command = ["cc", "-O3", "-shared", "-fPIC", "-Wl,-Bsymbolic", *INSTRUCTION_SETS[name][0]]
    command += [*header_options(installation), *KERNEL_SOURCES, *library_options(installation)]
    subprocess.run([*command, "-o", library], check=True)
    return Kernels(name, ctypes.CDLL(str(library)), slots)
