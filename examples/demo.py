"""What `make demo` shows: the example model becomes ternary, talks, and is compared.

A second run reuses the files of the first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from pt2gguf.native.installation import Installation, find_installation

EXAMPLES = Path(__file__).resolve().parent
MODEL = EXAMPLES / "tiny-4m"
TEXT = EXAMPLES / "calibration.txt"
PROMPT = "The history of the city begins"
TYPES = ("tq2_1", "tq1_1")

console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for the files")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    installation = find_installation()

    files = [convert(block_type, output) for block_type in TYPES]
    stock = [stock_file(name, output, installation) for name in ("F16", "Q2_K")]

    heading("llama-completion")
    run(
        *[installation.tool("llama-completion"), "-m", files[0], "-p", PROMPT, "-n", 32],
        *["-no-cnv", "--temp", 0.7, "--seed", 1, "--no-warmup", "-t", 2, "--log-verbosity", 0],
    )
    heading("llama-cpp-python")
    from llama_cpp import Llama

    completion = Llama(str(files[0]), verbose=False, seed=1)(PROMPT, max_tokens=32)
    console.print(PROMPT + completion["choices"][0]["text"])

    heading("llama-bench")
    models = [argument for file in (*stock, *files) for argument in ("-m", file)]
    run(installation.tool("llama-bench"), *models, "-p", 128, "-n", 64, "-t", 1, "-r", 2)


def convert(block_type: str, output: Path) -> Path:
    file = output / f"tiny-4m-{block_type}.gguf"
    if not file.exists():
        heading(f"pt2gguf convert --type {block_type}")
        run(
            *[sys.executable, "-m", "pt2gguf", "convert", MODEL, file, "--type", block_type],
            *["--calibration", TEXT, "--samples", 64, "--length", 256],
            *["--work", output / "work", "--keep-work"],
        )
    return file


def stock_file(name: str, output: Path, installation: Installation) -> Path:
    """The example model as llama.cpp's own converter and llama-quantize make it."""
    file = output / f"tiny-4m-{name.lower()}.gguf"
    if file.exists():
        return file
    heading(f"llama.cpp's own {name}, to compare with")
    if name == "F16":
        converter = Path(installation.source) / "convert_hf_to_gguf.py"
        run(sys.executable, converter, MODEL, "--outfile", file, "--outtype", "f16", quiet=True)
    else:
        full = stock_file("F16", output, installation)
        run(installation.tool("llama-quantize"), full, file, name, quiet=True)
    console.print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    return file


def heading(text: str) -> None:
    console.print(f"\n[bold]== {text}[/bold]")


def run(*command: object, quiet: bool = False) -> None:
    """Runs a command; a quiet one shows its output only if it fails."""
    finished = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
    )
    if finished.returncode != 0:
        console.print(finished.stdout or "", style="red")
        raise SystemExit(f"{command[0]} failed with exit code {finished.returncode}")


if __name__ == "__main__":
    main()
