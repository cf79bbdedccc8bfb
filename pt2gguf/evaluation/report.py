"""What an evaluation found, as a Markdown table and as JSON."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from pt2gguf.evaluation.tasks import main_metric
from pt2gguf.export.output import complete_file

ENGINES = ("llama.cpp", "transformers")


@dataclass
class TextFigures:
    """Of one text. kl_divergence: mean, in nats; same_top: 0 to 1, both against the F16 file."""

    llama_cpp_perplexity: float | None = None
    kl_divergence: float | None = None
    same_top: float | None = None
    transformers_perplexity: float | None = None


@dataclass
class Row:
    """What was measured of one model.

    bytes: of the file, None if it exists in transformers only; bits_per_weight: of the decoder's
    matrices; texts: by name; tasks: engine -> task -> metric -> value.
    """

    name: str
    bytes: int | None
    bits_per_weight: float
    texts: dict[str, TextFigures] = field(default_factory=dict)
    tasks: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def average(self, engine: str) -> float | None:
        """The mean of the tasks' main metrics."""
        figures = [main_metric(of_task) for of_task in self.tasks.get(engine, {}).values()]
        return sum(figures) / len(figures) if figures else None


@dataclass(frozen=True)
class _Column:
    title: str
    figure: Callable[[Row], float | None]
    form: str


def markdown_table(rows: Sequence[Row], texts: Iterable[str], tasks: Iterable[str]) -> str:
    """The table, without the columns that nobody has a figure for."""
    columns = [
        column
        for column in _columns(list(texts), list(tasks))
        if any(column.figure(row) is not None for row in rows)
    ]
    lines = [
        ["model", *(column.title for column in columns)],
        ["---", *("---:" for _ in columns)],
        *([row.name, *(_cell(column, row) for column in columns)] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_json(path: Path, rows: Sequence[Row], command: Sequence[str]) -> None:
    """The figures with the command line, versions and processor they came from."""
    record = {
        "command": list(command),
        "versions": _versions(),
        "processor": processor(),
        "rows": [asdict(row) for row in rows],
    }
    with complete_file(path) as part:
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    """The processor's name, as the system knows it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"model name\s*:\s*(.*)", text)
    return match[1] if match else platform.processor() or platform.machine()


def _columns(texts: list[str], tasks: list[str]) -> Iterable[_Column]:
    def of_text(name: str, key: str) -> Callable[[Row], float | None]:
        return lambda row: getattr(row.texts.get(name, TextFigures()), key)

    def of_task(engine: str, task: str) -> Callable[[Row], float | None]:
        def figure(row: Row) -> float | None:
            figures = row.tasks.get(engine, {}).get(task)
            return None if figures is None else main_metric(figures)

        return figure

    def average(engine: str) -> Callable[[Row], float | None]:
        return lambda row: row.average(engine)

    yield _Column("MB", lambda row: None if row.bytes is None else row.bytes / 1e6, "{:.2f}")
    yield _Column("bits/weight", lambda row: row.bits_per_weight, "{:.3f}")
    for name in texts:
        yield _Column(f"{name}: llama.cpp", of_text(name, "llama_cpp_perplexity"), "{:.2f}")
        yield _Column(f"{name}: transformers", of_text(name, "transformers_perplexity"), "{:.2f}")
        yield _Column(f"{name}: KL", of_text(name, "kl_divergence"), "{:.4f}")
        yield _Column(f"{name}: same top", of_text(name, "same_top"), "{:.2%}")
    for engine in ENGINES:
        for task in tasks:
            yield _Column(f"{task}: {engine}", of_task(engine, task), "{:.2%}")
        if len(tasks) > 1:
            yield _Column(f"average: {engine}", average(engine), "{:.2%}")


def _cell(column: _Column, row: Row) -> str:
    figure = column.figure(row)
    return "" if figure is None else column.form.format(figure)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("pt2gguf", "llama_cpp_python", "torch", "transformers", "lm_eval"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
