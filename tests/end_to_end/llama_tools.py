"""llama.cpp's tools as processes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

from pt2gguf.native.installation import Installation

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def run_tool(installation: Installation, name: str, *arguments: object) -> str:
    """What a tool prints on stdout; it must succeed."""
    finished = start_tool(installation, name, *arguments)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


def start_tool(
    installation: Installation, name: str, *arguments: object, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a tool to its end, without a terminal and with no environment variables but `env`."""
    command = [str(installation.tool(name)), *map(str, arguments)]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=env or {},
    )
