"""How closely llama.cpp computes what the ternary weights mean.

Converts a checkpoint, then compares llama.cpp running the file with transformers running the same
dequantized weights in float32: mean KL divergence and perplexities (llama-perplexity).

    python benchmarks/fidelity.py MODEL --calibration TEXT --text TEXT
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path

import torch
from common import REPOSITORY, WORK, git_commit, run

from pt2gguf.blocks import BLOCK_TYPES
from pt2gguf.cli import main as pt2gguf
from pt2gguf.convert.calibration import load_tokenizer, tokenize
from pt2gguf.evaluation.logits_file import write_logits_file
from pt2gguf.evaluation.reference_model import load_file_model
from pt2gguf.evaluation.report import processor
from pt2gguf.export.llama_cpp import import_llama_cpp
from pt2gguf.model import Checkpoint
from pt2gguf.native.installation import find_installation


def measure(model: Path, file: Path, text: Path, windows: int, length: int) -> dict[str, float]:
    """The lines of llama-perplexity's report, by name: figure of the file against transformers."""
    installation = find_installation()
    llama_cpp = import_llama_cpp(installation)
    checkpoint = Checkpoint(model)
    reference = load_file_model(checkpoint, file, llama_cpp)
    ids = torch.as_tensor(tokenize(load_tokenizer(model), text.read_text()))
    ids = ids[: windows * length].view(windows, length)
    add_bos = llama_cpp.gguf.GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    bos = checkpoint.config.bos_token_id if add_bos is None or add_bos.contents() else None
    with tempfile.TemporaryDirectory() as directory:
        logits = Path(directory) / "logits"
        perplexity = write_logits_file(logits, reference, ids, bos)
        tool = installation.tool("llama-perplexity")
        against = ["--kl-divergence", "--kl-divergence-base", logits]
        report = run(tool, "-m", file, "-c", length, "-t", 2, *against)
    found = {"PPL(transformers)": perplexity}
    for name in ("Mean PPL(Q)", "Mean KLD", "Same top p"):
        match = re.search(re.escape(name).replace(r"\ ", r"\s+") + r"\s*:\s*([-\d.]+)", report)
        if match is None:
            raise RuntimeError(f"llama-perplexity printed no {name!r}:\n{report[-2000:]}")
        found[name] = float(match[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=100)
    options = parser.parse_args()
    work = WORK / f"fidelity-{options.model.name}.work"
    results = {}
    for block_type in BLOCK_TYPES:
        file = WORK / f"fidelity-{block_type}.gguf"
        arguments = ["convert", str(options.model), str(file), "--type", block_type, "--force"]
        arguments += ["--calibration", str(options.calibration), "--work", str(work)]
        arguments += ["--samples", str(options.samples), "--length", str(options.length)]
        if pt2gguf([*arguments, "--keep-work"]) != 0:
            raise SystemExit(1)
        results[block_type.upper()] = measure(
            options.model, file, options.text, options.windows, options.length
        )
        print(block_type, results[block_type.upper()], flush=True)
    record = {
        "command": f"benchmarks/fidelity.py {options.model.name} "
        f"--calibration {options.calibration.name} --text {options.text.name} "
        f"--windows {options.windows}",
        "machine": processor(),
        "commit": git_commit(),
        "figures": results,
    }
    path = REPOSITORY / "benchmarks" / "results" / f"fidelity-{options.model.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
