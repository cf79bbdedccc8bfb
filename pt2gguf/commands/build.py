"""``pt2gguf build``: llama.cpp with the ternary types, into this environment."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "build",
        help="build the patched llama.cpp and put it into this environment",
        description=(
            "Builds llama.cpp with the ternary tensor types, links its tools (llama-cli, "
            "llama-bench, llama-server, ...) into this environment and gives its llama_cpp module "
            "the same libraries. Needs a C++ compiler; takes minutes once, seconds afterwards."
        ),
        epilog="Options of CMake go after a double dash: pt2gguf build -- -DGGML_CUDA=ON",
    )
    parser.add_argument(
        "--build-dir", type=Path, help="where to build (default: inside the environment)"
    )
    parser.add_argument(
        "--source", type=Path, metavar="DIR", help="a llama.cpp source tree at the pinned commit"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="parallel compilations")
    parser.add_argument("--cuda", action="store_true", help="with CUDA (needs nvcc and cuBLAS)")
    parser.add_argument("cmake_options", nargs="*", metavar="-DOPTION", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from pt2gguf.native.build import build, default_build_directory

    cuda = ["-DGGML_CUDA=ON"] if options.cuda else []
    installation = build(
        options.build_dir or default_build_directory(),
        options.source,
        options.jobs,
        cuda + options.cmake_options,
    )
    print(f"llama.cpp is built: {installation.bin}")
