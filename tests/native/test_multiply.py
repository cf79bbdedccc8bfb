"""MUL_MAT and MUL_MAT_ID of the built library, which cuts matrices into panels and tiles."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from instruction_sets import header_options, library_options


def test_graphs_multiply_right(installation, tmp_path) -> None:
    program = tmp_path / "multiply"
    command = ["c++", "-std=c++17", "-O2", *header_options(installation)]
    command += [Path(__file__).with_name("multiply.cpp"), *library_options(installation)]
    subprocess.run([*command, "-o", program], check=True)
    # More threads than processors, which would wait for each other busily.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    finished = subprocess.run(
        [program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout.endswith("shapes multiplied\n")
