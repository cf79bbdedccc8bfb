"""The CUDA kernels through llama.cpp's tools: right, and with nothing left for the CPU to do.

Skipped where there is no GPU, or the build has no CUDA (`pt2gguf build -- -DGGML_CUDA=ON`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from command_line import EXAMPLE_TEXT
from llama_tools import COLOUR, WINDOWS, divergence, perplexity, start_tool

from pt2gguf.native.installation import Installation

TYPES = pytest.mark.parametrize("block_type", ["tq2_1", "tq1_1"])
ON_CPU = ("-ngl", 0, "--device", "none")


def run_tool(
    installation: Installation, name: str, *arguments: object, **variables: str
) -> tuple[str, str]:
    """What a tool prints on stdout and stderr; it must succeed."""
    finished = start_tool(installation, name, *arguments, env={**os.environ, **variables})
    assert finished.returncode == 0, finished.stderr[-2000:]
    return COLOUR.sub("", finished.stdout), COLOUR.sub("", finished.stderr)


@pytest.fixture(scope="module", autouse=True)
def gpus(installation) -> list[str]:
    """The names of the GPUs, as in --device."""
    printed = "".join(run_tool(installation, "llama-bench", "--list-devices"))
    found = re.findall(r"\bCUDA\d+\b", printed)
    if not found:
        pytest.skip("needs a GPU and a build with CUDA")
    return found


TERNARY_CASES = r"tq[12]_1"


@pytest.mark.parametrize(
    ("operation", "cases"),
    [
        ("MUL_MAT", TERNARY_CASES),
        ("MUL_MAT_ID", TERNARY_CASES),
        ("MUL_MAT_GROUP", TERNARY_CASES),
        ("MUL_MAT_VEC_FUSION", TERNARY_CASES),
        ("GET_ROWS", TERNARY_CASES),
        ("CPY", TERNARY_CASES),
        ("TOKEN_ATTENTION", "head_size"),
    ],
)
def test_operations_as_on_the_cpu(installation, operation, cases) -> None:
    options = ["test", "-b", "CUDA0", "-o", operation, "-p", cases]
    printed, _ = run_tool(installation, "test-backend-ops", *options)
    results = re.findall(rf"^ *{operation}\((.*)\): (.+)$", printed, re.MULTILINE)
    assert results
    # what no backend does: a copy from F32 with strides
    refused = [case for case, result in results if result.startswith("not supported")]
    assert all(operation == "CPY" for _ in refused), refused
    assert [r for r in results if r[0] not in refused and r[1] != "OK"] == []


@TYPES
def test_the_graph_is_not_split(installation, converted, block_type) -> None:
    """The embeddings are looked up on the CPU, in llama.cpp's way; all else is one split."""
    file = getattr(converted, block_type)
    options = ["-m", file, "-ngl", 99, "--device", "CUDA0", "-p", "Once", "-n", 1, "-no-cnv", "-v"]
    printed = "".join(run_tool(installation, "llama-completion", *options))
    splits = re.findall(r"splits = (\d+)", printed)
    assert splits
    assert {int(number) for number in splits} <= {1, 2}


def divergence_of(
    installation, file: Path, logits: Path, *options: object, **variables: str
) -> float:
    return divergence(installation, file, logits, *options, env={**os.environ, **variables})


@pytest.fixture(scope="module")
def on_cpu(installation, converted, float_logits) -> float:
    """The CPU's divergence, which is the same for both files."""
    return divergence_of(installation, converted.tq2_1, float_logits, *ON_CPU)


@TYPES
@pytest.mark.parametrize("columns", [1, 2, 5, 8, 9, 128, 256])
def test_as_exact_as_the_cpu(
    installation, converted, float_logits, on_cpu, block_type, columns
) -> None:
    """Activations in 8 bits are what makes a difference. No kernel takes a scale for more of them
    than the CPU's; half as much again is for chance."""
    file = getattr(converted, block_type)
    for variables in ({}, {"GGML_CUDA_DISABLE_FUSION": "1"}, {"GGML_CUDA_DISABLE_GRAPHS": "1"}):
        options = ["-ngl", 99, "-ub", columns]
        on_gpu = divergence_of(installation, file, float_logits, *options, **variables)
        assert on_gpu <= 1.5 * on_cpu, variables


def perplexity_of(installation, file, *options: object) -> float:
    arguments = ["-f", EXAMPLE_TEXT, *WINDOWS, *options]
    return perplexity(installation, file, *arguments, env=dict(os.environ))


@TYPES
@pytest.mark.parametrize("mode", ["layer", "tensor"])
@pytest.mark.parametrize("columns", [1, 256])
def test_two_gpus_as_one(
    installation, converted, float_logits, on_cpu, gpus, block_type, mode, columns
) -> None:
    """Layers are computed as on one GPU; halves of matrices by kernels that suit their shapes, of
    which some have other scales for the activations. (llama.cpp has no --split-mode row on CUDA any
    more: tensor took its place.)"""
    if len(gpus) < 2:
        pytest.skip("needs two GPUs")
    file = getattr(converted, block_type)
    options = ["-ngl", 99, "-ub", columns]
    halves = ["--device", ",".join(gpus[:2]), "--split-mode", mode, "--tensor-split", "1,1"]
    if mode == "layer":
        one = perplexity_of(installation, file, *options, "--device", gpus[0])
        two = perplexity_of(installation, file, *options, *halves)
        assert two == pytest.approx(one, rel=0.002)
    assert divergence_of(installation, file, float_logits, *options, *halves) <= 1.5 * on_cpu
