"""Writes the tables of README.md and docs/quality.md from benchmarks/results/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
README = REPOSITORY / "README.md"
QUALITY = REPOSITORY / "docs" / "quality.md"


def main() -> None:
    quality = json.loads((RESULTS / "quality-llama-30m.json").read_text())
    ablation = [result for result in quality if "paper" in result["name"]]
    others = [result for result in quality if result not in ablation]
    speed = json.loads((RESULTS / "speed-llama-30m.json").read_text())
    replace(README, "quality", quality_table(others))
    replace(README, "speed", speed_table(speed))
    replace(QUALITY, "ablation", quality_table(ablation))
    fidelity = json.loads((RESULTS / "fidelity-llama-30m.json").read_text())
    replace(QUALITY, "fidelity", fidelity_table(fidelity))


def quality_table(results: Iterable[dict]) -> str:
    rows = [
        (
            result["name"],
            f"{result['bytes'] / 1e6:.2f}",
            f"{result['perplexity']['heldout-web']:.2f}",
            f"{result['perplexity']['wikitext2-test']:.2f}",
        )
        for result in results
    ]
    return table(("file", "MB", "heldout-web", "wikitext2-test"), rows)


def speed_table(speed: dict) -> str:
    def rate(summary: dict[str, float]) -> str:
        return f"{summary['median']:.0f} ({summary['min']:.0f} to {summary['max']:.0f})"

    rows = [
        (name, f"{file['bytes'] / 1e6:.2f}", rate(file["pp128"]), rate(file["tg64"]))
        for name, file in speed["files"].items()
    ]
    return table(("type", "MB", "prefill pp128", "decode tg64"), rows)


def fidelity_table(fidelity: dict) -> str:
    rows = [
        (
            block_type,
            f"{figures['Mean KLD']:.6f}",
            f"{figures['Mean PPL(Q)']:.3f}",
            f"{figures['PPL(transformers)']:.3f}",
            f"{figures['Same top p']:.2f}%",
        )
        for block_type, figures in fidelity["figures"].items()
    ]
    names = ("type", "mean KL divergence", "perplexity", "of transformers", "same top token")
    return table(names, rows)


def table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    line = ("---", *["---:"] * (len(heading) - 1))
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, line, *rows))


def replace(document: Path, name: str, content: str) -> None:
    """Puts the content between the document's markers <!-- name --> and <!-- /name -->."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text = document.read_text()
    if not pattern.search(text):
        raise ValueError(f"{document} has no markers for the table {name!r}")
    document.write_text(pattern.sub(lambda match: match[1] + content + "\n" + match[2], text))


if __name__ == "__main__":
    main()
