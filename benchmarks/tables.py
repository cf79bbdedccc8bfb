"""Writes the README's tables from benchmarks/results/, between their markers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
README = REPOSITORY / "README.md"


def main() -> None:
    text = README.read_text()
    quality = json.loads((RESULTS / "quality-llama-30m.json").read_text())
    ablation = [result for result in quality if "paper" in result["name"]]
    others = [result for result in quality if result not in ablation]
    text = replace(text, "quality", quality_table(others))
    text = replace(text, "ablation", quality_table(ablation))
    README.write_text(text)


def quality_table(results: Iterable[dict]) -> str:
    rows = [("file", "MB", "heldout-web", "wikitext2-test", "made in")]
    rows.append(("---", "---:", "---:", "---:", "---:"))
    for result in results:
        perplexity = result["perplexity"]
        rows.append(
            (
                result["name"],
                f"{result['bytes'] / 1e6:.2f}",
                f"{perplexity['heldout-web']:.2f}",
                f"{perplexity['wikitext2-test']:.2f}",
                f"{result['seconds']:.0f} s",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def replace(text: str, name: str, table: str) -> str:
    """The text with the table between its markers <!-- name --> and <!-- /name -->."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no markers for the table {name!r}")
    return pattern.sub(lambda match: match[1] + table + match[2], text)


if __name__ == "__main__":
    main()
