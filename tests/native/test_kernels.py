"""The CPU kernels of every instruction set against the plain ones and against float64."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest

from pt2gguf.blocks import BLOCK_SIZE, TQ1_1, TQ2_1, BlockType

ALL_BLOCK_TYPES = pytest.mark.parametrize("block_type", [TQ1_1, TQ2_1], ids=lambda t: t.name)
LENGTHS = pytest.mark.parametrize("blocks", [1, 2, 3, 5, 16, 33, 140])
ROWS = 32  # of a panel
Q8_T = np.dtype([("qs", np.int8, BLOCK_SIZE), ("d", np.float32), ("sum", np.float32)])
PANEL = np.dtype([("alpha", "<f2", ROWS), ("mu", "<f2", ROWS), ("qs", np.uint8, (8, ROWS, 4))])
EPSILON = 2.0**-24  # what float32 rounds off, of a number's absolute value


def tile_dtype(n: int) -> np.dtype:
    """A block of a tile of n columns."""
    return np.dtype(
        [("qs", np.int8, (n, BLOCK_SIZE)), ("d", np.float32, n), ("sum", np.float32, n)]
    )


def address(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def addresses(arrays: list[np.ndarray]) -> ctypes.Array:
    return (ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])


def quantize_activations(kernels, x: np.ndarray) -> np.ndarray:
    blocks = np.empty(x.size // BLOCK_SIZE, dtype=Q8_T)
    kernels.library.quantize_row_q8_t(address(x), address(blocks), ctypes.c_int64(x.size))
    return blocks


def plain_dot(kernels, block_type: BlockType, packed: np.ndarray, q: np.ndarray) -> float:
    result = np.empty(1, dtype=np.float32)
    vec_dot = getattr(kernels.library, f"ggml_vec_dot_{block_type.name}_q8_t")
    vec_dot.argtypes = [ctypes.c_int, *[ctypes.c_void_p, ctypes.c_size_t] * 3, ctypes.c_int]
    vec_dot(q.size * BLOCK_SIZE, address(result), 0, address(packed), 0, address(q), 0, 1)
    return float(result[0])


def make_panel(kernels, block_type: BlockType, data: np.ndarray, rows: int, blocks: int):
    """(rows, row_size) bytes, of which the row fills the first -> (blocks,) PANEL."""
    panel = np.full(blocks * PANEL.itemsize, 0xA5, dtype=np.uint8)
    kernels.library.pt2_panel_from_rows(
        kernels.slots[block_type.name],
        address(data),
        ctypes.c_size_t(data.strides[0]),
        rows,
        ctypes.c_int64(blocks),
        address(panel),
    )
    return panel.view(PANEL)


def tile_columns(kernels) -> range:
    """The numbers of columns that tiles have."""
    most = next(n for n in range(1, 17) if kernels.library.pt2_tiles(n + 1) > 1)
    return range(1, most + 1)


def tile_bounds(kernels, columns: int) -> list[int]:
    """Where the tiles of a strip begin, and where it ends."""
    tiles = kernels.library.pt2_tiles(columns)
    return [kernels.library.pt2_tile_begin(columns, t) for t in range(tiles + 1)]


def quantize_tile(
    kernels, x: list[np.ndarray], tile: np.ndarray, perm: np.ndarray | None = None, blocks=None
) -> None:
    first, last = blocks or (0, tile.size)
    kernels.library.pt2_tile_quantize(
        addresses(x),
        None if perm is None else address(perm),
        len(x),
        ctypes.c_int64(first),
        ctypes.c_int64(last),
        address(tile),
    )


def make_tile(kernels, x: list[np.ndarray], perm: np.ndarray | None = None) -> np.ndarray:
    tile = np.zeros(x[0].size // BLOCK_SIZE, dtype=tile_dtype(len(x)))
    size = kernels.library.pt2_tile_size
    size.restype = ctypes.c_size_t
    assert size(len(x), ctypes.c_int64(tile.size)) == tile.nbytes
    quantize_tile(kernels, x, tile, perm)
    return tile


def column(tile: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column i of a tile: q (blocks, 128), d (blocks,), sum (blocks,)."""
    return tile["qs"][:, i], tile["d"][:, i], tile["sum"][:, i]


