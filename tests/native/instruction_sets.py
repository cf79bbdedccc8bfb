"""The instruction sets that the kernels are compiled for, one at a time."""

from __future__ import annotations

from pathlib import Path

from pt2gguf.native.installation import Installation

PATCHES = Path(__file__).resolve().parents[2] / "ggml_patches" / "src"

INSTRUCTION_SETS: dict[str, tuple[list[str], set[str]]] = {
    "plain": (["-mno-avx"], set()),
    "avx2": (["-mavx2", "-mfma", "-mf16c"], {"avx2", "fma", "f16c"}),
    "avxvnni": (["-mavx2", "-mfma", "-mf16c", "-mavxvnni"], {"avx_vnni"}),
    "avx512vnni": (["-march=icelake-server"], {"avx512_vnni", "avx512vbmi"}),
}
"""By name: what the compiler may use, and the flags of CPUs that can run it."""


def runs_here(name: str) -> bool:
    """Whether this CPU has the instruction set."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return INSTRUCTION_SETS[name][1] <= set(line.partition(":")[2].split())
    return not INSTRUCTION_SETS[name][1]


def compile_options(installation: Installation) -> list[str]:
    """For the C compiler: where headers and the built libraries are."""
    ggml = Path(installation.source) / "ggml"
    includes = [ggml / "include", ggml / "src", ggml / "src" / "ggml-cpu"]
    includes += [PATCHES / "ggml", PATCHES / "ggml-cpu"]
    options = ["-std=gnu11", *(f"-I{include}" for include in includes)]
    return [*options, f"-L{installation.bin}", f"-Wl,-rpath,{installation.bin}"]


LIBRARIES = ["-lggml-cpu", "-lggml-base", "-lm"]
