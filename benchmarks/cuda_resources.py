"""Registers, spills and shared memory of our CUDA kernels on every architecture.

    python benchmarks/cuda_resources.py BUILD

Compiles ggml_patches/src/ggml-cuda as BUILD, the directory of a build with CUDA, does, for all
architectures that CUDA 13 has of those that llama.cpp is built for, and prints what ptxas reports.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
from collections import defaultdict
from pathlib import Path

ARCHITECTURES = ("75", "80", "86", "89", "90", "120")
OURS = re.compile(r"ggml-cuda/pt2-[\w-]+\.cu$")
HOPPER = "pt2-hopper"  # for sm_90a alone
KERNEL = re.compile(
    r"Compiling entry function '_ZL?(?P<length>\d+)\w+' for 'sm_(?P<arch>\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?[^\n]*",
    re.DOTALL,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("build", type=Path)
    options = parser.parse_args()
    entries = json.loads((options.build / "compile_commands.json").read_text())
    for entry in entries:
        if OURS.search(entry["file"]):
            report(Path(entry["file"]).name, compiled(entry))


def compiled(entry: dict[str, str]) -> str:
    """What ptxas says about a file."""
    words = shlex.split(entry["command"])
    words = words[next(i for i, word in enumerate(words) if word.endswith("nvcc")) :]
    words[words.index("-o") + 1] = "/dev/null"
    if HOPPER not in entry["file"]:
        words = [word for word in words if not word.startswith("--generate-code")]
        words += [f"--generate-code=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    finished = subprocess.run(
        [*words, "-Xptxas", "-v"], cwd=entry["directory"], capture_output=True, text=True
    )
    if finished.returncode != 0:
        raise SystemExit(finished.stderr[-4000:])
    return finished.stderr


def report(file: str, printed: str) -> None:
    """The most that any instance of a kernel takes."""
    kernels = defaultdict(list)
    # a report at a time: without shared memory the pattern would look for it in the next one
    for part in printed.split("ptxas info    : Compiling")[1:]:
        found = KERNEL.search("Compiling" + part)
        if found:
            begin, length = found.end("length"), int(found["length"])
            kernels[found.string[begin : begin + length], found["arch"]].append(found)
    for (name, arch), instances in sorted(kernels.items()):
        registers = max(int(k["registers"]) for k in instances)
        spilled = max(int(k["stores"]) for k in instances)
        shared = max(int(k["shared"] or 0) for k in instances)
        print(
            f"{file:18} {name:16} sm_{arch:4} {len(instances):3} instances, at most {registers:3} "
            f"registers, {spilled:3} bytes spilled, {shared:5} of static shared memory",
            flush=True,
        )


if __name__ == "__main__":
    main()
