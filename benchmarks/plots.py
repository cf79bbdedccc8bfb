"""Pictures of the tables in docs/quality.md, from benchmarks/results/ into benchmarks/plots/.

Also one of `pt2gguf plot`, of the example model.
"""

from __future__ import annotations

import json
import statistics

from common import REPOSITORY, RESULTS
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from tables import load, table3_sizes

from pt2gguf.cli import main as pt2gguf

PLOTS = REPOSITORY / "benchmarks" / "plots"
EXAMPLE_TENSOR = "layers.1.mlp.down_proj"
OURS, THEIRS = "#0072b2", "#d55e00"  # of the palette of Okabe and Ito
METHOD_COLOURS = ("#999999", OURS, "#56b4e9", THEIRS, "#e69f00")


def main() -> None:
    for path in sorted(RESULTS.glob("quality-*.json")):
        save(quality(json.loads(path.read_text())), f"{path.stem}.svg")
    for path in sorted(RESULTS.glob("ablation-*.json")):
        save(ablation(json.loads(path.read_text())), f"{path.stem}.svg")
    save(table1(load("table1-tiny-4m")), "table1-tiny-4m.svg")
    save(table3(), "table3.svg")
    example = [str(REPOSITORY / "examples" / "tiny-4m"), "--tensor", EXAMPLE_TENSOR]
    if pt2gguf(["plot", *example, "--force", "-o", str(PLOTS / "example.png")]) != 0:
        raise SystemExit(1)


def quality(record: dict) -> Figure:
    """Divergence from full precision against size, a panel for each text."""
    rows = [row for row in record["evaluation"]["rows"] if row["name"] != "F16"]
    texts = list(rows[0]["texts"])
    figure = Figure(figsize=(5 * len(texts), 4.5), layout="constrained")
    for axes, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        for row in rows:
            name = row["name"].removesuffix(".gguf")
            ours = name.startswith("TQ")
            x, y = row["bytes"] / 1e6, row["texts"][text]["kl_divergence"]
            axes.plot(x, y, "o" if ours else "s", color=OURS if ours else THEIRS)
            axes.annotate(name, (x, y), (5, 3), textcoords="offset points", fontsize=7)
        axes.set(title=text, xlabel="file, MB", ylabel="mean KL divergence from F16, nats")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.25)
    return figure


def ablation(results: list[dict]) -> Figure:
    """Perplexity of each row of the paper's Table 2, the mean and the range over the seeds."""
    names = list(dict.fromkeys(result["name"] for result in results))
    texts = list(results[0]["perplexity"])
    figure = Figure(figsize=(4.5 * len(texts), 0.35 * len(names) + 1), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False, sharey=True)[0]
    for axes, text in zip(panels, texts, strict=True):
        for place, name in enumerate(names):
            values = [r["perplexity"][text] for r in results if r["name"] == name]
            axes.plot([min(values), max(values)], [place, place], color=OURS)
            axes.plot(statistics.geometric_mean(values), place, "o", color=OURS)
        axes.set(title=text, xlabel="perplexity")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    return figure


def table1(record: dict) -> Figure:
    """Perplexity of each method, a group for each text."""
    rows = record["rows"]
    texts = list(rows[0]["texts"])
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, (row, colour) in enumerate(zip(rows, METHOD_COLOURS, strict=True)):
        axes.bar(
            [group + 0.16 * place for group in range(len(texts))],
            [row["texts"][text]["transformers_perplexity"] for text in texts],
            width=0.14,
            label=row["name"].removesuffix(".gguf"),
            color=colour,
        )
    axes.set_yscale("log")
    axes.set_xticks([group + 0.16 * (len(rows) - 1) / 2 for group in range(len(texts))], texts)
    axes.set_ylabel("perplexity")
    axes.legend(fontsize=7)
    return figure


def table3() -> Figure:
    """Sizes of the files."""
    sizes = table3_sizes()
    figure = Figure(figsize=(6, 2), layout="constrained")
    axes = figure.subplots()
    for place, (_, full, ternary, _) in enumerate(sizes):
        axes.barh(place - 0.18, full / 1e6, height=0.34, color=THEIRS)
        axes.barh(place + 0.18, ternary / 1e6, height=0.34, color=OURS)
        axes.annotate("F16", (full / 1e6, place - 0.18), (3, -3), textcoords="offset points")
        axes.annotate(
            f"TQ1_1, {full / ternary:.1f} times smaller",
            (ternary / 1e6, place + 0.18),
            (3, -3),
            textcoords="offset points",
        )
    axes.set_xscale("log")
    axes.set_xlim(1, 100 * max(full for _, full, _, _ in sizes) / 1e6)
    axes.set_yticks(range(len(sizes)), [model for model, _, _, _ in sizes])
    axes.invert_yaxis()
    axes.set_xlabel("file, MB")
    return figure


def save(figure: Figure, name: str) -> None:
    FigureCanvasSVG(figure)
    path = PLOTS / name
    with rc_context({"svg.hashsalt": name}):  # or its names for things would be random
        figure.savefig(path, metadata={"Date": None})
    print(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
