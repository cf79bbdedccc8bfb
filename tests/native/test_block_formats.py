"""pt2gguf.blocks and ggml-pt2.c agree byte for byte and bit for bit."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from pt2gguf.blocks import BLOCK_SIZE, TQ1_1, TQ2_1, BlockType

BLOCK_TYPES = pytest.mark.parametrize("block_type", [TQ1_1, TQ2_1], ids=lambda t: t.name)
FP16_EXTREMES = np.array(
    [0.0, -0.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), 2.0**-14, 1.0, -1.0], dtype=np.float16
)


def random_rows(rng: np.random.Generator, rows: int, blocks: int):
    alpha = rng.standard_normal((rows, blocks)).astype(np.float16)
    mu = rng.standard_normal((rows, blocks)).astype(np.float16)
    digits = rng.integers(-1, 2, (rows, blocks * BLOCK_SIZE), dtype=np.int8)
    return alpha, mu, digits


def dequantize_in_c(ggml: ctypes.CDLL, block_type: BlockType, packed: np.ndarray) -> np.ndarray:
    columns = packed.shape[1] // block_type.block_bytes * BLOCK_SIZE
    weights = np.empty((len(packed), columns), dtype=np.float32)
    dequantize = getattr(ggml, f"dequantize_row_{block_type.name}")
    dequantize(
        packed.ctypes.data_as(ctypes.c_void_p),
        weights.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(weights.size),
    )
    return weights


@BLOCK_TYPES
@pytest.mark.parametrize("blocks", [1, 3, 16])
def test_unpacking_gives_back_what_was_packed(block_type, blocks):
    alpha, mu, digits = random_rows(np.random.default_rng(), 5, blocks)
    packed = block_type.pack(alpha, mu, digits)
    assert packed.shape == (5, blocks * block_type.block_bytes)
    for original, unpacked in zip((alpha, mu, digits), block_type.unpack(packed), strict=True):
        np.testing.assert_array_equal(original, unpacked)


@BLOCK_TYPES
def test_numpy_and_c_dequantize_alike(block_type, ggml):
    packed = block_type.pack(*random_rows(np.random.default_rng(), 7, 9))
    np.testing.assert_array_equal(
        block_type.dequantize(packed).view(np.uint32),
        dequantize_in_c(ggml, block_type, packed).view(np.uint32),
    )


@BLOCK_TYPES
def test_numpy_and_c_dequantize_extreme_scales_alike(block_type, ggml):
    alpha, mu = (grid.ravel()[:, None] for grid in np.meshgrid(FP16_EXTREMES, FP16_EXTREMES))
    digits = np.random.default_rng().integers(-1, 2, (len(alpha), BLOCK_SIZE), dtype=np.int8)
    packed = block_type.pack(alpha, mu, digits)
    np.testing.assert_array_equal(
        block_type.dequantize(packed).view(np.uint32),
        dequantize_in_c(ggml, block_type, packed).view(np.uint32),
    )


def test_every_base3_byte_holds_its_digits():
    values = np.arange(243)
    digits = np.zeros((243, 128), dtype=np.uint8)
    digits[:, 7 + 24 * np.arange(5)] = values[:, None] // 3 ** np.arange(4, -1, -1) % 3
    packed = TQ1_1.pack_digits(digits)
    np.testing.assert_array_equal(packed[:, 7], -(-values * 256 // 243))
    np.testing.assert_array_equal(TQ1_1.unpack_digits(packed), digits)


def test_layouts_are_the_published_ones():
    """Once a file exists, these never change: bytes written out by hand."""
    digits = np.zeros((1, 128), dtype=np.int8) - 1
    digits[0, [0, 33, 66, 99]] = [0, 1, 0, 1]
    one, two = np.float16([[1.0]]), np.float16([[2.0]])
    packed = TQ2_1.pack(one, two, digits)[0]
    assert packed[:4].tobytes() == b"\x00\x3c\x00\x40"
    assert packed[4:8].tolist() == [1, 2 << 2, 1 << 4, 2 << 6]
    assert not packed[8:].any()

    digits = np.zeros((1, 128), dtype=np.int8) - 1
    digits[0, [0, 24, 121, 127]] = [1, 0, 1, 0]
    packed = TQ1_1.pack(one, two, digits)[0]
    assert packed[:4].tobytes() == b"\x00\x3c\x00\x40"
    assert packed[4] == -(-(2 * 81 + 1 * 27) * 256 // 243)
    assert packed[4 + 24] == 0
    assert packed[4 + 25] == -(-(2 * 81 + 1 * 3) * 256 // 243)
    assert not packed[5:28].any()


@BLOCK_TYPES
def test_c_packs_what_numpy_unpacks(block_type, ggml):
    """Weights that lie on a grid survive the C quantizer, and its bytes repack to themselves."""
    rng = np.random.default_rng()
    alpha, mu, digits = random_rows(rng, 4, 6)
    alpha = np.abs(alpha) + np.float16(0.25)
    weights = block_type.dequantize(block_type.pack(alpha, mu, digits))
    packed = quantize_in_c(ggml, block_type, weights)
    np.testing.assert_array_equal(block_type.pack(*block_type.unpack(packed)), packed)
    np.testing.assert_array_equal(block_type.unpack(packed)[2], digits)
    # The fitted grid is within float16's rounding of the one that the weights were made from.
    step = 2.0**-11 * (np.abs(weights).max() + 1)
    np.testing.assert_allclose(block_type.dequantize(packed), weights, rtol=0, atol=2 * step)


def quantize_in_c(
    ggml: ctypes.CDLL,
    block_type: BlockType,
    weights: np.ndarray,
    importance: np.ndarray | None = None,
) -> np.ndarray:
    rows, columns = weights.shape
    source = np.ascontiguousarray(weights, dtype=np.float32)
    packed = np.empty((rows, columns // BLOCK_SIZE * block_type.block_bytes), dtype=np.uint8)
    quantize = getattr(ggml, f"quantize_{block_type.name}")
    quantize.restype = ctypes.c_size_t
    size = quantize(
        source.ctypes.data_as(ctypes.c_void_p),
        packed.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        None if importance is None else importance.ctypes.data_as(ctypes.c_void_p),
    )
    assert size == packed.nbytes
    return packed


def weighted_error(weights: np.ndarray, fitted: np.ndarray, importance: np.ndarray) -> float:
    return float((importance * (weights.astype(np.float64) - fitted) ** 2).sum())


@BLOCK_TYPES
def test_importance_lowers_the_weighted_error(block_type, ggml):
    rng = np.random.default_rng()
    weights = rng.standard_normal((64, 512)).astype(np.float32)
    importance = np.exp(3 * rng.standard_normal(512)).astype(np.float32)
    plain = block_type.dequantize(quantize_in_c(ggml, block_type, weights))
    weighted = block_type.dequantize(quantize_in_c(ggml, block_type, weights, importance))
    assert weighted_error(weights, weighted, importance) < weighted_error(
        weights, plain, importance
    )


@BLOCK_TYPES
def test_degenerate_weights_quantize_exactly(block_type, ggml):
    constant = np.repeat(np.float32([0.0, 1.5, -65504.0, 2.0**-24]), BLOCK_SIZE).reshape(4, -1)
    one_outlier = np.zeros((1, BLOCK_SIZE), dtype=np.float32)
    one_outlier[0, 77] = 3.0
    no_importance = np.zeros(BLOCK_SIZE, dtype=np.float32)
    for weights in (constant, one_outlier):
        for importance in (None, no_importance):
            packed = quantize_in_c(ggml, block_type, weights, importance)
            np.testing.assert_array_equal(block_type.dequantize(packed), weights)


@BLOCK_TYPES
def test_validation_finds_damaged_blocks(block_type, ggml):
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    number = {"tq1_1": 43, "tq2_1": 44}[block_type.name]

    def is_valid(packed: np.ndarray) -> bool:
        data = packed.ctypes.data_as(ctypes.c_void_p)
        return ggml.ggml_validate_row_data(number, data, ctypes.c_size_t(packed.nbytes))

    packed = block_type.pack(*random_rows(np.random.default_rng(), 1, 4))
    assert is_valid(packed)
    for offset in (0, 2):  # the high byte of alpha, of mu: an infinity
        damaged = packed.copy()
        damaged[0, block_type.block_bytes + offset : block_type.block_bytes + offset + 2] = 0, 0x7C
        assert not is_valid(damaged)
    if block_type is TQ2_1:
        damaged = packed.copy()
        damaged[0, 20] |= 3
        assert not is_valid(damaged)
