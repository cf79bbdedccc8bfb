"""Instructions for each product of the CPU kernels, by instruction set and columns.

    python benchmarks/instructions.py

Compiles pt2-panel.cpp for each instruction set and counts the instructions of the loop over blocks
in the disassembly: what a block of a panel costs, on any machine. Prints a Markdown table; sets
whose compiler is not here are left out.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from common import REPOSITORY, run

from pt2gguf.native.installation import find_installation

COLUMNS = 128  # of a block
INSTRUCTION_SETS = {
    "AVX-512 VNNI": ("", "-march=icelake-server"),
    "AVX-VNNI": ("", "-march=alderlake"),
    "AVX2": ("", "-march=haswell"),
    "NEON i8mm": ("aarch64-linux-gnu-", "-march=armv8.6-a+i8mm"),
    "NEON dotprod": ("aarch64-linux-gnu-", "-march=armv8.2-a+dotprod"),
}
TILES = (1, 2, 4)
# How many rows a register works for.
LANES = {"AVX-512 VNNI": 16, "AVX-VNNI": 8, "AVX2": 8, "NEON i8mm": 4, "NEON dotprod": 4}
FUNCTION = re.compile(r"^[0-9a-f]+ <void \(anonymous namespace\)::dot_vectors<.*, (\d+), (\d+)>")
INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\t(.*)$")
JUMP = re.compile(r"^(?:j[a-z]+|b\.[a-z]+|cbn?z)\b.*?\b([0-9a-f]+) <")


def main() -> None:
    print("| instructions for 1000 products | " + " | ".join(f"{n} columns" for n in TILES) + " |")
    print("|---|" + "---:|" * len(TILES))
    for name, (prefix, flags) in INSTRUCTION_SETS.items():
        if shutil.which(f"{prefix}g++"):
            costs = block_costs(prefix, flags, LANES[name])
            print(f"| {name} | " + " | ".join(f"{costs[n]:.0f}" for n in TILES) + " |")


def block_costs(prefix: str, flags: str, lanes: int) -> dict[int, float]:
    """Instructions for 1000 products, by the columns of a tile."""
    ggml = Path(find_installation().source) / "ggml"
    patches = REPOSITORY / "ggml_patches" / "src"
    include = [ggml / "include", ggml / "src", ggml / "src" / "ggml-cpu", patches / "ggml"]
    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(directory) / "panel.o"
        options = ["-std=c++17", "-O3", "-DNDEBUG", flags, *(f"-I{i}" for i in include)]
        # Functions that are not declared inline stay apart, so that the loop is found by its name.
        options += ["-fno-inline-functions", "-fno-inline-functions-called-once"]
        options += ["-fno-inline-small-functions"]
        source = patches / "ggml-cpu" / "pt2-panel.cpp"
        run(f"{prefix}g++", *options, "-c", source, "-o", compiled)
        listing = run(f"{prefix}objdump", "-d", "-C", "--no-show-raw-insn", compiled)
    costs = {}
    for function in listing.split("\n\n"):
        heading, *lines = function.splitlines() or [""]
        kernel = FUNCTION.match(heading)
        if kernel:
            vectors, columns = map(int, kernel.groups())
            products = vectors * lanes * COLUMNS * columns
            costs[columns] = 1000 * longest_loop(lines) / products
    return costs


def longest_loop(lines: list[str]) -> int:
    """How many instructions lie between the jump that reaches back furthest, and its aim."""
    found = [match.groups() for match in map(INSTRUCTION.match, lines) if match]
    place = {int(address, 16): index for index, (address, _) in enumerate(found)}
    jumps = ((i, JUMP.match(text)) for i, (_, text) in enumerate(found))
    return max(i - place[int(j[1], 16)] + 1 for i, j in jumps if j and int(j[1], 16) in place)


if __name__ == "__main__":
    main()
