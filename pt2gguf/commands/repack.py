"""``pt2gguf repack``: from one ternary type to the other, losslessly."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pt2gguf.export.output import require_writable


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "repack",
        help="change the type of a ternary file",
        description="Writes a ternary GGUF file with the other ternary type: the same values.",
    )
    parser.add_argument("input", metavar="IN.gguf", type=Path)
    parser.add_argument("output", metavar="OUT.gguf", type=Path)
    parser.add_argument("--type", choices=("tq2_1", "tq1_1"), required=True)
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from pt2gguf.blocks import BLOCK_TYPES
    from pt2gguf.export.llama_cpp import import_llama_cpp
    from pt2gguf.export.repack import repack
    from pt2gguf.native.installation import find_installation

    require_writable(options.output, options.force)
    llama_cpp = import_llama_cpp(find_installation())
    repack(options.input, options.output, BLOCK_TYPES[options.type], llama_cpp.gguf)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.2f} MB ({options.type})")
