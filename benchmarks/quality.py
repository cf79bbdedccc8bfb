"""Perplexity and size of ternary files, the paper's ablation, and llama.cpp's own types.

    python benchmarks/quality.py [--shared DIR] [--only REGEX]

Converts llama-30m with each method, quantizes it with each stock type (imatrix from the same
calibration text), and runs `llama-perplexity -c 512 --chunks 200` on two texts that nothing was
calibrated on. What was measured is kept in benchmarks/results/quality-llama-30m.json, so that an
interrupted run goes on; benchmarks/tables.py makes the README's tables of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pt2gguf.native.installation import find_installation

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "quality-llama-30m.json"
WORK = REPOSITORY / "build" / "benchmarks"
TEXTS = ("heldout-web", "wikitext2-test")
CHUNKS = 200


@dataclass(frozen=True)
class Entry:
    """One file to measure: a stock type of llama.cpp, or options of `pt2gguf convert`."""

    name: str
    stock_type: str | None = None
    options: tuple[str, ...] = ()


ENTRIES = (
    Entry("F16", "F16"),
    Entry("Q2_K", "Q2_K"),
    Entry("IQ2_XXS", "IQ2_XXS"),
    Entry("IQ1_M", "IQ1_M"),
    Entry("TQ1_1 default", options=()),
    Entry("TQ1_1 paper: init", options=("--method=paper", "--no-itf", "--no-aga", "--no-ssr")),
    Entry("TQ1_1 paper: + ITF", options=("--method=paper", "--no-aga", "--no-ssr")),
    Entry("TQ1_1 paper: + AGA", options=("--method=paper", "--no-itf", "--no-ssr")),
    Entry("TQ1_1 paper: ITF + AGA", options=("--method=paper", "--no-ssr")),
    Entry("TQ1_1 paper: ITF + AGA + SSR", options=("--method=paper",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared")
    parser.add_argument("--only", default="", help="measure the entries whose name matches")
    options = parser.parse_args()
    model, data = options.shared / "models" / "llama-30m", options.shared / "data"
    WORK.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    measured = {result["name"] for result in results}
    for entry in ENTRIES:
        if entry.name in measured or not re.search(options.only, entry.name):
            continue
        result = measure(entry, model, data)
        results.append(result)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{entry.name}: {result['bytes']} bytes, {result['perplexity']}", flush=True)


def measure(entry: Entry, model: Path, data: Path) -> dict:
    file = WORK / (re.sub(r"\W+", "-", entry.name) + ".gguf")
    begun = time.monotonic()
    command = quantize(entry.stock_type, file, model, data) if entry.stock_type else None
    command = command or convert(entry.options, file, model, data)
    seconds = time.monotonic() - begun
    size = file.stat().st_size
    perplexities = {text: perplexity(file, data / f"{text}.txt") for text in TEXTS}
    if entry.name != "F16":
        file.unlink()
    return {
        "name": entry.name,
        "bytes": size,
        "seconds": round(seconds, 1),
        "perplexity": perplexities,
        "command": command,
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "commit": git_commit(),
    }


def convert(options: tuple[str, ...], file: Path, model: Path, data: Path) -> str:
    arguments = ["--type=tq1_1", "--samples=128", "--length=512", "--force", *options]
    calibration = data / "wikitext2-valid.txt"
    command = [sys.executable, "-m", "pt2gguf", "convert", model, file]
    run([*command, f"--calibration={calibration}", *arguments])
    return f"pt2gguf convert {model.name} out.gguf --calibration={calibration.name} " + " ".join(
        arguments
    )


def quantize(stock_type: str, file: Path, model: Path, data: Path) -> str:
    installation = find_installation()
    full = WORK / "F16.gguf"
    if not full.exists():
        converter = Path(installation.source) / "convert_hf_to_gguf.py"
        run([sys.executable, converter, model, "--outfile", full, "--outtype", "f16"])
    if stock_type == "F16":
        return f"convert_hf_to_gguf.py {model.name} --outtype f16"
    imatrix = WORK / "imatrix.gguf"
    if not imatrix.exists():
        text = data / "wikitext2-valid.txt"
        command = [installation.tool("llama-imatrix"), "-m", full, "-f", text, "-o", imatrix]
        run([*command, "-c", "512", "--chunks", "256"])
    types = ["--output-tensor-type", "q6_k", "--token-embedding-type", "q6_k"]
    run([installation.tool("llama-quantize"), "--imatrix", imatrix, *types, full, file, stock_type])
    return f"llama-quantize --imatrix imatrix.gguf {' '.join(types)} F16.gguf out.gguf {stock_type}"


def perplexity(file: Path, text: Path) -> float:
    command = [find_installation().tool("llama-perplexity"), "-m", file, "-f", text]
    output = run([*command, "-c", "512", "--chunks", str(CHUNKS)])
    match = re.search(r"Final estimate: PPL = ([\d.]+)", output)
    if match is None:
        raise RuntimeError(f"llama-perplexity gave no estimate:\n{output[-2000:]}")
    return float(match[1])


def run(command: list) -> str:
    finished = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{finished.stdout[-2000:]}")
    return finished.stdout


def processor() -> str:
    match = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


def git_commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
