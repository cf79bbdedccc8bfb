"""Speed on one CPU core: our types, llama.cpp's own, and what the core can do at best.

    python benchmarks/cpu.py [--rounds N] [--peer NAME=LLAMA_BENCH=MODEL ...] [--output FILE]

Makes models of a 1.1 B LLaMA shape with random weights (synthetic.py; no download), then runs
llama-bench on all of them in turn, several rounds, so that what else the machine does hits all
alike. Every round also measures memory bandwidth and the peak of the dot-product instruction
(cpu_limits.c). Writes benchmarks/results/cpu.json unless another file is given: cpu-amx.json is of
a machine with AMX, cpu-zen4.json of a Zen 4. benchmarks/tables.py turns all into tables.
--peer adds a model of another program that has a llama-bench, such as ik_llama.cpp's IQ2_BN.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path

from common import RESULTS, WORK, bench_test, git_commit, run, spread
from synthetic import SHAPES, TERNARY, VOCABULARY, write_model

from pt2gguf.evaluation.report import processor
from pt2gguf.native.installation import find_installation

SHAPE = "1.1b"
TYPES = ("TQ2_1", "TQ1_1", "TQ2_0", "TQ1_0", "Q2_K", "Q4_0")
TESTS = ("pp128", "pp512", "tg48")
BATCHES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
# What decides about a target: a ratio of rates within the same round.
RATIOS = (
    ("TQ2_1", "TQ2_0"),
    ("TQ2_1", "Q4_0"),
    ("TQ2_1", "Q2_K"),
    ("TQ1_1", "TQ1_0"),
    ("TQ1_1", "TQ2_0"),
    ("TQ1_1", "TQ2_1"),
    ("TQ2_1", "TQ2_1 unpermuted"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=LLAMA_BENCH=MODEL")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json")
    options = parser.parse_args()
    work = WORK / "cpu"
    work.mkdir(parents=True, exist_ok=True)
    bench = find_installation().tool("llama-bench")
    models = {name: (bench, model(work, name, name)) for name in TYPES}
    plain = "TQ2_1 unpermuted"
    models[plain] = (bench, model(work, plain, "TQ2_1", permuted=False))
    for peer in options.peer:
        name, tool, file = peer.split("=")
        models[name] = (Path(tool), Path(file))

    limits = compile_limits(work)
    rounds: list[dict] = []
    for number in range(options.rounds):
        gigabytes, products = map(float, run(limits).split())
        rates = {name: measure(*which, TESTS) for name, which in models.items()}
        rounds.append({"read GB/s": gigabytes, "10^9 products/s": products, "tokens/s": rates})
        print(f"round {number + 1} of {options.rounds}", flush=True)
        report(rounds[-1:])
    curve = {name: batch_curve(*models[name]) for name in TERNARY}
    scaling = {name: measure(*models[name], TESTS, threads=2) for name in ("TQ2_1", "Q4_0")}
    print("the median of all rounds, and from where to where they reach")
    report(rounds)
    record = {
        "command": f"llama-bench -m FILE -t 1 -r 1, {options.rounds} rounds in turn",
        "shape": SHAPE,
        "machine": processor(),
        "commit": git_commit(),
        "bytes": {name: file.stat().st_size for name, (_, file) in models.items()},
        "weights": weights(),
        "rounds": rounds,
        "batches": curve,
        "two threads": scaling,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")


def model(work: Path, name: str, kind: str, permuted: bool = True) -> Path:
    file = work / f"{name}.gguf"
    if not file.exists():
        write_model(file, SHAPES[SHAPE], kind, kind, kind, permuted)
    return file


def weights() -> dict[str, int]:
    """Of the matrices that are multiplied for each token: of the prompt, and of an answer."""
    shape = SHAPES[SHAPE]
    key_width = shape.width // shape.heads * shape.key_heads
    layer = 2 * shape.width * (shape.width + key_width) + 3 * shape.width * shape.inner
    layers = shape.layers * layer
    return {"prefill": layers, "decode": layers + VOCABULARY * shape.width}


def compile_limits(work: Path) -> Path:
    source, program = Path(__file__).with_name("cpu_limits.c"), work / "cpu_limits"
    run("cc", "-O3", "-march=native", source, "-o", program)
    return program


def measure(tool: Path, file: Path, tests: tuple[str, ...], threads: int = 1) -> dict[str, float]:
    """Tokens per second by test."""
    lengths: dict[str, list[str]] = {"pp": [], "tg": []}
    for test in tests:
        lengths[test[:2]].append(test[2:])
    command = [tool, "-m", file, "-t", str(threads), "-r", "1", "-o", "json"]
    command += ["-p", ",".join(lengths["pp"]) or "0", "-n", ",".join(lengths["tg"]) or "0"]
    output = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return {bench_test(run): run["avg_ts"] for run in json.loads(output.stdout)}


def batch_curve(tool: Path, file: Path) -> dict[int, float]:
    """Tokens per second for so many columns at once."""
    tests = tuple(f"pp{size}" for size in BATCHES)
    runs = [measure(tool, file, tests) for _ in range(3)]
    return {size: statistics.median(r[f"pp{size}"] for r in runs) for size in BATCHES}


def report(rounds: list[dict]) -> None:
    for name in rounds[0]["tokens/s"]:
        cells = [spread([r["tokens/s"][name][test] for r in rounds]) for test in TESTS]
        print(f"{name:24} " + " ".join(f"{cell:>22}" for cell in cells))
    for ours, other in RATIOS:
        if ours in rounds[0]["tokens/s"] and other in rounds[0]["tokens/s"]:
            cells = [
                spread([r["tokens/s"][ours][t] / r["tokens/s"][other][t] for r in rounds], 2)
                for t in TESTS
            ]
            print(f"{ours + ' / ' + other:24} " + " ".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
