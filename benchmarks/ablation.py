"""The paper's Tables 2a to 2d on a model of your own: the parts of `--method paper`, one by one.

    python benchmarks/ablation.py MODEL [--seeds 0 1 2] [--device cuda]

Ternarizes MODEL once for each row and seed, and measures perplexity in transformers on the
dequantized weights, as papers do: over all positions of the first 200 windows of 512 tokens of each
text. The web text serves twice: its first half to calibrate on, its second half to test on. What
was measured is kept in benchmarks/results/ablation-MODEL.json, so that an interrupted run goes on;
benchmarks/tables.py and plots.py show it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SHARED, git_commit
from torch import Tensor

from pt2gguf.convert.calibration import load_calibration, load_tokenizer, tokenize
from pt2gguf.convert.machine import describe_device, usable_device
from pt2gguf.convert.run import ternarize_checkpoint
from pt2gguf.evaluation.perplexity import perplexity
from pt2gguf.model import Checkpoint, load_model
from pt2gguf.ternary import METHODS

LENGTH, WINDOWS = 512, 200
WIKITEXT, PTB, WEB = "wikitext2-valid", "ptb-valid", "web-first-half"
TESTS = ("wikitext2-test", "ptb-test", "web-second-half")


@dataclass(frozen=True)
class Entry:
    """One row: the switches of the method that differ from the paper's, and the calibration."""

    name: str
    switches: dict[str, Any] = field(default_factory=dict)
    samples: int = 128
    texts: tuple[str, ...] = (WIKITEXT,)


FULL_PRECISION = Entry("F16")
ENTRIES = (
    Entry("2a: initial grid", {"itf": False, "aga": False}),
    Entry("2a: ITF", {"aga": False}),
    Entry("2a: AGA", {"itf": False}),
    Entry("paper: ITF + AGA, SSR, 128 samples, WikiText-2"),
    Entry("2b: no reordering", {"ssr": False}),
    Entry("2b: random order", {"reorder_by": "random"}),
    Entry("2b: Hessian order", {"reorder_by": "hessian"}),
    Entry("2c: 32 samples", samples=32),
    Entry("2c: 64 samples", samples=64),
    Entry("2c: 256 samples", samples=256),
    Entry("2d: PTB", texts=(PTB,)),
    Entry("2d: web", texts=(WEB,)),
    Entry("2d: all three", texts=(WIKITEXT, PTB, WEB)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    path = RESULTS / f"ablation-{options.model.name}.json"
    found = json.loads(path.read_text()) if path.exists() else []
    done = {(result["name"], result["seed"]) for result in found}
    device = usable_device(options.device)
    with tempfile.TemporaryDirectory() as directory:
        texts = split_texts(Path(directory))
        seeded = [(entry, seed) for seed in options.seeds for entry in ENTRIES]
        for entry, seed in [(FULL_PRECISION, None), *seeded]:
            if (entry.name, seed) in done:
                continue
            weights = {}
            if seed is not None:
                work = Path(directory) / "work"
                weights = ternarize(entry, seed, options.model, texts, work, options.device)
            figures = perplexities(options.model, weights, texts, device)
            print(entry.name, seed, figures, flush=True)
            found.append(
                {
                    "name": entry.name,
                    "seed": seed,
                    "perplexity": figures,
                    "machine": describe_device(device),
                    "commit": git_commit(),
                }
            )
            path.write_text(json.dumps(found, indent=1) + "\n")


def split_texts(directory: Path) -> dict[str, Path]:
    """All texts by name, with the web text in two halves."""
    texts = {file.stem: file for file in (SHARED / "data").glob("*.txt")}
    lines = texts["heldout-web"].read_text().splitlines(keepends=True)
    for name, half in ((WEB, lines[: len(lines) // 2]), (TESTS[2], lines[len(lines) // 2 :])):
        texts[name] = directory / f"{name}.txt"
        texts[name].write_text("".join(half))
    return texts


def ternarize(
    entry: Entry, seed: int, model: Path, texts: dict[str, Path], work: Path, device: str
) -> dict[str, Tensor]:
    """The dequantized weights."""
    calibration = load_calibration(
        [str(texts[name]) for name in entry.texts],
        model,
        samples=entry.samples,
        length=LENGTH,
        seed=seed,
    )
    method = replace(METHODS["paper"], **entry.switches)
    with ternarize_checkpoint(Checkpoint(model), method, calibration, work, device=device) as done:
        layers = range(done.settings.layers)
        weights = {n: w for index in layers for n, w in done.final_weights(index).items()}
        done.remove()
    return {name: weight.dequantize() for name, weight in weights.items()}


def perplexities(
    path: Path, weights: dict[str, Tensor], texts: dict[str, Path], device: torch.device
) -> dict[str, float]:
    """Of the checkpoint with these weights in place of its own."""
    model = load_model(Checkpoint(path), weights, device)
    tokenizer = load_tokenizer(path)
    return {
        name: perplexity(
            model, tokenize(tokenizer, texts[name].read_text())[: WINDOWS * LENGTH], LENGTH
        )
        for name in TESTS
    }


if __name__ == "__main__":
    main()
