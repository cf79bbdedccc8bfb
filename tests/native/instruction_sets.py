"""The instruction sets that the kernels are compiled for, one at a time."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pt2gguf.native.installation import Installation

PATCHES = Path(__file__).resolve().parents[2] / "ggml_patches" / "src"

INSTRUCTION_SETS: dict[str, tuple[list[str], set[str]]] = {
    "plain": (["-mno-avx"], set()),
    "avx2": (["-mavx2", "-mfma", "-mf16c"], {"avx2", "fma", "f16c"}),
    "avxvnni": (["-mavx2", "-mfma", "-mf16c", "-mavxvnni"], {"avx_vnni"}),
    "avx512vnni": (["-march=icelake-server"], {"avx512_vnni", "avx512vbmi"}),
    "amx": (["-march=sapphirerapids"], {"amx_int8", "avx512_fp16"}),
}
"""By name: what the compiler may use, and the flags of CPUs that can run it."""

AARCH64: dict[str, list[str]] = {
    "plain": [],
    "dotprod": ["-march=armv8.2-a+dotprod"],
    "i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
}
"""By name: what the cross compiler may use."""


def runs_here(name: str) -> bool:
    """Whether this CPU has the instruction set."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return INSTRUCTION_SETS[name][1] <= set(line.partition(":")[2].split())
    return not INSTRUCTION_SETS[name][1]


def header_options(installation: Installation) -> list[str]:
    """For the compiler: where headers are."""
    ggml = Path(installation.source) / "ggml"
    includes = [ggml / "include", ggml / "src", ggml / "src" / "ggml-cpu"]
    includes += [PATCHES / "ggml", PATCHES / "ggml-cpu"]
    return [f"-I{include}" for include in includes]


def library_options(installation: Installation) -> list[str]:
    """For the compiler, after the sources: the built libraries."""
    paths = [f"-L{installation.bin}", f"-Wl,-rpath,{installation.bin}"]
    return [*paths, "-lggml", "-lggml-cpu", "-lggml-base", "-lm"]


KERNEL_SOURCES = [
    PATCHES / "ggml-cpu" / name for name in ("pt2-cpu.c", "pt2-panel.cpp", "pt2-amx.cpp")
]
"""What multiplies, but for ggml's graphs."""

DRIVER_SOURCES = [
    PATCHES / "ggml" / "ggml-pt2.c",
    *KERNEL_SOURCES,
    Path(__file__).with_name("run_kernels.c"),
]
"""Of the program that runs the kernels by itself."""

# Without what the kernels do not use of ggml-pt2.c, these sources need no library of ggml's.
DRIVER_OPTIONS = ["-ffunction-sections", "-Wl,--gc-sections"]


def compile_driver(compiler: list[str], installation: Installation, program: Path) -> Path:
    """Compile the program that runs the kernels by itself, with a compiler and its options."""
    command = [*compiler, *DRIVER_OPTIONS, *header_options(installation), *DRIVER_SOURCES]
    command += ["-lstdc++", "-lm", "-o", program]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return program
