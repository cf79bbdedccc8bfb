"""The command line as users run it, and the example that the repository carries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE_MODEL = REPOSITORY / "examples" / "tiny-4m"
EXAMPLE_TEXT = REPOSITORY / "examples" / "calibration.txt"
VOCABULARY = 4096
"""Of the example's tokenizer."""


def run_pt2gguf(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command as users run it, in a process of its own."""
    command = [sys.executable, "-m", "pt2gguf", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if check:
        assert finished.returncode == 0, finished.stderr
    return finished
