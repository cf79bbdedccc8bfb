"""Tokens per second of one model in several types, measured in turn on one thread.

    python benchmarks/speed.py

llama-bench runs every file several times, in alternating order, so that what else the machine does
hits all alike; medians go to benchmarks/results/speed-llama-30m.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path

from common import RESULTS, SHARED, WORK, convert, git_commit, quantize

from pt2gguf.evaluation.report import processor
from pt2gguf.native.installation import find_installation

STOCK = ("F16", "Q4_0", "Q2_K", "TQ2_0")
TERNARY = ("TQ2_1", "TQ1_1")
ROUNDS = 7
TESTS = ["-p", "128", "-n", "64"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    files = make_files(SHARED / "models" / "llama-30m", SHARED / "data" / "wikitext2-valid.txt")
    rates: dict[str, dict[str, list[float]]] = {name: {"pp128": [], "tg64": []} for name in files}
    for _ in range(ROUNDS):
        for name, file in files.items():
            for test, rate in bench(file).items():
                rates[name][test].append(rate)
    results = {
        "command": f"llama-bench -m FILE -t 1 {' '.join(TESTS)} -r 1, {ROUNDS} rounds in turn",
        "machine": processor(),
        "commit": git_commit(),
        "files": {
            name: {
                "bytes": files[name].stat().st_size,
                **{test: summary(values) for test, values in tests.items()},
            }
            for name, tests in rates.items()
        },
    }
    (RESULTS / "speed-llama-30m.json").write_text(json.dumps(results, indent=1) + "\n")


def make_files(model: Path, calibration: Path) -> dict[str, Path]:
    WORK.mkdir(parents=True, exist_ok=True)
    files = {name: WORK / f"speed-{name}.gguf" for name in (*STOCK, *TERNARY)}
    for name in STOCK:
        if not files[name].exists():
            quantize(model, files[name], calibration, name)
    for name in TERNARY:
        if not files[name].exists():
            options = [f"--type={name.lower()}", f"--work={WORK / 'speed.work'}", "--keep-work"]
            convert(model, files[name], calibration, options)
    return files


def bench(file: Path) -> dict[str, float]:
    """Tokens per second by test."""
    command = [find_installation().tool("llama-bench"), "-m", file, "-t", "1", *TESTS, "-r", "1"]
    output = subprocess.run([*command, "-o", "json"], capture_output=True, text=True, check=True)
    return {
        f"pp{run['n_prompt']}" if run["n_prompt"] else f"tg{run['n_gen']}": run["avg_ts"]
        for run in json.loads(output.stdout)
    }


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 1),
        "min": round(min(values), 1),
        "max": round(max(values), 1),
    }


if __name__ == "__main__":
    main()
