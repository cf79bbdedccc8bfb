"""The paper's Figure 4: llama.cpp's throughput on one GPU for LLaMA's sizes, ternary and 2-bit.

    python benchmarks/figure4.py [--shapes 7b 13b] [--types TQ2_1 Q2_K] [--models DIR]

For each shape and type: writes a model with random weights (synthetic.py; embeddings Q4_0, head
Q6_K), runs llama-bench on it (prefill 128 and 512, decode 256, and 128 + 256 end to end, median of
the repetitions), and removes it. Every measurement is appended to benchmarks/results/figure4.csv as
llama-bench prints it, and is not repeated while it is there; the figure is drawn from the file.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from pathlib import Path

from common import RESULTS, bench_test, git_commit, run
from matplotlib.figure import Figure
from plots import OURS, THEIRS, save
from synthetic import SHAPES, write_model

from pt2gguf.native.installation import find_installation

TYPES = ("TQ2_1", "TQ1_1", "Q2_K", "IQ2_XXS")
PANELS = {"pp128": "prefill, 128 tokens", "tg256": "decode, 256", "pp128+tg256": "end to end"}
TESTS = ["-p", "128,512", "-n", "256", "-pg", "128,256"]
RESULT = RESULTS / "figure4.csv"
COLUMNS = ("shape", "type", "bytes", "test", "tokens/s", "all", "machine", "commit", "command")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["7b", "13b", "30b", "65b"], choices=SHAPES)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument(
        "--models", type=Path, help="where to write models; default: a temporary one"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.models) as directory:
        for shape in options.shapes:
            for kind in options.types:
                if (shape, kind) not in {(row["shape"], row["type"]) for row in known()}:
                    file = Path(directory) / "model.gguf"
                    write_model(file, SHAPES[shape], kind, "Q6_K", "Q4_0", permuted=True)
                    append(measure(file, shape, kind, options.repetitions))
                    file.unlink()
    save(figure(known()), "figure4.svg")


def known() -> list[dict[str, str]]:
    if not RESULT.exists():
        return []
    with RESULT.open(newline="") as stream:
        return list(csv.DictReader(stream))


def append(rows: list[dict[str, object]]) -> None:
    new = not RESULT.exists()
    with RESULT.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def measure(file: Path, shape: str, kind: str, repetitions: int) -> list[dict[str, object]]:
    options = ["-ngl", "99", "-fa", "1", *TESTS, "-r", str(repetitions), "-o", "json"]
    output = run(find_installation().tool("llama-bench"), "-m", file, *options)
    rows = []
    for test in json.loads(output[output.index("[") :]):
        rows.append(
            {
                "shape": shape,
                "type": kind,
                "bytes": file.stat().st_size,
                "test": bench_test(test),
                "tokens/s": round(statistics.median(test["samples_ts"]), 1),
                "all": " ".join(f"{sample:.1f}" for sample in test["samples_ts"]),
                "machine": test["gpu_info"] or test["cpu_info"],
                "commit": git_commit(),
                "command": " ".join(["llama-bench", *options]),
            }
        )
        print(*(rows[-1][column] for column in ("shape", "type", "test", "tokens/s")), flush=True)
    return rows


def figure(rows: list[dict[str, str]]) -> Figure:
    """Tokens per second of TYPES by size, a panel for each of the paper's three."""
    shapes = [shape for shape in SHAPES if any(row["shape"] == shape for row in rows)]
    kinds = [kind for kind in TYPES if any(row["type"] == kind for row in rows)]
    drawn = Figure(figsize=(12, 4), layout="constrained")
    for axes, (test, title) in zip(drawn.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for number, kind in enumerate(kinds):
            rates = {
                row["shape"]: float(row["tokens/s"])
                for row in rows
                if row["type"] == kind and row["test"] == test
            }
            places = [place + 0.8 * number / len(kinds) for place in range(len(shapes))]
            heights = [rates.get(shape, 0.0) for shape in shapes]
            ours = kind.startswith("TQ")
            shade = 1 - 0.5 * (number % 2)
            bars = axes.bar(
                places, heights, 0.8 / len(kinds), label=kind, color=OURS if ours else THEIRS
            )
            for bar in bars:
                bar.set_alpha(shade)
        axes.set_xticks([place + 0.3 for place in range(len(shapes))], [s.upper() for s in shapes])
        axes.set(title=title, ylabel="tokens/s", yscale="log")
        axes.legend(fontsize=7)
    return drawn


if __name__ == "__main__":
    main()
