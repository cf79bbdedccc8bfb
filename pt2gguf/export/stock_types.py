"""The types of tensors that are not ternary, and their quantization by ggml itself.

gguf-py quantizes to some types only; the C library of the same build does the others.
"""

from __future__ import annotations

import ctypes
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pt2gguf.errors import Pt2Error

if TYPE_CHECKING:
    from torch import Tensor

STOCK_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "q5_0", "q4_0")
"""What --output-type, --embedding-type and --tensor-type accept."""


def parse_stock_type(name: str) -> str:
    """The canonical spelling of a type's name; raises :class:`Pt2Error` for others."""
    if name.lower() not in STOCK_TYPES:
        raise Pt2Error(f"{name!r} is not a type for this option: choose {', '.join(STOCK_TYPES)}")
    return name.lower()


def fitting_type(name: str, columns: int, gguf: ModuleType) -> Any:
    """The type `name`, or the nearest larger one whose blocks divide rows of `columns`."""
    wanted = _qtype(name, gguf)
    for qtype in (wanted, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16):
        if columns % gguf.GGML_QUANT_SIZES[qtype][0] == 0:
            return qtype
    raise AssertionError("every row length is a multiple of F16's block of one")


def _qtype(name: str, gguf: ModuleType) -> Any:
    return gguf.GGMLQuantizationType[name.upper()]


class Ggml:
    """ggml's own quantization, which gguf-py lacks for K-quants."""

    def __init__(self, gguf: ModuleType, library: Path) -> None:
        """gguf: the gguf package; library: libggml-base of the same build."""
        self._gguf = gguf
        self._path = library

    @cached_property
    def _library(self) -> ctypes.CDLL:
        return ctypes.CDLL(str(self._path))  # loaded when it is needed

    def quantize(
        self,
        rows: NDArray[np.float32],
        qtype: Any,
        importance: NDArray[np.float32] | None = None,
    ) -> NDArray[np.uint8]:
        """(n, bytes of a row), for rows (n, m), m a multiple of the type's block.

        importance: (m,), how much the squared error of a column counts.
        """
        function = self._library.ggml_quantize_chunk
        function.restype = ctypes.c_size_t
        source = np.ascontiguousarray(rows, dtype=np.float32)
        count, columns = source.shape
        block, size = self._gguf.GGML_QUANT_SIZES[qtype]
        packed = np.empty((count, columns // block * size), dtype=np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
        function(
            ctypes.c_int(qtype),
            _address(source),
            _address(packed),
            ctypes.c_int64(0),
            ctypes.c_int64(count),
            ctypes.c_int64(columns),
            None if weights is None else _address(weights),
        )
        return packed

    def dequantize(self, packed: NDArray[np.uint8], qtype: Any) -> NDArray[np.float32]:
        """(n, m), for rows (n, bytes of a row) of one of the types of _k and _0."""
        function = self._library[f"dequantize_row_{qtype.name.replace('Q', 'q', 1)}"]
        function.restype = None
        source = np.ascontiguousarray(packed)
        block, size = self._gguf.GGML_QUANT_SIZES[qtype]
        values = np.empty((len(source), source.shape[1] // size * block), dtype=np.float32)
        function(_address(source), _address(values), ctypes.c_int64(values.size))
        return values

    def teach_gguf_py(self) -> None:
        """Gives gguf-py's K-quants, which it can only dequantize, this quantization."""

        def quantize_blocks(cls: Any, blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
            return self.quantize(blocks, cls.qtype)

        for name in STOCK_TYPES:
            if name.endswith("_k"):
                quantizer = getattr(self._gguf.quants, name.upper())
                quantizer.quantize_blocks = classmethod(quantize_blocks)


def _address(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def stored_values(weight: Tensor, name: str, gguf: ModuleType) -> Tensor:
    """What `weight` (n, m) float32 becomes in the type `name`; float32."""
    qtype = fitting_type(name, weight.shape[1], gguf)
    packed = gguf.quants.quantize(weight.numpy(), qtype)
    return weight.new_tensor(gguf.quants.dequantize(packed, qtype))


def bits_per_weight(name: str, gguf: ModuleType) -> float:
    """Of the type `name`, scales included."""
    block, size = gguf.GGML_QUANT_SIZES[_qtype(name, gguf)]
    return 8 * size / block