def panel_dot(kernels, panel: np.ndarray, tile: np.ndarray, n: int, rows: int, blocks: int):
    """(n, rows) float32; nothing else is written."""
    places = [np.full(rows + 8, np.nan, dtype=np.float32) for _ in range(n)]
    kernels.library.pt2_panels_dot(
        address(panel),
        ctypes.c_int64(rows),
        address(tile),
        n,
        ctypes.c_int64(blocks),
        addresses(places),
    )
    assert all(np.isnan(place[rows:]).all() for place in places), "wrote beyond the rows"
    return np.array([place[:rows] for place in places])


def restore(q: np.ndarray) -> np.ndarray:
    """(blocks, 128) float64: what the activations stand for."""
    return q["d"].astype(np.float64)[:, None] * q["qs"]


def exact_products(
    block_type: BlockType, packed: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows times x in float64, and the sum of the absolute values of what is added."""
    alpha, mu, digits = (a.astype(np.float64) for a in block_type.unpack(packed))
    weights = alpha[..., None] * digits.reshape(*alpha.shape, BLOCK_SIZE) + mu[..., None]
    # The kernels add alpha*u and (mu - alpha) separately, so these terms are what rounds.
    a, m = np.abs(alpha), np.abs(mu)
    magnitude = ((2 * a + (a + m))[..., None] * np.abs(x)).sum((1, 2))
    return (weights * x).sum((1, 2)), magnitude


def dot_tolerance(blocks: int) -> float:
    """What panels and tiles may be off, as a share of the sum of absolute values.

    Integer sums are exact. Those of the activations are rounded by d, by an offset that is
    rounded itself, and as a product of the two; the others by d and alpha, one time each; and
    all by two additions for every block. One more is for what these factors of 1 + EPSILON make
    together.
    """
    return (2 * blocks + 4) * EPSILON


def random_rows(
    rng: np.random.Generator, block_type: BlockType, rows: int, blocks: int
) -> np.ndarray:
    alpha = rng.standard_normal((rows, blocks)).astype(np.float16)
    mu = rng.standard_normal((rows, blocks)).astype(np.float16)
    digits = rng.integers(-1, 2, (rows, blocks * BLOCK_SIZE), dtype=np.int8)
    return block_type.pack(alpha, mu, digits)


def unit_rows(block_type: BlockType, digits: np.ndarray) -> np.ndarray:
    """alpha = 1, mu = 1 makes a product the plain integer sum(u*q), which float32 holds."""
    one = np.ones((len(digits), digits.shape[1] // BLOCK_SIZE), dtype=np.float16)
    return block_type.pack(one, one, digits)


def integer_activations(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Integers that are quantized to themselves, with a scale of 1."""
    x = rng.integers(-127, 128, blocks * BLOCK_SIZE)
    x[::BLOCK_SIZE] = rng.choice([-127, 127], blocks)
    return x.astype(np.float32)


def shifted(array: np.ndarray, by: int) -> np.ndarray:
    """A copy, at an address that has no more alignment than `by` gives it."""
    place = np.empty(array.nbytes + 64 + by, dtype=np.uint8)
    start = -place.ctypes.data % 64 + by
    copy = place[start : start + array.nbytes]
    copy[:] = array.view(np.uint8)
    return copy


# Panels -------------------------------------------------------------------------------------------


@ALL_BLOCK_TYPES
@pytest.mark.parametrize("extra", [0, 2, 7 * 30 * 36])
def test_layout_of_panels(kernels, block_type, extra):
    rng = np.random.default_rng()
    blocks = 3
    for rows in range(1, ROWS + 1):
        packed = random_rows(rng, block_type, rows, blocks)
        data = rng.integers(0, 256, (rows, packed.shape[1] + extra), dtype=np.uint8)
        data[:, : packed.shape[1]] = packed
        alpha, mu, digits = block_type.unpack(packed)
        expected = np.zeros(blocks, dtype=PANEL)
        expected["alpha"][:, :rows], expected["mu"][:, :rows] = alpha.T, mu.T
        u = (digits + 1).astype(np.uint8).reshape(rows, blocks, 4, 8, 4)
        for k in range(4):
            expected["qs"][:, :, :rows] |= u[:, :, k].transpose(1, 2, 0, 3) << 2 * k
        panel = make_panel(kernels, block_type, data, rows, blocks)
        assert panel.tobytes() == expected.tobytes()


@ALL_BLOCK_TYPES
def test_panels_of_rows_at_odd_addresses(kernels, block_type):
    rng = np.random.default_rng()
    packed = random_rows(rng, block_type, ROWS, 2)
    data = shifted(packed.ravel(), 2).reshape(packed.shape)
    expected = make_panel(kernels, block_type, packed, ROWS, 2)
    assert make_panel(kernels, block_type, data, ROWS, 2).tobytes() == expected.tobytes()


def test_every_base3_code_in_every_byte(kernels):
    value = (np.arange(243)[:, None] + 7 * np.arange(26)) % 243  # (blocks, bytes)
    digits = value[..., None] // 3 ** np.arange(4, -1, -1) % 3  # (blocks, bytes, digits)
    u = np.concatenate(
        [
            digits[:, :24].transpose(0, 2, 1).reshape(243, 120),
            digits[:, 24:, :4].transpose(0, 2, 1).reshape(243, 8),
        ],
        axis=1,
    ).astype(np.uint8)
    packed = unit_rows(TQ1_1, u.reshape(1, -1).astype(np.int8) - np.int8(1))
    panel = make_panel(kernels, TQ1_1, packed, 1, 243)
    planes = np.stack([panel["qs"][:, :, 0] >> 2 * k & 3 for k in range(4)], axis=1)
    assert (planes.reshape(243, BLOCK_SIZE) == u).all()


# Activations --------------------------------------------------------------------------------------


def scaled_activations(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Normal, with another scale in each block."""
    scale = np.exp(4 * rng.standard_normal(blocks)).astype(np.float32)
    return (rng.standard_normal((blocks, BLOCK_SIZE), np.float32) * scale[:, None]).ravel()


def assert_column_is(tile: np.ndarray, i: int, expected: np.ndarray) -> None:
    """Column i of the tile is `expected`, Q8_T blocks."""
    q, d, total = column(tile, i)
    assert (q == expected["qs"]).all()
    # Instruction sets that leave digits in place make up for it in the scale: for the 4 of every
    # other plane, or for the 64 of the last one.
    factors = np.float32([1, 1 / 4, 1 / 64])
    assert d.tobytes() in [(expected["d"] * factor).tobytes() for factor in factors]
    assert total.tobytes() == expected["sum"].tobytes()


@LENGTHS
def test_reference_quantization(kernels, blocks):
    x = scaled_activations(np.random.default_rng(), blocks)
    q = quantize_activations(kernels, x)
    # Nearest of 127 steps: half a step, and the float32 rounding of x/d (at most 127).
    step = q["d"].astype(np.float64)[:, None]
    error = np.abs(restore(q) - x.reshape(blocks, -1))
    assert (error <= step * (0.5 + 127 * 3 * EPSILON)).all()
    exact = restore(q).sum(1)
    assert (np.abs(q["sum"] - exact) <= EPSILON * np.abs(exact)).all()


@LENGTHS
def test_tiles_hold_what_the_reference_gives(kernels, blocks):
    rng = np.random.default_rng()
    for n in tile_columns(kernels):
        x = [scaled_activations(rng, blocks) for _ in range(n)]
        tile = make_tile(kernels, x)
        for i in range(n):
            assert_column_is(tile, i, quantize_activations(kernels, x[i]))


def test_only_the_blocks_of_the_range_are_written(kernels):
    rng = np.random.default_rng()
    for n in tile_columns(kernels):
        x = [scaled_activations(rng, 5) for _ in range(n)]
        whole = make_tile(kernels, x)
        for first, last in [(0, 0), (0, 1), (1, 3), (4, 5), (5, 5), (0, 5)]:
            tile = np.full(whole.nbytes, 0x5A, dtype=np.uint8).view(whole.dtype)
            expected = tile.copy()
            expected[first:last] = whole[first:last]
            quantize_tile(kernels, x, tile, blocks=(first, last))
            assert tile.tobytes() == expected.tobytes()


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_permuting_is_quantizing_the_permuted_row(kernels, blocks):
    rng = np.random.default_rng()
    for n in tile_columns(kernels):
        x = [scaled_activations(rng, blocks) for _ in range(n)]
        perm = rng.permutation(x[0].size).astype(np.int32)
        expected = make_tile(kernels, [np.ascontiguousarray(column[perm]) for column in x])
        assert make_tile(kernels, x, perm).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-45, 1e-40, -3e-39, 1e-36, 1.6e-36, -3e-35, 1e38, 3e38, -3.4e38]
)
@pytest.mark.parametrize("other", [0.5, 1, -1])
def test_extreme_activations(kernels, value, other):
    x = np.full(BLOCK_SIZE, value, dtype=np.float32)
    x[1::2] *= np.float32(other)
    reference = quantize_activations(kernels, x)
    assert np.isfinite(reference["d"]).all()
    if abs(value) >= 127 * 2.0**-126 * 1.01:  # else d is not a normal float32
        assert np.abs(restore(reference)[0] - x).max() <= reference["d"].max() * 0.501
    else:
        assert not reference["qs"].any()
        assert not reference["d"].any()
    for n in tile_columns(kernels):
        tile = make_tile(kernels, [x] * n)
        for i in range(n):
            assert_column_is(tile, i, reference)


# Products -----------------------------------------------------------------------------------------


@ALL_BLOCK_TYPES
@LENGTHS
def test_products_against_float64(kernels, block_type, blocks):
    rng = np.random.default_rng()
    packed = random_rows(rng, block_type, ROWS, blocks)
    panel = make_panel(kernels, block_type, packed, ROWS, blocks)
    for n in tile_columns(kernels):
        x = [scaled_activations(rng, blocks) for _ in range(n)]
        results = panel_dot(kernels, panel, make_tile(kernels, x), n, ROWS, blocks)
        for i in range(n):
            q = quantize_activations(kernels, x[i])
            expected, magnitude = exact_products(block_type, packed, restore(q))
            assert (np.abs(results[i] - expected) <= dot_tolerance(blocks) * magnitude).all()
            plain = np.array([plain_dot(kernels, block_type, row, q) for row in packed])
            # A term is rounded at most 4 times within its block, and by each of their additions.
            assert (np.abs(plain - expected) <= (blocks + 5) * EPSILON * magnitude).all()


@ALL_BLOCK_TYPES
def test_integers_are_exact(kernels, block_type):
    rng = np.random.default_rng()
    blocks = 33
    digits = rng.integers(-1, 2, (ROWS, blocks * BLOCK_SIZE), dtype=np.int8)
    packed = unit_rows(block_type, digits)
    panel = make_panel(kernels, block_type, packed, ROWS, blocks)
    for n in tile_columns(kernels):
        x = [integer_activations(rng, blocks) for _ in range(n)]
        results = panel_dot(kernels, panel, make_tile(kernels, x), n, ROWS, blocks)
        expected = np.array(x).astype(np.int64) @ (digits + 1).astype(np.int64).T
        assert (results == expected).all()
        for i in range(n):
            q = quantize_activations(kernels, x[i])
            plain = [plain_dot(kernels, block_type, row, q) for row in packed]
            assert (plain == expected[i]).all()


@ALL_BLOCK_TYPES
@pytest.mark.parametrize("activation", [-127, 127])
def test_extreme_sums_do_not_saturate(kernels, block_type, activation):
    """Rows of digits 0, of 1 and of 2 only."""
    blocks = 140
    digits = np.repeat(np.arange(ROWS, dtype=np.int8)[:, None] % 3 - 1, blocks * BLOCK_SIZE, axis=1)
    panel = make_panel(kernels, block_type, unit_rows(block_type, digits), ROWS, blocks)
    for n in tile_columns(kernels):
        x = [np.full(blocks * BLOCK_SIZE, activation, dtype=np.float32)] * n
        results = panel_dot(kernels, panel, make_tile(kernels, x), n, ROWS, blocks)
        assert (results == (digits[:, 0] + 1).astype(int) * activation * BLOCK_SIZE * blocks).all()


@ALL_BLOCK_TYPES
@pytest.mark.parametrize(("alpha", "mu"), [(65504, -65504), (6e-8, 6e-8), (-65504, 6e-8), (0, 0)])
def test_extreme_scales(kernels, block_type, alpha, mu):
    rng = np.random.default_rng()
    scales = (np.full((ROWS, 2), scale, dtype=np.float16) for scale in (alpha, mu))
    digits = rng.integers(-1, 2, (ROWS, 2 * BLOCK_SIZE), dtype=np.int8)
    packed = block_type.pack(*scales, digits)
    panel = make_panel(kernels, block_type, packed, ROWS, 2)
    x = scaled_activations(rng, 2)
    results = panel_dot(kernels, panel, make_tile(kernels, [x]), 1, ROWS, 2)
    q = quantize_activations(kernels, x)
    expected, magnitude = exact_products(block_type, packed, restore(q))
    assert (np.abs(results[0] - expected) <= dot_tolerance(2) * magnitude).all()


def test_some_of_a_panels_rows(kernels):
    rng = np.random.default_rng()
    panel = make_panel(kernels, TQ2_1, random_rows(rng, TQ2_1, ROWS, 2), ROWS, 2)
    for n in tile_columns(kernels):
        tile = make_tile(kernels, [scaled_activations(rng, 2) for _ in range(n)])
        expected = panel_dot(kernels, panel, tile, n, ROWS, 2)
        for rows in range(1, ROWS):
            results = panel_dot(kernels, panel, tile, n, rows, 2)
            assert results.tobytes() == expected[:, :rows].tobytes()


@pytest.mark.parametrize("rows", [ROWS, 3 * ROWS, 3 * ROWS - 7])
def test_columns_of_a_strip_are_multiplied_as_if_alone(kernels, rows):
    """To the last bit, however a strip is cut into tiles."""
    rng = np.random.default_rng()
    blocks = 5
    panels = np.concatenate(
        [
            make_panel(kernels, TQ2_1, random_rows(rng, TQ2_1, ROWS, blocks), ROWS, blocks)
            for _ in range(-(-rows // ROWS))
        ]
    )
    x = [scaled_activations(rng, blocks) for _ in range(128)]
    alone = np.concatenate(
        [panel_dot(kernels, panels, make_tile(kernels, [c]), 1, rows, blocks) for c in x]
    )
    for columns in [*range(1, 40), 63, 65, 127, 128]:
        bounds = tile_bounds(kernels, columns)
        assert (bounds[0], bounds[-1]) == (0, columns)
        tiles = [make_tile(kernels, x[a:b]) for a, b in itertools.pairwise(bounds)]
        strip = np.concatenate([tile.view(np.uint8) for tile in tiles])
        results = panel_dot(kernels, panels, strip, columns, rows, blocks)
        assert results.tobytes() == alone[:columns].tobytes()


def test_tiles_are_as_wide_as_the_instruction_set(kernels):
    widest = {"host": {1, 4, 16}, "plain": {1}, "amx": {16}}
    assert max(tile_columns(kernels)) in widest.get(kernels.name, {4})


def test_panels_and_tiles_need_no_alignment(kernels):
    """Beyond that of their elements."""
    rng = np.random.default_rng()
    panel = make_panel(kernels, TQ2_1, random_rows(rng, TQ2_1, ROWS, 3), ROWS, 3)
    for n in tile_columns(kernels):
        x = [scaled_activations(rng, 3) for _ in range(n)]
        tile = make_tile(kernels, x)
        place = shifted(tile, 4)
        place[:] = 0
        quantize_tile(kernels, [shifted(c, 4) for c in x], place.view(tile.dtype))
        assert place.tobytes() == tile.tobytes()
        expected = panel_dot(kernels, panel, tile, n, ROWS, 3)
        results = panel_dot(kernels, shifted(panel, 2), place, n, ROWS, 3)
        assert results.tobytes() == expected.tobytes()
