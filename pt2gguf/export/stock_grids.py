"""Stock types whose digits can be chosen one by one, as `pt2gguf.ternary.stock` wants them.

ggml packs each of these types in its own way. Rather than knowing these, we flip every bit of a
block and see which values it changes: one that changes a single value belongs to that value's
digit, by how much tells its place, and all others are scales.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pt2gguf.export.stock_types import Ggml
from pt2gguf.ternary import CHUNK

GRIDS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q5_0")
"""The stock types whose values are low + step * digit, digits counted from 0."""

Bytes = NDArray[np.uint8]


class GgmlGrid:
    """One of GRIDS; a `StockGrid`."""

    def __init__(self, name: str, gguf: ModuleType, ggml: Ggml) -> None:
        self.name = name
        self._type = gguf.GGMLQuantizationType[name.upper()]
        self._ggml = ggml
        block, size = gguf.GGML_QUANT_SIZES[self._type]
        self.chunk_bytes = CHUNK // block * size
        self._find_digits()

    def _find_digits(self) -> None:
        ones = np.random.default_rng(0).uniform(1, 2, (1, CHUNK))  # no scale is zero
        signs = np.tile([1, -1], CHUNK // 2)
        chunk = self._quantize((ones * signs).astype(np.float32), None)
        bits = np.unpackbits(chunk, bitorder="little")
        flipped = np.repeat(bits[None], len(bits), axis=0)
        flipped[np.diag_indices(len(bits))] ^= 1
        changes = self._dequantize(np.packbits(flipped, axis=1, bitorder="little"))
        changes = np.abs(np.nan_to_num(changes - self._dequantize(chunk), nan=np.inf))
        of_digits = np.flatnonzero((changes != 0).sum(axis=1) == 1)
        columns = changes[of_digits].argmax(axis=1)
        sizes = changes[of_digits, columns]
        # Bits of each digit, (CHUNK, bits of a digit), the lowest first.
        places = of_digits[np.lexsort((sizes, columns))].reshape(CHUNK, -1)
        self._bits = places.shape[1]
        self.top = 2**self._bits - 1
        is_digit = np.zeros(len(bits), dtype=np.uint8)
        is_digit[places] = 1
        self._mask = np.packbits(is_digit, bitorder="little")
        # For each bit of a chunk, where it is found among the bits of all digits.
        self._origins = np.zeros(len(bits), dtype=np.int64)
        self._origins[places] = np.arange(places.size).reshape(places.shape)

    def fit(self, W: Tensor, importance: Tensor) -> Tensor:
        weights = importance.numpy()
        return _in_threads(lambda rows: self._quantize(rows, weights), W.numpy())

    def levels(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        low = _in_threads(lambda rows: self._dequantize(rows & ~self._mask), packed.numpy())
        high = _in_threads(lambda rows: self._dequantize(rows | self._mask), packed.numpy())
        return low, (high - low) / self.top

    def with_digits(self, packed: Tensor, digits: Tensor) -> Tensor:
        def replaced(rows: Bytes) -> Bytes:
            scales, wanted = rows[:, : self.chunk_bytes], rows[:, self.chunk_bytes :]
            bits = np.unpackbits(wanted[..., None], axis=2, count=self._bits, bitorder="little")
            bits = bits.reshape(len(rows), -1).take(self._origins, axis=1)
            return scales & ~self._mask | np.packbits(bits, axis=1, bitorder="little") & self._mask

        return _in_threads(replaced, torch.cat([packed, digits], dim=1).numpy())

    def values(self, packed: Tensor) -> Tensor:
        return _in_threads(self._dequantize, packed.numpy())

    def _quantize(self, rows: NDArray[np.float32], importance: NDArray[np.float32] | None) -> Bytes:
        return self._ggml.quantize(rows, self._type, importance)

    def _dequantize(self, packed: Bytes) -> NDArray[np.float32]:
        return self._ggml.dequantize(packed, self._type)


def _in_threads(function: Callable[[NDArray], NDArray], rows: NDArray) -> Tensor:
    """The function's results for parts of `rows`, as many parts as PyTorch has threads."""
    parts = np.array_split(rows, min(torch.get_num_threads(), len(rows)))
    if len(parts) == 1:
        return torch.from_numpy(function(rows))
    with ThreadPoolExecutor(len(parts)) as threads:
        return torch.from_numpy(np.concatenate(list(threads.map(function, parts))))
