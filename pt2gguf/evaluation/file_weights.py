"""The weights of a GGUF file under the names, and in the order, of the checkpoint it was made from.

llama.cpp's converter renames, reorders, splits and stacks tensors, each architecture in its own
way. Rather than knowing these, we send numbered elements through the converter, read off where
each one arrives, and carry the file's values back along the same way.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pt2gguf.blocks import BLOCK_TYPES
from pt2gguf.errors import Pt2Error
from pt2gguf.export.llama_cpp import LlamaCpp, converted, converter_name
from pt2gguf.model import Checkpoint

# Of values that the converter computed from the checkpoint's, and stored in float32 or float16.
STORED_PRECISION = {"F32": 1e-6, "F16": 1e-3}


def open_gguf(path: Path, gguf: ModuleType) -> Any:
    """A reader of the file `path`; raises :class:`Pt2Error` for what is not GGUF."""
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise Pt2Error(f"{path} is not a readable GGUF file ({error}): check the name") from None


def dequantize(tensor: Any, gguf: ModuleType) -> Tensor:
    """The values of a tensor of a GGUF reader, float32, last dimension along the rows."""
    block_type = BLOCK_TYPES.get(tensor.tensor_type.name.lower())
    if block_type is None:
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise Pt2Error(
                f"tensor {tensor.name} is of type {tensor.tensor_type.name}, which llama.cpp's "
                "gguf-py cannot dequantize: evaluate with --engine llama.cpp"
            ) from None
    else:
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        values = block_type.dequantize(rows).reshape(*tensor.data.shape[:-1], -1)
    return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the file is mapped


def bits_per_weight(reader: Any) -> float:
    """The mean size of a weight in the decoder's matrices.

    Matrices are what has rows in the blocks (``blk.``); a matrix's column order counts as part of
    it. Embeddings, output head, norms and biases are left out.
    """
    matrices = {t.name for t in reader.tensors if t.name.startswith("blk.") and len(t.shape) > 1}
    orders = {name.removesuffix(".weight") + ".perm" for name in matrices}
    size = sum(int(t.n_bytes) for t in reader.tensors if t.name in matrices | orders)
    return 8 * size / sum(int(t.n_elements) for t in reader.tensors if t.name in matrices)


def require_same_vocabulary(
    checkpoint: Checkpoint, path: Path, reader: Any, llama_cpp: LlamaCpp
) -> None:
    """Raises :class:`Pt2Error` unless the file at `path` is of the checkpoint's vocabulary."""
    converter = llama_cpp.converter(checkpoint.path)
    converter.set_vocab()
    key = llama_cpp.gguf.Keys.Tokenizer.LIST
    expected = next(data[key] for data in converter.gguf_writer.kv_data if key in data)
    tokens: list[Any] = expected.value
    field = reader.get_field(key)
    stored: list[str] = [] if field is None else field.contents()
    if [_as_text(token) for token in tokens] != stored:
        raise Pt2Error(
            f"the vocabulary of {path} ({len(stored)} tokens) is not that of {checkpoint.path} "
            f"({len(tokens)} tokens): give the checkpoint that the file was made from as --model"
        )


def read_file_weights(
    checkpoint: Checkpoint, path: Path, reader: Any, llama_cpp: LlamaCpp
) -> dict[str, Tensor]:
    """The file's weights, float32, by checkpoint name, in the checkpoint's shapes and order.

    Column permutations are undone. Rows of gate and up projections that were reordered together
    with the columns of the down projection stay so, as the function is the same. What is missing in
    the result is the same as in the checkpoint.

    Args:
        path, reader: the file.

    Raises:
        Pt2Error: the file was made from another model, or the converter computes a tensor in a way
            that cannot be undone and the file's values are not the checkpoint's.
    """
    converter = llama_cpp.converter(checkpoint.path)
    values_of = _FileValues(path, reader, llama_cpp.gguf)
    stored = {converter_name(converter, name): name for name in checkpoint.tensors}
    with torch.no_grad():
        shapes = {name: tuple(t.shape) for name, t in converter.get_tensors()}
        weights = _WeightsInProgress(shapes)
        for name in shapes:
            for new_name, arrived in converted(converter, name, weights.numbered(name)):
                values = values_of(new_name, arrived.shape)
                if not weights.put(name, arrived, values):
                    original = checkpoint.read(stored[name])
                    _require_unchanged(name, original, new_name, converter, values_of)
    values_of.require_all_used()
    return {stored[name]: weight for name, weight in weights.complete(path).items()}


