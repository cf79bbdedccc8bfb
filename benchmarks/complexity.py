"""How the time of ternarizing one matrix grows with its columns, and which part takes it.

    python benchmarks/complexity.py [--columns 1024 2048 4096] [--device cuda]

Times `ternarize` for (512, m) and (m, m) matrices, with the default method and with `paper`, SSR
and GPTAQ's term on in both. Fits time ~ m^k by least squares in logarithms, for the whole and for
each part. Writes benchmarks/results/complexity-DEVICE.json.

What is to be seen, with n rows, m columns and blocks of b = 128: inverting H and downdating the
inverse, once for each input, take O(m^3) in all, whatever order SSR chooses; so does GPTAQ's term.
Updating the later columns takes O(n m^2), choosing blocks O(n m^2 / b), and what happens inside
blocks O(n m b). Factorising the remaining H anew for each block would take O(m^4 / b).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from common import REPOSITORY, git_commit
from tables import table
from torch import Tensor

from pt2gguf.convert.machine import usable_device
from pt2gguf.evaluation.report import processor
from pt2gguf.ternary import METHODS, InputStatistics, Method, ternarize

ROWS = 512
REPEATS = 2
# The functions of pt2gguf.ternary.ternarize by what they are for; the rest is copying.
PARTS = {
    "damped_inverse": "inverse of H",
    "split_block": "downdating it",
    "asymmetric_target": "GPTAQ's term",
    "asymmetric_update": "GPTAQ's term",
    "_choose_block": "choosing blocks",
    "_ternarize_block": "inside blocks",
    "exact_update": "updating later columns",
    "diagonal_update": "updating later columns",
    "relative_error": "measuring the error",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--columns", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    device = usable_device(options.device)
    torch.set_num_threads(options.threads)
    figures: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    seconds_of(ROWS, 512, METHODS["default"], device)  # starts threads, loads libraries
    for columns in options.columns:
        for rows, shape in ((ROWS, f"{ROWS} x m"), (columns, "m x m")):
            for name in ("default", "paper"):
                method = replace(METHODS[name], ssr_skip=())
                runs = [seconds_of(rows, columns, method, device) for _ in range(REPEATS)]
                best = min(runs, key=lambda run: run["whole"])
                figures.setdefault(name, {}).setdefault(shape, {})[columns] = best
                print(f"{name}, {shape}, m = {columns}: {best['whole']:.2f} s", flush=True)
    record = {
        "command": f"benchmarks/complexity.py --columns {' '.join(map(str, options.columns))} "
        f"--device {options.device} --threads {options.threads}",
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "commit": git_commit(),
        "seconds": figures,
    }
    path = REPOSITORY / "benchmarks" / "results" / f"complexity-{device.type}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    for name, shapes in figures.items():
        for shape, by_columns in shapes.items():
            print(f"\n{name}, {shape}\n\n{complexity_table(by_columns)}")


def seconds_of(rows: int, columns: int, method: Method, device: torch.device) -> dict[str, float]:
    """Seconds of one `ternarize` as a whole and in parts; collecting H is not in them."""
    W, statistics = example(rows, columns, device)
    with timed_parts(device) as seconds:
        begun = now(device)
        ternarize(W, statistics, method)
        seconds["whole"] = now(device) - begun
    seconds["the rest"] = 2 * seconds["whole"] - sum(seconds.values())
    return dict(seconds)


def example(rows: int, columns: int, device: torch.device) -> tuple[Tensor, InputStatistics]:
    """Gaussian weights, and correlated inputs that are a little off the full-precision ones."""
    generator = torch.Generator(device).manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    statistics = InputStatistics(columns, device, with_full_precision=True)
    scale = torch.arange(1, columns + 1, device=device).rsqrt()
    mixing = gaussian(columns, columns) / math.sqrt(columns)
    for _ in range(4):  # 2 m tokens
        x = (gaussian(columns // 2, columns) * scale) @ mixing
        statistics.add(x, x + 0.1 * x.std() * gaussian(*x.shape))
    return gaussian(rows, columns), statistics


@contextmanager
def timed_parts(device: torch.device) -> Iterator[defaultdict[str, float]]:
    """Within this context, seconds spent in each of `PARTS` are added up."""
    module = importlib.import_module("pt2gguf.ternary.ternarize")
    seconds: defaultdict[str, float] = defaultdict(float)

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            begun = now(device)
            result = function(*arguments)
            seconds[part] += now(device) - begun
            return result

        return call

    originals = {name: getattr(module, name) for name in PARTS}
    for name, function in originals.items():
        setattr(module, name, timed(function, PARTS[name]))
    try:
        yield seconds
    finally:
        for name, function in originals.items():
            setattr(module, name, function)


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def exponent(by_columns: dict[int, dict[str, float]], part: str) -> float:
    """k of the fit seconds ~ m^k."""
    points = [(math.log(m), math.log(seconds[part])) for m, seconds in by_columns.items()]
    x_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points)
    return slope / sum((x - x_mean) ** 2 for x, _ in points)


def complexity_table(by_columns: dict[int, dict[str, float]]) -> str:
    """Seconds and share of each part, and its exponent."""
    largest = by_columns[max(by_columns)]
    rows = [
        (
            part,
            *(f"{seconds[part]:.3f}" for seconds in by_columns.values()),
            f"{100 * largest[part] / largest['whole']:.0f}%",
            f"{exponent(by_columns, part):.2f}",
        )
        for part in sorted(largest, key=lambda part: -largest[part])
    ]
    headings = (f"m = {columns}" for columns in by_columns)
    return table(("part", *headings, "share of the last", "exponent"), rows)


if __name__ == "__main__":
    main()
