"""LoRA adapters on ternary files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT, run_pt2gguf
from llama_tools import perplexity, start_tool

from pt2gguf.export.llama_cpp import import_llama_cpp

TEXT = ["-f", EXAMPLE_TEXT, "-c", 128, "--chunks", 8, "-t", 1]
RANK = 4


@pytest.fixture
def adapter(installation, converted, tmp_path) -> Callable[[str], Path]:
    """Makes a random adapter for the matrices whose names contain a word."""

    def make(word: str) -> Path:
        gguf = import_llama_cpp(installation).gguf
        path = tmp_path / f"{word}.gguf"
        rng = np.random.default_rng()
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", RANK)
        for tensor in gguf.GGUFReader(converted.tq2_1).tensors:
            if word in tensor.name and tensor.name.endswith(".weight"):
                columns, rows = map(int, tensor.shape)
                for part, shape in (("a", (RANK, columns)), ("b", (rows, RANK))):
                    values = rng.normal(0, 0.02, shape).astype(np.float32)
                    writer.add_tensor(f"{tensor.name}.lora_{part}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def test_of_attention(installation, converted, adapter) -> None:
    lora = ["--lora", adapter("attn_q")]
    without = perplexity(installation, converted.tq2_1, *TEXT)
    assert perplexity(installation, converted.tq2_1, *TEXT, *lora) != without


@pytest.mark.parametrize("word", ["ffn_gate", "ffn_up", "ffn_down"])
def test_of_an_mlp_in_another_order_is_refused(installation, converted, adapter, word) -> None:
    """An adapter has the original model's order of rows and columns: the sums would be garbage."""
    arguments = ["-m", converted.tq1_1, *TEXT, "--lora", adapter(word)]
    finished = start_tool(installation, "llama-perplexity", *arguments)
    assert finished.returncode != 0
    assert f"changes 'blk.0.{word}.weight', whose rows or columns" in finished.stderr
    assert "pt2gguf convert --no-ssr" in finished.stderr


def test_of_an_mlp_in_the_original_order(installation, adapter, tmp_path) -> None:
    file = tmp_path / "original-order.gguf"
    options = ["--calibration", EXAMPLE_TEXT, "--samples", 4, "--length", 64, "--no-ssr"]
    run_pt2gguf("convert", EXAMPLE_MODEL, file, *options)
    lora = ["--lora", adapter("ffn_down")]
    assert perplexity(installation, file, *TEXT, *lora) != perplexity(installation, file, *TEXT)
