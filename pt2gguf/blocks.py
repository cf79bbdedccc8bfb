"""The two GGUF tensor types: 128 ternary weights and their grid, packed into bytes.

Both hold ``w = alpha * t + mu`` with t in {-1, 0, 1} for 128 consecutive columns of a row: two
little-endian float16, alpha and mu, then the digits ``u = t + 1``. The layouts are those of
``ggml_patches/src/ggml/ggml-pt2.h``, and tests/native compares the two byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZE = 128
"""Columns of a row that share one alpha and one mu."""

U8 = NDArray[np.uint8]
I8 = NDArray[np.int8]
F16 = NDArray[np.float16]
F32 = NDArray[np.float32]


def pack_digits_2bit(digits: U8) -> U8:
    """(..., 128) digits 0..2 -> (..., 32): bits 2k..2k+1 of byte j are column 32k + j."""
    planes = digits.reshape(*digits.shape[:-1], 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    return np.bitwise_or.reduce(planes << shifts[:, None], axis=-2)


def unpack_digits_2bit(packed: U8) -> U8:
    """(..., 32) -> (..., 128), the inverse of :func:`pack_digits_2bit`."""
    planes = [packed >> (2 * k) & np.uint8(3) for k in range(4)]
    return np.concatenate(planes, axis=-1)


_POWERS = 3 ** np.arange(4, -1, -1, dtype=np.uint16)  # the first digit is the most significant


def pack_digits_base3(digits: U8) -> U8:
    """(..., 128) digits 0..2 -> (..., 26): ceil(256/243 * value), value of five base-3 digits.

    Digit k of byte j < 24 is column 24k + j; digit k < 4 of byte 24 + i is column 120 + 2k + i.
    """
    wide = digits.astype(np.uint16)
    main = wide[..., :120].reshape(*digits.shape[:-1], 5, 24)
    tail = wide[..., 120:].reshape(*digits.shape[:-1], 4, 2)
    main_value = (main * _POWERS[:, None]).sum(axis=-2, dtype=np.uint16)
    tail_value = (tail * _POWERS[:4, None]).sum(axis=-2, dtype=np.uint16)
    value = np.concatenate([main_value, tail_value], axis=-1)
    return ((value * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8)


def unpack_digits_base3(packed: U8) -> U8:
    """(..., 26) -> (..., 128), the inverse of :func:`pack_digits_base3`."""
    planes = []
    fraction = packed
    for _ in range(5):
        planes.append((fraction.astype(np.uint16) * np.uint16(3) >> 8).astype(np.uint8))
        fraction = fraction * np.uint8(3)  # modulo 256 drops the digit that was read
    main = [plane[..., :24] for plane in planes]
    tail = [plane[..., 24:] for plane in planes[:4]]
    return np.concatenate(main + tail, axis=-1)


@dataclass(frozen=True)
class BlockType:
    """One of the two tensor types."""

    name: str
    file_number: int
    """The number of the type in GGUF files; see ``PT2_FILE_TYPE_*`` in ggml-pt2.h."""
    block_bytes: int
    pack_digits: Callable[[U8], U8]
    unpack_digits: Callable[[U8], U8]

    @property
    def bits_per_weight(self) -> float:
        return self.block_bytes * 8 / BLOCK_SIZE

    def pack(self, alpha: F16, mu: F16, digits: I8) -> U8:
        """Packs rows.

        Args:
            alpha, mu: (n, m/128) float16.
            digits: (n, m) int8, every element -1, 0 or 1.

        Returns:
            (n, m/128 * block_bytes) uint8.
        """
        rows, columns = digits.shape
        blocks = (digits + np.int8(1)).astype(np.uint8).reshape(rows, -1, BLOCK_SIZE)
        packed = np.empty((rows, columns // BLOCK_SIZE, self.block_bytes), dtype=np.uint8)
        packed[..., 0:2] = alpha.astype("<f2")[..., None].view(np.uint8)
        packed[..., 2:4] = mu.astype("<f2")[..., None].view(np.uint8)
        packed[..., 4:] = self.pack_digits(blocks)
        return packed.reshape(rows, -1)

    def unpack(self, packed: U8) -> tuple[F16, F16, I8]:
        """(n, bytes) uint8 -> alpha, mu (n, m/128) float16 and digits (n, m) int8."""
        blocks = np.ascontiguousarray(packed).reshape(len(packed), -1, self.block_bytes)
        grid = np.ascontiguousarray(blocks[..., :4]).view("<f2")
        digits = self.unpack_digits(blocks[..., 4:]).astype(np.int8) - np.int8(1)
        return grid[..., 0], grid[..., 1], digits.reshape(len(packed), -1)

    def dequantize(self, packed: U8) -> F32:
        """(n, bytes) uint8 -> (n, m) float32, alpha*t + mu rounded once as in ggml."""
        alpha, mu, digits = self.unpack(packed)
        t = digits.reshape(*alpha.shape, BLOCK_SIZE).astype(np.float32)
        weights = alpha.astype(np.float32)[..., None] * t + mu.astype(np.float32)[..., None]
        return weights.reshape(digits.shape)


TQ1_1 = BlockType("tq1_1", 0x50543201, 30, pack_digits_base3, unpack_digits_base3)
TQ2_1 = BlockType("tq2_1", 0x50543202, 36, pack_digits_2bit, unpack_digits_2bit)
BLOCK_TYPES = {block_type.name: block_type for block_type in (TQ2_1, TQ1_1)}
