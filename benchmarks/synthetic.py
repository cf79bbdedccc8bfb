"""Models of real shapes with random weights, for measuring speed: no download, little memory.

    python benchmarks/synthetic.py 1.1b TQ2_1 model.gguf [--output Q6_K] [--embeddings Q4_0]

Quantizes a few random rows of each length with ggml's own quantizer and repeats them, so that all
weights are valid and any type works in seconds. Files have no tokenizer; llama-bench needs none.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pt2gguf.blocks import BLOCK_TYPES
from pt2gguf.export.llama_cpp import import_llama_cpp
from pt2gguf.native.installation import find_installation

VOCABULARY = 32000
DISTINCT_ROWS = 64


@dataclass(frozen=True)
class Shape:
    """A LLaMA's sizes."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int


SHAPES = {
    "tiny": Shape(3, 256, 512, 4, 4),
    "1.1b": Shape(22, 2048, 5632, 32, 4),
    "7b": Shape(32, 4096, 11008, 32, 32),
    "13b": Shape(40, 5120, 13824, 40, 40),
    "30b": Shape(60, 6656, 17920, 52, 52),
    "65b": Shape(80, 8192, 22016, 64, 64),
}


def write_model(
    path: Path, shape: Shape, weights: str, output: str, embeddings: str, permuted: bool
) -> None:
    """A GGUF of the shape with `weights`, `output` and `embeddings` in the types of these names.

    permuted: gate and up have their columns permuted, in an order that they share, as converted
    files have.
    """
    gguf: Any = import_llama_cpp(find_installation()).gguf
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    if weights in TERNARY:
        writer.add_uint32("pt2.version", 1)
        writer.add_uint32("pt2.block_size", 128)
    tensors = list(_tensors(shape, weights, output, embeddings, permuted and weights in TERNARY))
    for name, dimensions, kind in tensors:
        if kind == "I32":
            writer.add_tensor_info(name, dimensions, np.dtype(np.int32), 4 * dimensions[0])
            continue
        qtype = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[qtype]
        row = dimensions[-1] // block * size
        nbytes = int(np.prod(dimensions[:-1])) * row
        stored = (*dimensions[:-1], row) if kind != "F32" else dimensions
        dtype = np.dtype(np.uint8 if kind != "F32" else np.float32)
        writer.add_tensor_info(name, stored, dtype, nbytes, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rows = _Rows(gguf)
    for name, dimensions, kind in tensors:
        if kind == "I32":
            layer = int(name.split(".")[1])
            order = np.random.default_rng(layer).permutation(dimensions[0])
            writer.write_tensor_data(order.astype(np.int32))
        else:
            writer.write_tensor_data(rows.tensor(dimensions, kind))
    writer.close()


TERNARY = tuple(block_type.name.upper() for block_type in BLOCK_TYPES.values())


def _tensors(
    shape: Shape, weights: str, output: str, embeddings: str, permuted: bool
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, dimensions (rows first) and type of every tensor."""
    width, inner = shape.width, shape.inner
    key_width = width // shape.heads * shape.key_heads
    yield "token_embd.weight", (VOCABULARY, width), embeddings
    yield "output_norm.weight", (width,), "F32"
    yield "output.weight", (VOCABULARY, width), output
    for layer in range(shape.layers):
        yield f"blk.{layer}.attn_norm.weight", (width,), "F32"
        yield f"blk.{layer}.ffn_norm.weight", (width,), "F32"
        for name, rows, columns in (
            ("attn_q", width, width),
            ("attn_k", key_width, width),
            ("attn_v", key_width, width),
            ("attn_output", width, width),
            ("ffn_gate", inner, width),
            ("ffn_up", inner, width),
            ("ffn_down", width, inner),
        ):
            yield f"blk.{layer}.{name}.weight", (rows, columns), weights
            if permuted and name in ("ffn_gate", "ffn_up"):
                yield f"blk.{layer}.{name}.perm", (columns,), "I32"


class _Rows:
    """Random tensors of any type."""

    def __init__(self, gguf: Any) -> None:
        self._gguf = gguf
        self._base = ctypes.CDLL(str(Path(find_installation().bin) / "libggml-base.so"))
        self._base.ggml_type_name.restype = ctypes.c_char_p
        self._base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._random = np.random.default_rng(0)
        self._known: dict[tuple[int, str], np.ndarray] = {}

    def tensor(self, dimensions: tuple[int, ...], kind: str) -> np.ndarray:
        if kind == "F32":
            return np.ones(dimensions, dtype=np.float32)
        key = (dimensions[-1], kind)
        if key not in self._known:
            self._known[key] = self._quantized(*key)
        known = self._known[key]
        count = int(np.prod(dimensions[:-1]))
        return np.resize(known, (count, known.shape[1]))

    def _quantized(self, columns: int, kind: str) -> np.ndarray:
        """(DISTINCT_ROWS, bytes of a row) uint8."""
        values = self._random.standard_normal((DISTINCT_ROWS, columns), dtype=np.float32) * 0.02
        if kind == "F16":
            return values.astype(np.float16).view(np.uint8)
        importance = np.ones(columns, dtype=np.float32)
        block, size = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType[kind]]
        packed = np.empty((DISTINCT_ROWS, columns // block * size), dtype=np.uint8)
        self._base.ggml_quantize_chunk(
            ctypes.c_int(self._slot(kind)),
            *(ctypes.c_void_p(array.ctypes.data) for array in (values, packed)),
            *map(ctypes.c_int64, (0, DISTINCT_ROWS, columns)),
            ctypes.c_void_p(importance.ctypes.data),
        )
        return packed

    def _slot(self, kind: str) -> int:
        """The type's number in memory, which for ternary types is not the one in files."""
        for slot in range(100):
            name = self._base.ggml_type_name(slot)
            if name is not None and name.decode().lower() == kind.lower():
                return slot
        raise ValueError(f"ggml has no type {kind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", help="of the linear layers, such as TQ2_1, Q4_0 or IQ2_XXS")
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", help="type of the output matrix; default: as the layers")
    parser.add_argument("--embeddings", help="type of the embeddings; default: as the layers")
    parser.add_argument("--no-permutation", action="store_true", help="all columns in order")
    options = parser.parse_args()
    write_model(
        options.file,
        SHAPES[options.shape],
        options.type,
        options.output or options.type,
        options.embeddings or options.type,
        not options.no_permutation,
    )


if __name__ == "__main__":
    main()
