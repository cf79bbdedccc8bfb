"""Writes the tables of README.md and docs/quality.md from benchmarks/results/."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
README = REPOSITORY / "README.md"
QUALITY = REPOSITORY / "docs" / "quality.md"


def main() -> None:
    quality = load("quality-llama-30m")
    replace(README, "quality", quality_table(quality, SHORT))
    replace(QUALITY, "files", quality_table(quality))
    replace(QUALITY, "tiny-4m", quality_table(load("quality-tiny-4m")))
    replace(README, "speed", speed_table(load("speed-llama-30m")))
    replace(QUALITY, "fidelity", fidelity_table(load("fidelity-llama-30m")))
    replace(QUALITY, "complexity", complexity_table(load("complexity-cpu")))
    bounds = load("bounds-llama-30m")
    replace(QUALITY, "gaussian", gaussian_table(bounds))
    replace(QUALITY, "bounds", bounds_table(bounds))
    replace(QUALITY, "losses", losses_table(bounds))


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


# What the README shows: the files that others would pick, and ours.
SHORT = (
    *("F16", "Q2_K", "IQ2_XS", "IQ2_XXS", "IQ1_M"),
    *("TQ1_1", "TQ1_1, --written 256", "TQ1_1, --budget 2.67"),
)


def quality_table(record: dict, names: Iterable[str] = ()) -> str:
    """The files called `names`, or all, the largest first."""
    rows = [
        row | {"name": row["name"].removesuffix(".gguf")} for row in record["evaluation"]["rows"]
    ]
    chosen = [row for row in rows if row["name"] in (names or [row["name"]])]
    texts = list(rows[0]["texts"])
    heading = ["file", "MB", "bits/weight"]
    heading += [h for text in texts for h in (f"{text}: perplexity", "KL", "same top")]
    return table(
        tuple(heading),
        [
            (
                row["name"],
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['bits_per_weight']:.3f}",
                *(cell for text in texts for cell in text_cells(row["texts"][text])),
            )
            for row in sorted(chosen, key=lambda row: -row["bytes"])
        ],
    )


def text_cells(figures: dict) -> tuple[str, str, str]:
    perplexity = f"{figures['llama_cpp_perplexity']:.2f}"
    if figures["kl_divergence"] is None:
        return perplexity, "", ""
    return perplexity, f"{figures['kl_divergence']:.3f}", f"{figures['same_top']:.1%}"


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


def complexity_table(complexity: dict) -> str:
    """Seconds by method, shape and columns, and how often they double with the columns."""
    rows = []
    for method, shapes in complexity["seconds"].items():
        for shape, by_columns in shapes.items():
            for part in ("whole", "inverse of H", "downdating it"):
                seconds = [parts[part] for parts in by_columns.values()]
                growth = math.log2(seconds[-1] / seconds[-2])
                cells = [f"{value:.3g}" for value in seconds]
                rows.append((f"{method}, {shape}: {part}", *cells, f"{growth:.2f}"))
    columns = next(iter(next(iter(complexity["seconds"].values())).values()))
    return table(("seconds", *(f"m = {m}" for m in columns), "last exponent"), rows)


def gaussian_table(bounds: dict) -> str:
    """Errors of Gaussian weights of variance 1 at several rates."""
    gaussian = bounds["gaussian"]
    rows = [
        (rate, f"{bound:.4f}", f"{gaussian['entropy coded'][rate]:.4f}")
        for rate, bound in gaussian["bound"].items()
    ]
    return table(("bits", "any code", "one weight at a time, entropy coded"), rows)


def bounds_table(bounds: dict) -> str:
    """One row for each kind of matrix: means over the layers."""
    kinds: dict[str, list[dict]] = {}
    for name, figures in bounds["matrices"].items():
        kinds.setdefault(name.split(".")[-2], []).append(figures)

    def mean(matrices: list[dict], *keys: str) -> float:
        values = []
        for figures in matrices:
            for key in keys:
                figures = figures[key]
            values.append(figures)
        return sum(values) / len(values)

    columns = (
        ("kurtosis", ".2f", ("excess kurtosis",)),
        ("ITF, weights", ".3f", ("ITF, weights alone",)),
        ("ITF", ".4f", ("ITF",)),
        ("converted", ".4f", ("converted",)),
        ("without GPTAQ", ".4f", ("without GPTAQ",)),
        ("Gaussian weights", ".4f", ("Gaussian weights",)),
        ("ideal feedback", ".4f", ("ternary, ideal feedback",)),
        ("bound 1.585", ".4f", ("bound", "1.585")),
        ("bound 1.875", ".4f", ("bound", "1.875")),
        ("equivalent bits", ".2f", ("equivalent bits",)),
    )
    rows = [
        (kind, *(format(mean(matrices, *keys), form) for _, form, keys in columns))
        for kind, matrices in kinds.items()
    ]
    return table(("matrix", *(heading for heading, _, _ in columns)), rows)


def losses_table(bounds: dict) -> str:
    """Where the bits between TQ1_1's 1.875 and the equivalent rate of the conversion go."""

    def bits(numerator: str, denominator: str) -> tuple[str, str, str]:
        def of(figures: dict) -> float:
            bound = {"bound": figures["bound"]["1.585"]}
            ratio = (figures | bound)[numerator] / (figures | bound)[denominator]
            return math.log2(ratio) / 2

        by_kind: dict[str, list[float]] = {}
        for name, figures in bounds["matrices"].items():
            by_kind.setdefault(name.split(".")[-2], []).append(of(figures))
        means = {kind: statistics.mean(values) for kind, values in by_kind.items()}
        low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        every = [value for values in by_kind.values() for value in values]
        extremes = (f"{low} {means[low]:.3f}", f"{high} {means[high]:.3f}")
        return f"{statistics.mean(every):.3f}", *extremes

    rows = [
        ("alpha and mu (0.25), and packing digits into bytes (0.04)", "0.290", "", ""),
        ("three levels for each weight by itself", *bits("ternary, determinant", "bound")),
        (
            "as many bits for each column, whatever it costs",
            *bits("ternary, ideal feedback", "ternary, determinant"),
        ),
        ("rounding that is not ideal", *bits("Gaussian weights", "ternary, ideal feedback")),
        ("weights that are not random given H", *bits("without GPTAQ", "Gaussian weights")),
        ("GPTAQ's term, which buys perplexity", *bits("converted", "without GPTAQ")),
    ]
    return table(("lost", "bits", "least", "most"), rows)


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
