"""Writes the tables of README.md and docs/ from benchmarks/results/."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import REPOSITORY, RESULTS, spread
from cpu import RATIOS, TESTS
from quality import DEFAULT

README = REPOSITORY / "README.md"
QUALITY = REPOSITORY / "docs" / "quality.md"
SPEED = REPOSITORY / "docs" / "speed.md"


def main() -> None:
    quality = load("quality-llama-30m")
    replace(README, "quality", quality_table(quality, SHORT))
    replace(QUALITY, "files", quality_table(quality))
    replace(QUALITY, "tiny-4m", quality_table(load("quality-tiny-4m")))
    replace(QUALITY, "qwen3", quality_table(load("quality-qwen3-distilled")))
    replace(QUALITY, "table1", table1(load("table1-tiny-4m")))
    for part, rows in PAPERS_TABLE2.items():
        replace(QUALITY, f"table2{part}", table2_beside_papers(load("ablation-llama-30m"), rows))
    replace(QUALITY, "table2-tiny-4m", table2(load("ablation-tiny-4m")))
    replace(QUALITY, "table3", table3())
    replace(README, "speed", cpu_table(load("cpu")))
    for name, record in (("cpu", "cpu"), ("amx", "cpu-amx"), ("zen4", "cpu-zen4")):
        cpu = load(record)
        replace(SPEED, name, cpu_table(cpu))
        replace(SPEED, f"{name}-ratios", cpu_ratios(cpu))
        replace(SPEED, f"{name}-batches", cpu_batches(cpu))
    for name, record in (("cpu", "cpu"), ("zen4", "cpu-zen4")):  # AMX goes beyond these
        replace(SPEED, f"{name}-limits", cpu_limits(load(record)))
    replace(README, "gpu", figure4_table(figure4_rates("figure4")))
    replace(SPEED, "gpu-ratios", figure4_ratios(figure4_rates("figure4")))
    replace(SPEED, "h100", figure4_table(figure4_rates("figure4-h100")))
    replace(SPEED, "h100-ratios", figure4_ratios(figure4_rates("figure4-h100")))
    replace(QUALITY, "fidelity", fidelity_table(load("fidelity-llama-30m")))
    replace(QUALITY, "complexity", complexity_table(load("complexity-cpu")))
    bounds = load("bounds-llama-30m")
    replace(QUALITY, "gaussian", gaussian_table(bounds))
    replace(QUALITY, "bounds", bounds_table(bounds))
    replace(QUALITY, "losses", losses_table(bounds))


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


GPU_TESTS = ("pp128", "pp512", "tg256", "pp128+tg256")

# What the README shows: the files that others would pick, and ours.
SHORT = (
    *("F16", "Q2_K", "IQ2_XS", "IQ2_XXS", "IQ1_M"),
    *("TQ1_1", "TQ1_1, --written 1024", "TQ1_1, --budget 2.32", "TQ1_1, --budget 2.67", DEFAULT),
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


def table1(record: dict) -> str:
    rows = record["rows"]
    texts = list(rows[0]["texts"])
    return table(
        ("", "bits/weight", *texts),
        [
            (
                row["name"].removesuffix(".gguf"),
                f"{row['bits_per_weight']:.3f}",
                *(f"{row['texts'][text]['transformers_perplexity']:.2f}" for text in texts),
            )
            for row in rows
        ],
    )


# The parts of the paper's Table 2: our row, what it is called there, and the perplexities that the
# paper has of LLaMA-2-7B on WikiText-2 and C4, then of LLaMA-3-8B.
WHOLE = "paper: ITF + AGA, SSR, 128 samples, WikiText-2"
PAPERS_WHOLE = (11.56, 24.38, 32.19, 129.83)
PAPERS_TABLE2: dict[str, tuple[tuple[str, str, tuple[float, ...]], ...]] = {
    "a": (
        ("F16", "F16", ()),
        ("2a: initial grid", "initial grid", (22.88, 222.17, 247.75, 1227.94)),
        ("2a: ITF", "ITF", (15.47, 34.17, 83.76, 1039.80)),
        ("2a: AGA", "AGA", (12.25, 26.17, 47.83, 520.14)),
        (WHOLE, "ITF + AGA", PAPERS_WHOLE),
    ),
    "b": (
        ("2b: no reordering", "none", (13.06, 27.66, 112.83, 599.19)),
        ("2b: random order", "random", (12.84, 28.24, 113.42, 466.07)),
        ("2b: Hessian order", "Hessian", (12.35, 25.44, 35.86, 131.33)),
        (WHOLE, "SSR", PAPERS_WHOLE),
    ),
    "c": (
        ("2c: 32 samples", "32", ()),
        ("2c: 64 samples", "64", (11.92, 25.27, 38.90, 252.19)),
        (WHOLE, "128", PAPERS_WHOLE),
        ("2c: 256 samples", "256", (11.35, 23.52, 32.25, 167.48)),
    ),
    "d": (
        (WHOLE, "WikiText-2", PAPERS_WHOLE),
        ("2d: web", "web (the paper: C4)", (18.94, 20.15, 168.81, 72.00)),
        ("2d: PTB", "Penn Treebank", (27.52, 35.15, 428.97, 579.57)),
        ("2d: all three", "a third of each", ()),
    ),
}


def table2(results: list[dict]) -> str:
    """Perplexities of benchmarks/ablation.py: geometric means over the seeds."""
    names = dict.fromkeys(result["name"] for result in results)
    return table(
        (seeds_of(results), *texts_of(results)),
        [(name, *means_over_seeds(results, name)) for name in names],
    )


def table2_beside_papers(
    results: list[dict], rows: Iterable[tuple[str, str, tuple[float, ...]]]
) -> str:
    """One part of the paper's Table 2, and its own perplexities."""
    theirs = ("LLaMA-2-7B Wiki2 / C4", "LLaMA-3-8B Wiki2 / C4")
    return table(
        (seeds_of(results), *texts_of(results), *(f"paper: {model}" for model in theirs)),
        [
            (
                name,
                *means_over_seeds(results, ours),
                *(" / ".join(f"{p:.2f}" for p in papers[i : i + 2]) for i in (0, 2)),
            )
            for ours, name, papers in rows
        ],
    )


