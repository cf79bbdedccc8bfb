"""Writing the GGUF file: llama.cpp's converter, with rounded weights in place of some tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pt2gguf.blocks import BLOCK_SIZE, BlockType
from pt2gguf.errors import Pt2Error
from pt2gguf.export.llama_cpp import LlamaCpp, converted, converter_name
from pt2gguf.export.output import complete_file
from pt2gguf.export.rows import RowSource, numbered_elements, read_rows
from pt2gguf.export.stock_types import fitting_type
from pt2gguf.ternary import StockWeight, TernaryWeight

FORMAT_VERSION = 1
"""pt2.version; ``PT2_VERSION`` in ggml-pt2.h."""


class WeightSource(Protocol):
    """The weights of a model that were rounded for the file, read when they are needed."""

    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """The shape (n, m) of every such weight, by checkpoint name."""

    def stock_type(self, name: str) -> str | None:
        """The type of one of them; None for ternary ones."""

    def weight(self, name: str) -> TernaryWeight | StockWeight:
        """One of them, with its rows and columns in the order they are to be stored in."""

    def is_reordered(self, name: str) -> bool:
        """Whether that order is not the checkpoint's, even with the weight's permutation undone."""


@dataclass(frozen=True)
class ExportOptions:
    """How a file is written.

    block_type: of the ternary tensors; output_type, embedding_type: stock types of these two;
    metadata: the pt2.* keys that say how it was made. Matrices that were not rounded are F16 unless
    the converter or `tensor_type` wants otherwise.
    """

    block_type: BlockType
    output_type: str
    embedding_type: str
    tensor_type: Callable[[str, str], str | None]
    """(checkpoint name, GGUF name) -> the stock type the user asked for, if any."""
    metadata: Mapping[str, str | int | float]


def write_gguf(
    checkpoint: Path,
    output: Path,
    source: WeightSource,
    options: ExportOptions,
    llama_cpp: LlamaCpp,
) -> None:
    """Converts `checkpoint` to `output` with the weights of `source` in place of its own.

    The file appears under its name only when it is complete; an existing one is replaced.

    Raises:
        Pt2Error: the architecture is unknown to the converter, or does to a rounded weight more
            than moving its rows, or the file cannot be written.
    """
    converter_class = _with_rounded_weights(
        llama_cpp.model_class(checkpoint), source, options, llama_cpp.gguf
    )
    with complete_file(output) as part, torch.inference_mode():
        converter_class(checkpoint, llama_cpp.gguf.LlamaFileType.MOSTLY_F16, part).write()


def _with_rounded_weights(
    base: type[Any], source: WeightSource, options: ExportOptions, gguf: Any
) -> type[Any]:
    """A subclass of the converter's class for an architecture that knows the rounded weights."""
    shapes = source.shapes()
    names = list(shapes)
    shapes_by_number = {number: shapes[name] for number, name in enumerate(names)}
    number_of = {converter_name(base, name): number for number, name in enumerate(names)}
    block_type = options.block_type

    class RoundedModel(base):  # type: ignore[misc]
        model_arch = base.model_arch  # the converter wants it on every class

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._reordered: list[str] = []
            self._row_lengths: dict[str, int] = {}
            self._written: set[str] = set()

        def modify_tensors(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
            for new_name, tensor in super().modify_tensors(*args, **kwargs):
                self._row_lengths[new_name] = tensor.shape[-1] if tensor.dim() else 1
                yield new_name, tensor

        def get_tensors(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in super().get_tensors():
                number = number_of.get(name)
                if number is None:
                    yield name, tensor
                elif names[number] not in self._written:  # some converters read all tensors twice
                    self._written.update(self._add_rounded(name, number))
            missing = shapes.keys() - self._written
            if missing:
                raise Pt2Error(
                    f"llama.cpp's converter leaves out {len(missing)} of the rounded weights, such "
                    f"as {min(missing)}: keep them in F16 with --tensor-type"
                )

        def _add_rounded(self, name: str, number: int) -> set[str]:
            """Sends the weight through the converter; returns those that arrived in tensors."""
            arrived_names: set[str] = set()
            numbered = numbered_elements(number, shapes_by_number[number])
            for new_name, arrived in converted(self, name, numbered):
                rows = read_rows(new_name, arrived, shapes_by_number)
                origins = [names[n] for n in _numbers(rows)]
                self._add_rows(new_name, rows, _common_type(new_name, source, origins))
                self._add_perm(new_name, origins)
                if any(map(source.is_reordered, origins)):
                    self._reordered.append(new_name)
                arrived_names.update(origins)
            return arrived_names

        def _add_rows(self, new_name: str, rows: RowSource, stock_type: str | None) -> None:
            qtype = gguf.GGMLQuantizationType[(stock_type or block_type.name).upper()]
            block, size = gguf.GGML_QUANT_SIZES[qtype]
            shape = (*rows.shape[:-1], rows.shape[-1] // block * size)
            packed = gguf.LazyNumpyTensor(
                meta=gguf.LazyNumpyTensor.meta_with_dtype_and_shape(np.uint8, shape),
                args=(),
                func=partial(_pack_rows, source, names, rows, block_type, shape),
            )
            self.gguf_writer.add_tensor(new_name, packed, raw_dtype=qtype)

        def _add_perm(self, new_name: str, origins: list[str]) -> None:
            perm = _common_perm(new_name, [source.weight(name) for name in origins])
            if perm is not None:
                perm_name = new_name.removesuffix(".weight") + ".perm"
                self.gguf_writer.add_tensor(perm_name, perm.numpy().astype(np.int32))

        def tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
            asked = options.tensor_type(name, new_name)
            if asked is None and self.match_model_tensor_name(
                new_name, gguf.MODEL_TENSOR.TOKEN_EMBD, bid
            ):
                asked = options.embedding_type
            if asked is None and self.match_model_tensor_name(
                new_name, gguf.MODEL_TENSOR.OUTPUT, bid
            ):
                asked = options.output_type
            if asked is None:
                return super().tensor_force_quant(name, new_name, bid, n_dims)
            return fitting_type(asked, self._row_lengths[new_name], gguf)

        def write(self) -> None:
            """As the converter's own, without a progress bar in files and pipes."""
            self.prepare_tensors()
            self.prepare_metadata(vocab_only=False)
            self.gguf_writer.write_header_to_file(path=self.fname_out)
            self.gguf_writer.write_kv_data_to_file()
            self.gguf_writer.write_tensors_to_file(progress=sys.stderr.isatty())
            self.gguf_writer.close()

        def prepare_metadata(self, vocab_only: bool) -> None:
            self.ftype = gguf.LlamaFileType[f"MOSTLY_{block_type.name.upper()}"]
            super().prepare_metadata(vocab_only)
            self.gguf_writer.add_uint32("pt2.version", FORMAT_VERSION)
            self.gguf_writer.add_uint32("pt2.block_size", BLOCK_SIZE)
            if self._reordered:  # an adapter for the original model does not fit these
                self.gguf_writer.add_array("pt2.reordered", self._reordered)
            for key, value in options.metadata.items():
                _add_value(self.gguf_writer, f"pt2.{key}", value)

    return RoundedModel


def _numbers(rows: RowSource) -> list[int]:
    return [int(number) for number in rows.weight.unique()]


def _pack_rows(
    source: WeightSource,
    names: list[str],
    rows: RowSource,
    block_type: BlockType,
    shape: tuple[int, ...],
) -> NDArray[np.uint8]:
    """The bytes of one GGUF tensor in this shape, its rows gathered from the source weights."""
    packed = np.empty((len(rows.row), shape[-1]), dtype=np.uint8)
    for number in _numbers(rows):
        weight = source.weight(names[number])
        arrived = (rows.weight == number).numpy()
        origin = rows.row[rows.weight == number]
        packed[arrived] = (
            weight.packed[origin].numpy()
            if isinstance(weight, StockWeight)
            else block_type.pack(
                weight.alpha[origin].numpy(),
                weight.mu[origin].numpy(),
                weight.digits[origin].numpy(),
            )
        )
    return packed.reshape(shape)


def _common_type(tensor: str, source: WeightSource, origins: Iterable[str]) -> str | None:
    """The stock type of the weights that one GGUF tensor holds, which must be one."""
    types = {source.stock_type(name) for name in origins}
    if len(types) > 1:
        found = ", ".join(sorted(kind or "ternary" for kind in types))
        raise Pt2Error(
            f"the parts of tensor {tensor} are to be of different types ({found}), and a file has "
            f"one for each tensor: give all of them the same --tensor-type"
        )
    return types.pop()


def _common_perm(name: str, weights: Iterable[TernaryWeight | StockWeight]) -> Tensor | None:
    """The column order of the weights that one GGUF tensor holds, which must be one."""
    perms = [None if isinstance(weight, StockWeight) else weight.perm for weight in weights]
    first = perms[0]
    for perm in perms[1:]:
        if (perm is None) != (first is None) or (
            perm is not None and first is not None and not torch.equal(perm, first)
        ):
            raise Pt2Error(
                f"the parts of tensor {name} have different column orders, and a file has one for "
                "each tensor: convert with --no-ssr"
            )
    return first


def _add_value(writer: Any, key: str, value: str | int | float) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)
