"""llama.cpp's tools as processes."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pt2gguf.native.installation import Installation

CONTEXT, CHUNKS = 256, 16
WINDOWS = ("-c", CONTEXT, "-b", CONTEXT, "--chunks", CHUNKS)
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


def perplexity(
    installation: Installation, file: Path, *options: object, env: Mapping[str, str] | None = None
) -> float:
    """llama-perplexity's estimate; options: which text, and how."""
    finished = start_tool(installation, "llama-perplexity", "-m", file, *options, env=env)
    assert finished.returncode == 0, finished.stderr[-2000:]
    estimate = re.search(r"Final estimate: PPL = (\S+)", finished.stdout + finished.stderr)
    assert estimate, finished.stderr[-2000:]
    return float(estimate[1])


def divergence(
    installation: Installation,
    file: Path,
    logits: Path,
    *options: object,
    env: Mapping[str, str] | None = None,
) -> float:
    """The mean KL divergence of a file's logits from `logits`, of WINDOWS."""
    arguments = ["-m", file, "--kl-divergence", "--kl-divergence-base", logits, *WINDOWS, *options]
    finished = start_tool(installation, "llama-perplexity", *arguments, env=env)
    assert finished.returncode == 0, finished.stderr[-2000:]
    printed = COLOUR.sub("", finished.stdout + finished.stderr)
    found = re.search(r"Mean +KLD: +(\S+)", printed)
    assert found, printed[-2000:]
    return float(found[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(installation: Installation, name: str, port: int, *options: object) -> Iterator[None]:
    """A server of llama.cpp on the loopback interface, gone afterwards whatever happens."""
    command = [str(installation.tool(name)), *map(str, options), "--port", str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            wait_until_listening(server, port)
            yield
        finally:
            server.kill()


def wait_until_listening(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server ended with exit code {server.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    pytest.fail("the server does not listen")