def texts_of(results: list[dict]) -> list[str]:
    return list(results[0]["perplexity"])


def seeds_of(results: list[dict]) -> str:
    seeds = len({result["seed"] for result in results} - {None})  # F16 has none
    return f"{seeds} seed{'s' * (seeds > 1)}"


def means_over_seeds(results: list[dict], name: str) -> list[str]:
    of_row = [result["perplexity"] for result in results if result["name"] == name]
    return [
        f"{statistics.geometric_mean(perplexity[text] for perplexity in of_row):.1f}"
        for text in texts_of(results)
    ]


def table3_sizes() -> list[tuple[str, int, int, str]]:
    """Of F16 and TQ1_1, bytes of measured files, and the time of the conversion, by model."""
    rows = []
    for model in ("tiny-4m", "llama-30m"):
        record = load(f"quality-{model}")
        sizes = {row["name"]: row["bytes"] for row in record["evaluation"]["rows"]}
        ours = sizes[f"{DEFAULT}.gguf"]
        rows.append((model, sizes["F16"], ours, f"{conversion_seconds(model)} s, two cores"))
    sizes = {
        kind: int(rate["bytes"])
        for (shape, kind), rate in figure4_rates("figure4").items()
        if shape == "7b"
    }
    whole = re.findall(r"together ([0-9.]+) s", (RESULTS / "large-7b-h100.log").read_text())[-1]
    rows.append(("7B shape", sizes["F16"], sizes["TQ1_1"], f"{float(whole):.0f} s, one H100"))
    return rows


def conversion_seconds(model: str) -> int:
    """Of the default method, from the log of quiet conversions."""
    log = (RESULTS / "conversion-time.log").read_text()
    of_model = log.partition(f"== {model}\n")[2].partition("==")[0]
    found = re.search(r"MB \(tq1_1\) in ([0-9]+) s", of_model)
    assert found is not None
    return int(found[1])


def table3() -> str:
    return table(
        ("", "F16, MB", "TQ1_1, MB", "ratio", "conversion"),
        [
            (m, f"{f / 1e6:.1f}", f"{t / 1e6:.1f}", f"{f / t:.1f}", took)
            for m, f, t, took in table3_sizes()
        ],
    )


def cpu_table(cpu: dict) -> str:
    rows = []
    for name, size in cpu["bytes"].items():
        rates = [one_round["tokens/s"][name] for one_round in cpu["rounds"]]
        cells = [spread([rate[test] for rate in rates]) for test in TESTS]
        rows.append((name, f"{size / 1e6:.0f}", *cells))
    return table(("type", "MB", *TESTS), rows)


