"""A model's layers, or parts of its matrices, in other processes: as several GPUs have them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT, run_pt2gguf
from llama_tools import divergence, free_port, perplexity, serving, start_tool

TEXT = ["-f", EXAMPLE_TEXT, "-c", 256, "--chunks", 8, "-t", 1]
ALL_LAYERS = ["-ngl", 99]


@pytest.fixture
def two_devices(installation) -> Iterator[list[object]]:
    """The options for two servers as devices."""
    first, second = free_port(), free_port()
    servers = f"127.0.0.1:{first},127.0.0.1:{second}"
    # On the CPU also where there are GPUs, whose kernels have other scales for halves of matrices.
    options = ["--host", "127.0.0.1", "--threads", 1, "--device", "CPU"]
    with (
        serving(installation, "ggml-rpc-server", first, *options),
        serving(installation, "ggml-rpc-server", second, *options),
    ):
        yield ["--rpc", servers, "--device", "RPC0,RPC1", "--tensor-split", "1,1"]


@pytest.mark.parametrize("block_type", ["tq2_1", "tq1_1"])
def test_as_on_one_device(installation, converted, float_logits, two_devices, block_type) -> None:
    """Types and column orders survive the wire; only sums of halves are rounded differently."""
    file = getattr(converted, block_type)
    one = ["-ngl", 0, "--device", "none"]
    two = [*ALL_LAYERS, *two_devices]
    assert perplexity(installation, file, *TEXT, *two) == perplexity(
        installation, file, *TEXT, *one
    )

    # Another rounding is another draw of what 8 bits cost; half as much again is for chance.
    alone = divergence(installation, file, float_logits, *one, "-t", 1)
    halves = divergence(installation, file, float_logits, *two, "--split-mode", "tensor", "-t", 1)
    assert halves <= 1.5 * alone


def test_layers_are_where_they_should_be(installation, converted, two_devices) -> None:
    options = ["-m", converted.tq2_1, "-p", "Once", "-n", 1, "-no-cnv", "-t", 1, "-v"]
    finished = start_tool(installation, "llama-completion", *options, *ALL_LAYERS, *two_devices)
    assert finished.returncode == 0, finished.stderr[-2000:]
    placed = re.findall(r"layer +\d+ assigned to device (\w+)", finished.stderr)
    assert set(placed) == {"RPC0", "RPC1"}


def test_permuted_columns_are_not_split(installation, two_devices, tmp_path) -> None:
    """Each device would multiply its columns with the wrong half of the activations."""
    file = tmp_path / "paper.gguf"
    options = ["--calibration", EXAMPLE_TEXT, "--samples", 4, "--length", 64, "--method", "paper"]
    run_pt2gguf("convert", EXAMPLE_MODEL, file, *options)
    tensors = [*ALL_LAYERS, *two_devices, "--split-mode", "tensor"]
    finished = start_tool(installation, "llama-perplexity", "-m", file, *TEXT, *tensors)
    assert finished.returncode != 0
    assert re.search(
        r"splits the columns of 'blk\.\d\.attn_output\.weight', which "
        r"'blk\.\d\.attn_output\.perm' permutes: use split mode 'layer', or .*--no-ssr",
        finished.stderr,
    )
