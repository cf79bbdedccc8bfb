"""Memory of a piece of work, seen in a process of its own."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

STATUS = Path("/proc/self/status")


def growth(prepare: Callable[..., Callable[[], Any]], *args: object) -> int:
    """By how many bytes the peak of the memory rises while what `prepare(*args)` gives runs."""
    if not STATUS.exists():
        pytest.skip("needs Linux's /proc")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (prepare, *args))


def _growth(prepare: Callable[..., Callable[[], Any]], *args: object) -> int:
    torch.set_num_threads(1)
    work = prepare(*args)
    before = _peak()
    result = work()
    after = _peak()
    del result
    return after - before


def _peak() -> int:
    """Of this process alone: getrusage's also knows the process that this one was forked from."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])