def cpu_ratios(cpu: dict) -> str:
    peers = tuple(("TQ2_1", name) for name in cpu["bytes"] if name.startswith("ik_llama.cpp"))
    rows = []
    for mine, other in (*RATIOS, *peers):
        rates = [one_round["tokens/s"] for one_round in cpu["rounds"]]
        cells = [spread([r[mine][t] / r[other][t] for r in rates], 2) for t in TESTS]
        rows.append((f"{mine} / {other}", *cells))
    return table(("", *TESTS), rows)


def cpu_limits(cpu: dict) -> str:
    """Shares of the memory bandwidth and of the dot products' peak."""
    weights = cpu["weights"]
    bits = {"TQ2_1": 2.25, "TQ1_1": 2.25}  # in memory
    rows = []
    for name, size in bits.items():
        decode, prefill = [], []
        for one_round in cpu["rounds"]:
            rates = one_round["tokens/s"][name]
            gigabytes = rates["tg48"] * weights["decode"] * size / 8e9
            decode.append(100 * gigabytes / one_round["read GB/s"])
            products = rates["pp128"] * weights["prefill"] / 1e9
            prefill.append(100 * products / one_round["10^9 products/s"])
        rows.append((name, spread(decode, unit="%"), spread(prefill, unit="%")))
    read = spread([r["read GB/s"] for r in cpu["rounds"]], 1)
    peak = spread([r["10^9 products/s"] for r in cpu["rounds"]])
    heading = ("", f"decode, of {read} GB/s", f"pp128, of {peak} billion products/s")
    return table(heading, rows)


def cpu_batches(cpu: dict) -> str:
    sizes = list(next(iter(cpu["batches"].values())))
    rows = [
        (name, *(f"{rates[size]:.0f}" for size in sizes)) for name, rates in cpu["batches"].items()
    ]
    return table(("columns", *sizes), rows)


Rates = dict[tuple[str, str], dict[str, float]]


def figure4_rates(name: str) -> Rates:
    """Of each shape and type, tokens per second by test and the size of the file in bytes."""
    rates: Rates = {}
    with (RESULTS / f"{name}.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            of_file = rates.setdefault((row["shape"], row["type"]), {"bytes": float(row["bytes"])})
            of_file[row["test"]] = float(row["tokens/s"])
    return rates


def figure4_table(rates: Rates) -> str:
    rows = [
        (
            shape.upper(),
            kind,
            f"{rate['bytes'] / 1e9:.2f}",
            *(f"{rate[test]:.0f}" for test in GPU_TESTS),
        )
        for (shape, kind), rate in sorted(rates.items(), key=lambda item: _by_size(item[0]))
    ]
    return table(("LLaMA", "type", "GB", *GPU_TESTS), rows)


def figure4_ratios(rates: Rates) -> str:
    """How much faster than Q2_K the ternary types are."""
    rows = []
    for shape, kind in sorted(rates, key=_by_size):
        if kind.startswith("TQ"):
            theirs = rates[shape, "Q2_K"]
            ratios = (f"{rates[shape, kind][test] / theirs[test]:.2f}" for test in GPU_TESTS)
            rows.append((f"{shape.upper()}, {kind} / Q2_K", *ratios))
    return table(("", *GPU_TESTS), rows)


def _by_size(shape_and_kind: tuple[str, str]) -> tuple[float, int]:
    kinds = ("TQ2_1", "TQ1_1", "Q2_K", "IQ2_XXS", "F16")
    shape, kind = shape_and_kind
    return float(shape.removesuffix("b")), kinds.index(kind)


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
        values: list[float] = []
        for figures in matrices:
            value: Any = figures
            for key in keys:
                value = value[key]
            values.append(value)
        return sum(values) / len(values)

    columns = (
        ("kurtosis", ".2f", ("excess kurtosis",)),
        ("ITF, weights", ".3f", ("ITF, weights alone",)),
        ("ITF", ".4f", ("ITF",)),
        ("converted", ".4f", ("converted",)),
        ("own outputs", ".4f", ("own outputs",)),
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
        ("weights that are not random given H", *bits("own outputs", "Gaussian weights")),
        (
            "GPTAQ's term and the rows' feedback, which buy perplexity",
            *bits("converted", "own outputs"),
        ),
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
