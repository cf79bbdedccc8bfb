"""What the benchmarks share."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pt2gguf.native.installation import find_installation

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
RESULTS = REPOSITORY / "benchmarks" / "results"
WORK = REPOSITORY / "build" / "benchmarks"


def convert(model: Path, file: Path, calibration: Path, options: list[str]) -> str:
    """Converts with 128 windows of 512 tokens; gives what the command printed."""
    command = [sys.executable, "-m", "pt2gguf", "convert", model, file]
    arguments = ["--samples=128", "--length=512", "--force", *options]
    return run(*command, f"--calibration={calibration}", *arguments)


def quantize(model: Path, file: Path, calibration: Path, stock_type: str) -> str:
    """A stock type with an importance matrix; output and embeddings in Q6_K."""
    installation = find_installation()
    full, imatrix = WORK / f"{model.name}-F16.gguf", WORK / f"{model.name}-imatrix.gguf"
    if not full.exists():
        converter = Path(installation.source) / "convert_hf_to_gguf.py"
        run(sys.executable, converter, model, "--outfile", full, "--outtype", "f16")
    if stock_type == "F16":
        file.write_bytes(full.read_bytes())
        return f"convert_hf_to_gguf.py {model.name} --outtype f16"
    if not imatrix.exists():
        tool = installation.tool("llama-imatrix")
        run(tool, "-m", full, "-f", calibration, "-o", imatrix, "-c", 512, "--chunks", 256)
    types = ["--output-tensor-type", "q6_k", "--token-embedding-type", "q6_k"]
    tool = installation.tool("llama-quantize")
    run(tool, "--imatrix", imatrix, *types, full, file, stock_type)
    return f"llama-quantize --imatrix imatrix.gguf {' '.join(types)} F16.gguf out.gguf {stock_type}"


def run(*command: object) -> str:
    """What the command printed; an error that shows it if the command failed."""
    finished = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{finished.stdout[-2000:]}")
    return finished.stdout


def bench_test(run: Mapping[str, Any]) -> str:
    """The name of a test in llama-bench's output (JSON or CSV), such as pp128 or pp128+tg256."""
    prompt, answer = int(run["n_prompt"]), int(run["n_gen"])
    return "+".join([f"pp{prompt}"] * bool(prompt) + [f"tg{answer}"] * bool(answer))


def spread(values: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """The median and, of several values, from where to where they reach."""
    low, middle, high = min(values), statistics.median(values), max(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}{unit}"
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def git_commit() -> str:
    return run("git", "-C", REPOSITORY, "describe", "--always", "--dirty").strip()
