"""The types of tensors that are not ternary, and their quantization by ggml itself.

gguf-py quantizes to some types only; the C library of the same build does the others.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
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


def teach_gguf_py(gguf: ModuleType, library: Path) -> None:
    """Gives gguf-py's K-quants, which it can only dequantize, ggml's own quantization.

    Args:
        gguf: the gguf package.
        library: libggml-base of the same build, loaded when it is needed.
    """

    @lru_cache(maxsize=1)
    def quantize_chunk() -> Any:
        function = ctypes.CDLL(str(library)).ggml_quantize_chunk
        function.restype = ctypes.c_size_t
        function.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        return function

    def quantize_blocks(cls: Any, blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
        # Blocks are quantized independently of each other: each is a row.
        source = np.ascontiguousarray(blocks, dtype=np.float32)
        packed = np.empty((len(source), cls.type_size), dtype=np.uint8)
        rows, columns = source.shape
        quantize_chunk()(cls.qtype, source.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
        return packed

    for name in STOCK_TYPES:
        if name.endswith("_k"):
            quantizer = getattr(gguf.quants, name.upper())
            quantizer.quantize_blocks = classmethod(quantize_blocks)


def stored_values(weight: Tensor, name: str, gguf: ModuleType) -> Tensor:
    """What `weight` (n, m) float32 becomes in the type `name`; float32."""
    qtype = fitting_type(name, weight.shape[1], gguf)
    packed = gguf.quants.quantize(weight.numpy(), qtype)
    return weight.new_tensor(gguf.quants.dequantize(packed, qtype))


def bits_per_weight(name: str, gguf: ModuleType) -> float:
    """Of the type `name`, scales included."""
    block, size = gguf.GGML_QUANT_SIZES[_qtype(name, gguf)]
    return 8 * size / block
