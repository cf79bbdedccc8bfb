"""The built libraries, and the kernels compiled for one instruction set at a time."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pt2gguf.native.installation import Installation, find_installation

REPOSITORY = Path(__file__).resolve().parents[2]

# What the compiler may use; "host" is what the build itself chose.
INSTRUCTION_SETS = {
    "host": None,
    "plain": ["-mno-avx"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avxvnni": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "avx512vnni": ["-march=icelake-server"],
}
CPU_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avxvnni": {"avx_vnni"},
    "avx512vnni": {"avx512_vnni", "avx512vbmi"},
}


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


@pytest.fixture(scope="session", params=INSTRUCTION_SETS)
def kernels(
    request: pytest.FixtureRequest,
    installation: Installation,
    ggml: ctypes.CDLL,
    tmp_path_factory: pytest.TempPathFactory,
) -> Kernels:
    name: str = request.param
    flags = INSTRUCTION_SETS[name]
    bin_directory = Path(installation.bin)
    host = ctypes.CDLL(str(bin_directory / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    host.ggml_cpu_init()  # fills the float16 table that the plain version reads
    if flags is None:
        return Kernels(name, host)
    if not CPU_FLAGS.get(name, set()) <= _cpu_flags():
        pytest.skip(f"this CPU has no {name}")
    library = tmp_path_factory.mktemp("kernels") / f"libpt2-{name}.so"
    compile_kernels(installation, ["-O3", "-shared", "-fPIC", *flags, "-o", str(library)])
    return Kernels(name, ctypes.CDLL(str(library)))


def compile_kernels(installation: Installation, options: list[str]) -> None:
    """Compiles pt2-cpu.c alone, linked against the built libraries."""
    source = Path(installation.source)
    patches = REPOSITORY / "ggml_patches" / "src"
    includes = [
        patches / "ggml",
        patches / "ggml-cpu",
        source / "ggml" / "include",
        source / "ggml" / "src",
        source / "ggml" / "src" / "ggml-cpu",
    ]
    subprocess.run(
        [
            "cc",
            "-std=gnu11",
            *(f"-I{include}" for include in includes),
            *options,
            str(patches / "ggml-cpu" / "pt2-cpu.c"),
            f"-L{installation.bin}",
            f"-Wl,-rpath,{installation.bin}",
            "-lggml-cpu",
            "-lggml-base",
            "-lm",
        ],
        check=True,
    )


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()
