"""The CPU kernels of every instruction set against the plain ones and against float64."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from pt2gguf.blocks import BLOCK_SIZE, TQ1_1, TQ2_1, BlockType

BLOCK_TYPES = pytest.mark.parametrize("block_type", [TQ1_1, TQ2_1], ids=lambda t: t.name)
LENGTHS = pytest.mark.parametrize("blocks", [1, 2, 3, 5, 16, 33, 140])
GROUP = 32
Q8_T = np.dtype(
    [("qs", np.int8, BLOCK_SIZE), ("d", np.float32, BLOCK_SIZE // GROUP), ("sum", np.float32)]
)


def address(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def quantize_activations(kernels, x: np.ndarray, suffix: str = "") -> np.ndarray:
    blocks = np.empty(x.size // BLOCK_SIZE, dtype=Q8_T)
    quantize = getattr(kernels.library, f"quantize_row_q8_t{suffix}")
    quantize(address(x), address(blocks), ctypes.c_int64(x.size))
    return blocks


def dot(
    kernels, block_type: BlockType, packed: np.ndarray, q: np.ndarray, suffix: str = ""
) -> float:
    result = np.empty(1, dtype=np.float32)
    vec_dot = getattr(kernels.library, f"ggml_vec_dot_{block_type.name}_q8_t{suffix}")
    vec_dot.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p, ctypes.c_size_t] * 3,
        ctypes.c_int,
    ]
    n = q.size * BLOCK_SIZE
    vec_dot(n, address(result), 0, address(packed), 0, address(q), 0, 1)
    return float(result[0])


def exact_dot(block_type: BlockType, packed: np.ndarray, q: np.ndarray) -> tuple[float, float]:
    """The float64 result, and the sum of the absolute values of its terms."""
    alpha, mu, digits = block_type.unpack(packed[None])
    t = digits.reshape(-1, BLOCK_SIZE).astype(np.float64)
    weights = alpha[0][:, None].astype(np.float64) * t + mu[0][:, None].astype(np.float64)
    x = restore(q)
    # The kernels add alpha*u and (mu - alpha) separately, so these terms are what rounds.
    a, m = np.abs(alpha[0]).astype(np.float64), np.abs(mu[0]).astype(np.float64)
    magnitude = ((2 * a + (a + m))[:, None] * np.abs(x)).sum()
    return float((weights * x).sum()), float(magnitude)


def restore(q: np.ndarray) -> np.ndarray:
    """(blocks, 128) float64: what the activations stand for."""
    return np.repeat(q["d"].astype(np.float64), GROUP, axis=1) * q["qs"]


def assert_same_integers(a: np.ndarray, b: np.ndarray) -> None:
    """All but the sums, whose products the compiler may fuse with the additions."""
    assert a["qs"].tobytes() == b["qs"].tobytes()
    assert a["d"].tobytes() == b["d"].tobytes()


def unit_block(qs) -> np.ndarray:
    """Activations that are the integers qs themselves."""
    q = np.zeros(1, dtype=Q8_T)
    q["qs"], q["d"] = qs, 1
    q["sum"] = q["qs"].sum(dtype=np.int32)
    return q


def random_row(rng: np.random.Generator, block_type: BlockType, blocks: int) -> np.ndarray:
    alpha = rng.standard_normal((1, blocks)).astype(np.float16)
    mu = rng.standard_normal((1, blocks)).astype(np.float16)
    digits = rng.integers(-1, 2, (1, blocks * BLOCK_SIZE), dtype=np.int8)
    return block_type.pack(alpha, mu, digits)[0]


@BLOCK_TYPES
@LENGTHS
def test_dot_against_float64(kernels, block_type, blocks):
    rng = np.random.default_rng()
    for _ in range(10):
        packed = random_row(rng, block_type, blocks)
        q = quantize_activations(kernels, rng.standard_normal(blocks * BLOCK_SIZE, np.float32))
        expected, magnitude = exact_dot(block_type, packed, q)
        # Integer sums are exact. A term is rounded at most 8 times within its block (the offset,
        # the activations' sum of four groups, scales, products) and once by each of the blocks + 6
        # additions after that, by 2^-24 of its absolute value each time.
        tolerance = (blocks + 14) * 2.0**-24 * magnitude
        assert abs(dot(kernels, block_type, packed, q) - expected) <= tolerance
        assert abs(dot(kernels, block_type, packed, q, "_generic") - expected) <= tolerance


@BLOCK_TYPES
def test_integer_part_is_exact(kernels, block_type):
    """alpha = 1, mu = 1 makes the result the plain integer sum(u*q), which float32 holds."""
    rng = np.random.default_rng()
    digits = rng.integers(-1, 2, (1, BLOCK_SIZE), dtype=np.int8)
    one = np.ones((1, 1), dtype=np.float16)
    packed = block_type.pack(one, one, digits)[0]
    q = unit_block(rng.integers(-127, 128, BLOCK_SIZE))
    expected = int(((digits[0] + 1).astype(np.int32) * q["qs"][0]).sum())
    assert dot(kernels, block_type, packed, q) == expected
    assert dot(kernels, block_type, packed, q, "_generic") == expected


@BLOCK_TYPES
@pytest.mark.parametrize("digit", [-1, 0, 1])
@pytest.mark.parametrize("activation", [-127, 127])
def test_extreme_sums_do_not_saturate(kernels, block_type, digit, activation):
    one = np.ones((1, 1), dtype=np.float16)
    packed = block_type.pack(one, one, np.full((1, BLOCK_SIZE), digit, dtype=np.int8))[0]
    q = unit_block(activation)
    assert dot(kernels, block_type, packed, q) == (digit + 1) * activation * BLOCK_SIZE


def test_every_base3_code_is_read_right(kernels):
    """The digit arithmetic of the vectorised kernels, for all codes in all bytes."""
    rng = np.random.default_rng()
    one = np.ones((1, 1), dtype=np.float16)
    for value in range(243):
        code = (value // 3 ** np.arange(4, -1, -1) % 3).astype(np.int8) - 1
        digits = np.empty((1, BLOCK_SIZE), dtype=np.int8)
        digits[0, :120] = np.repeat(code, 24)
        digits[0, 120:] = np.repeat(code[:4], 2)
        q = unit_block(rng.integers(-127, 128, BLOCK_SIZE))
        expected = int(((digits[0] + 1).astype(np.int32) * q["qs"][0]).sum())
        assert dot(kernels, TQ1_1, TQ1_1.pack(one, one, digits)[0], q) == expected


@BLOCK_TYPES
def test_unaligned_buffers(kernels, block_type):
    rng = np.random.default_rng()
    packed = random_row(rng, block_type, 4)
    q = quantize_activations(kernels, rng.standard_normal(4 * BLOCK_SIZE, np.float32))
    expected = dot(kernels, block_type, packed, q)
    shifted = np.empty(packed.nbytes + 2, dtype=np.uint8)[2:]
    shifted[:] = packed
    assert dot(kernels, block_type, shifted, q) == expected


@LENGTHS
def test_activations_are_quantized_bit_for_bit_alike(kernels, blocks):
    rng = np.random.default_rng()
    scale = np.exp(4 * rng.standard_normal(blocks)).astype(np.float32)
    x = (rng.standard_normal((blocks, BLOCK_SIZE)).astype(np.float32) * scale[:, None]).ravel()
    q = quantize_activations(kernels, x)
    assert_same_integers(q, quantize_activations(kernels, x, "_generic"))
    # Nearest of 127 steps: half a step, and the float32 rounding of x/d (at most 127).
    step = np.repeat(q["d"].astype(np.float64), GROUP, axis=1)
    error = np.abs(restore(q) - x.reshape(blocks, -1))
    assert (error <= step * (0.5 + 127 * 3 * 2.0**-24)).all()
    np.testing.assert_allclose(
        q["sum"], restore(q).sum(1), rtol=0, atol=4 * 2.0**-24 * np.abs(restore(q)).sum(1).max()
    )


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-40, -3e-39, 3e38, -3.4e38])
def test_extreme_activations(kernels, value):
    x = np.full(BLOCK_SIZE, value, dtype=np.float32)
    x[::2] *= np.float32(0.5)
    host, plain = (quantize_activations(kernels, x, suffix) for suffix in ("", "_generic"))
    assert_same_integers(host, plain)
    assert np.isfinite(host["d"]).all()
    if abs(value) > 2.0**-119:  # else d or its inverse is not a normal float32
        assert np.abs(restore(host)[0] - x).max() <= host["d"].max() * 0.501


def test_gathering_is_quantizing_the_permuted_row(kernels):
    rng = np.random.default_rng()
    for blocks in (1, 3, 8):
        x = rng.standard_normal(blocks * BLOCK_SIZE, np.float32)
        perm = rng.permutation(x.size).astype(np.int32)
        gathered = np.empty(blocks, dtype=Q8_T)
        kernels.library.quantize_row_q8_t_gathered(
            address(x), address(perm), address(gathered), ctypes.c_int64(x.size)
        )
        expected = quantize_activations(kernels, np.ascontiguousarray(x[perm]))
        assert gathered.tobytes() == expected.tobytes()
