"""Size, perplexity and divergence of ternary files and of llama.cpp's own types.

    python benchmarks/quality.py MODEL [--only REGEX]

Converts MODEL in several ways, calibrated on wikitext2-valid, and measures all files, and
llama-quantize's types beside them, with `pt2gguf eval` on texts that nothing was calibrated on.
Finished conversions are kept in build/benchmarks, so that an interrupted run goes on. Writes
benchmarks/results/quality-MODEL.json; benchmarks/tables.py makes tables of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

from common import RESULTS, SHARED, WORK, convert, git_commit

from pt2gguf.cli import main as pt2gguf

TEXTS = ("heldout-web", "wikitext2-test")
CHUNKS = 200
STOCK_TYPES = "Q2_K,IQ2_M,IQ2_XS,IQ2_XXS,IQ1_M"

SHARED_WORK = ["--work=default.work", "--keep-work"]
DEFAULT = "TQ1_1, default embeddings"
# All others with the embeddings of the stock types, to compare what becomes of the matrices.
COMPARED = {
    "TQ1_1": SHARED_WORK,
    "TQ1_1, --method paper": ["--method=paper"],
    "TQ1_1, --seed 1": ["--seed=1"],
    "TQ1_1, --seed 2": ["--seed=2"],
    "TQ1_1, --no-tuning --written 0": ["--no-tuning", "--written=0"],
    "TQ1_1, --budget 2.32": ["--budget=2.32"],
    "TQ1_1, --budget 2.67": ["--budget=2.67"],
    "TQ1_1, --written 1024": ["--written=1024"],
}
CONVERSIONS = {DEFAULT: SHARED_WORK} | {
    name: ["--embedding-type=q6_k", *options] for name, options in COMPARED.items()
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", default="", help="the conversions whose name matches")
    options = parser.parse_args()
    work = WORK / f"quality-{options.model.name}"
    work.mkdir(parents=True, exist_ok=True)
    calibration = SHARED / "data" / "wikitext2-valid.txt"
    files, conversions = [], []
    for name, arguments in CONVERSIONS.items():
        if re.search(options.only, name):
            file = work / f"{name}.gguf"
            conversions.append(converted(name, options.model, file, calibration, arguments))
            files.append(str(file))
    found = work / "evaluation.json"
    arguments = ["--model", str(options.model), "--chunks", str(CHUNKS), "--engine", "llama.cpp"]
    arguments += [x for text in TEXTS for x in ("--text", str(SHARED / "data" / f"{text}.txt"))]
    arguments += ["--against", STOCK_TYPES, "--calibration", str(calibration)]
    arguments += ["--samples", "256", "--length", "512", "--json", str(found)]
    if pt2gguf(["eval", *files, *arguments]) != 0:
        raise SystemExit(1)
    evaluation = json.loads(found.read_text())
    shared, build = f"{SHARED}/", f"{work}/"
    evaluation["command"] = [
        a.replace(shared, "").replace(build, "").replace(str(options.model), options.model.name)
        for a in evaluation["command"]
    ]
    record = {"conversions": conversions, "evaluation": evaluation}
    path = RESULTS / f"quality-{options.model.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


def converted(
    name: str, model: Path, file: Path, calibration: Path, arguments: list[str]
) -> dict[str, object]:
    """Converts unless it is done; how that went."""
    notes = file.with_suffix(".json")
    if not notes.exists():
        begun = time.monotonic()
        placed = [a.replace("--work=", f"--work={file.parent}/") for a in arguments]
        output = convert(model, file, calibration, ["--type=tq1_1", *placed])
        record = {
            "name": name,
            "options": arguments,
            "output": output.replace(f"{file.parent}/", "").splitlines(),
            "seconds": round(time.monotonic() - begun, 1),
            "cores": os.cpu_count(),
            "commit": git_commit(),
        }
        notes.write_text(json.dumps(record))
        print(f"{name}: {record['seconds']} s", flush=True)
    return json.loads(notes.read_text())


if __name__ == "__main__":
    main()