class _FileValues:
    """Dequantizes tensors by name, with their columns in the original order."""

    def __init__(self, path: Path, reader: Any, gguf: ModuleType) -> None:
        self._path = path
        self._gguf = gguf
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._unused = {t.name for t in reader.tensors if len(t.shape) > 1}

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors.get(name)
        stored = None if tensor is None else tuple(map(int, reversed(tensor.shape)))
        # A vector may have lost dimensions of length one.
        if tensor is None or stored is None or _squeezed(stored) != _squeezed(shape):
            raise Pt2Error(
                f"{self._path} has {'no' if stored is None else f'shape {stored} for'} tensor "
                f"{name}, where the checkpoint asks for {tuple(shape)}: give the checkpoint that "
                "the file was made from as --model"
            )
        self._unused.discard(name)
        values = dequantize(tensor, self._gguf).reshape(shape)
        perm = self._tensors.get(name.removesuffix(".weight") + ".perm")
        if perm is None:
            return values
        original = torch.empty_like(values)
        original[..., torch.from_numpy(perm.data.astype(np.int64))] = values
        return original

    def precision(self, name: str) -> float | None:
        """The relative precision of the values of a tensor, if they are stored as they were."""
        return STORED_PRECISION.get(self._tensors[name].tensor_type.name)

    def require_all_used(self) -> None:
        if self._unused:
            raise Pt2Error(
                f"{self._path} holds tensors that do not come from the checkpoint, such as "
                f"{min(self._unused)}: give the checkpoint that the file was made from as --model"
            )


class _WeightsInProgress:
    """The checkpoint's weights, which arrive in pieces.

    Elements are numbered through all tensors in float64: exact up to 2^53, and unlike integers no
    floating point constant that a converter adds changes their type.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        starts = accumulate(self._sizes.values(), initial=0)
        self._starts = dict(zip(shapes, starts, strict=False))  # one more: the end
        self._weights: dict[str, Tensor] = {}
        self._missing: dict[str, int] = {}

    def numbered(self, name: str) -> Tensor:
        start, size = self._starts[name], self._sizes[name]
        return torch.arange(start, start + size, dtype=torch.float64).view(self._shapes[name])

    def put(self, sent: str, arrived: Tensor, values: Tensor) -> bool:
        """Puts values where what arrived in their place came from.

        sent: the tensor that was sent last. False, with nothing done, where what arrived is neither
        an order of elements nor the tensor plus a constant.
        """
        values, number = values.flatten(), arrived.flatten()
        if number.dtype != torch.float64:
            return False
        offset = number[:1] - self._starts[sent]
        if arrived.shape == self._shapes[sent] and bool(
            (number - offset == self.numbered(sent).flatten()).all()
        ):
            self._fill(sent, slice(None), values - offset.float())
            return True
        if bool((number != number.floor()).any()):
            return False
        for name in self._names_between(int(number.min()), int(number.max())):
            start = self._starts[name]
            inside = (number >= start) & (number < start + self._sizes[name])
            self._fill(name, (number[inside] - start).long(), values[inside])
        return True

    def complete(self, path: Path) -> dict[str, Tensor]:
        """All weights of which something has arrived; raises Pt2Error unless all of each has."""
        for name, missing in self._missing.items():
            if missing or not bool(torch.isfinite(self._weights[name]).all()):
                raise Pt2Error(
                    f"the weight {name} cannot be traced back from {path} in full: evaluate with "
                    "--engine llama.cpp"
                )
        return self._weights

    def _names_between(self, low: int, high: int) -> list[str]:
        """The tensors that the numbers from `low` to `high` belong to."""
        names, starts = list(self._starts), list(self._starts.values())
        first = bisect.bisect_right(starts, low) - 1
        return names[max(first, 0) : bisect.bisect_right(starts, high)]

    def _fill(self, name: str, where: Any, values: Tensor) -> None:
        if name not in self._weights:
            self._weights[name] = torch.full(self._shapes[name], torch.nan)
            self._missing[name] = self._sizes[name]
        self._weights[name].view(-1)[where] = values
        self._missing[name] -= len(values)


def _require_unchanged(
    name: str,
    original: Tensor,
    new_name: str,
    converter: Any,
    values_of: _FileValues,
) -> None:
    """Raises Pt2Error unless the converter makes the file's values of the checkpoint's."""
    for computed_name, computed in converted(converter, name, original):
        precision = values_of.precision(computed_name)
        stored = values_of(computed_name, tuple(computed.shape))
        if precision is None or not torch.allclose(computed.float(), stored, precision, precision):
            raise Pt2Error(
                f"tensor {new_name} of the file is not what llama.cpp's converter computes from "
                f"{name}, and this computation cannot be undone: evaluate with --engine llama.cpp"
            )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _as_text(token: Any) -> str:
    return token.decode("utf-8", errors="replace") if isinstance(token, bytes) else str(token)
