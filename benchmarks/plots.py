"""Pictures of the tables in docs/quality.md, from benchmarks/results/ into benchmarks/plots/."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from common import REPOSITORY, RESULTS
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

PLOTS = REPOSITORY / "benchmarks" / "plots"
OURS, THEIRS = "#0072b2", "#d55e00"  # of the palette of Okabe and Ito


def main() -> None:
    for path in sorted(RESULTS.glob("quality-*.json")):
        save(quality(json.loads(path.read_text())), f"{path.stem}.svg")
    for path in sorted(RESULTS.glob("ablation-*.json")):
        save(ablation(json.loads(path.read_text())), f"{path.stem}.svg")


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


def save(figure: Figure, name: str) -> None:
    FigureCanvasSVG(figure)
    path = Path(PLOTS / name)
    figure.savefig(path, metadata={"Date": None})
    print(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
