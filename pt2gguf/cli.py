"""The command line: parses, runs one command, and turns the user's errors into one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pt2gguf import __version__
from pt2gguf.commands import build, convert, eval, plot, repack
from pt2gguf.errors import Pt2Error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `arguments` (``sys.argv[1:]`` if None).

    Returns:
        The exit code: 0, 2 for an error that the user can mend, 130 when interrupted.
    """
    # Threads that wait for each other give way: with the spinning that is OpenMP's default, another
    # busy process makes a conversion up to ten times slower. Read when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments, argparse.Namespace(arguments=arguments))
    try:
        options.run(options)
    except Pt2Error as error:
        if getattr(options, "verbose", False):
            raise
        print(f"pt2gguf: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pt2gguf: interrupted; run the same command again", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pt2gguf",
        description="Ternarize a pretrained LLM after training and run it with llama.cpp.",
    )
    parser.add_argument("--version", action="version", version=f"pt2gguf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (convert, build, repack, eval, plot):
        command.add_parser(commands)
    return parser
