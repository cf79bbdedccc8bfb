"""The files that are drawn."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_summary import random_ternary, random_weights

from pt2gguf.errors import Pt2Error
from pt2gguf.plotting.picture import (
    DPI,
    HEIGHT_EACH,
    WIDTH,
    require_drawable,
    write_picture,
)
from pt2gguf.plotting.summary import summarize


def decode_png(file: Path) -> np.ndarray:
    """(height, width) of the undecoded bytes of each row; fails for a damaged file."""
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, pixels, size = 8, b"", (0, 0)
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        body = data[position + 4 : position + 8 + length]
        (checksum,) = struct.unpack(">I", data[position + 8 + length : position + 12 + length])
        assert checksum == zlib.crc32(body)
        if body[:4] == b"IHDR":
            size = struct.unpack(">II", body[4:12])
        if body[:4] == b"IDAT":
            pixels += body[4:]
        position += 12 + length
    assert body[:4] == b"IEND"
    width, height = size
    rows = np.frombuffer(zlib.decompress(pixels), dtype=np.uint8).reshape(height, -1)
    assert rows.shape[1] == 1 + 4 * width  # a filter's number, then red, green, blue, opacity
    return rows[:, 1:]


@pytest.mark.parametrize("count", [1, 3])
def test_png(tmp_path: Path, count: int) -> None:
    W, ternary = random_weights(16, 3), random_ternary(16, 3, perm=True)
    output = tmp_path / "picture.png"
    write_picture([summarize(f"m.{i}", W, ternary if i else None) for i in range(count)], output)
    pixels = decode_png(output)
    assert pixels.shape == (round(HEIGHT_EACH * count * DPI), round(WIDTH * DPI) * 4)
    assert len(np.unique(pixels)) > 50  # not a blank sheet
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".PDF", b"%PDF-")])
def test_vector_formats(tmp_path: Path, suffix: str, start: bytes) -> None:
    output = tmp_path / f"picture{suffix}"
    write_picture([summarize("m", random_weights(4, 1), None)], output)
    assert output.read_bytes().startswith(start)


def test_constant_weights_are_drawn(tmp_path: Path) -> None:
    write_picture([summarize("m", torch.zeros(2, 128), None)], tmp_path / "picture.png")
    decode_png(tmp_path / "picture.png")


def test_unknown_format() -> None:
    with pytest.raises(Pt2Error, match=r"weights\.jpeg .* \.png, \.svg, \.pdf"):
        require_drawable(Path("weights.jpeg"))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Pt2Error, match=r"pip install 'pt2gguf\[plot\]'"):
        require_drawable(Path("weights.png"))


def test_no_global_state(tmp_path: Path) -> None:
    """Nothing of pyplot, whose figures live until they are closed."""
    write_picture([summarize("m", random_weights(4, 1), None)], tmp_path / "picture.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Pt2Error, match=r"picture\.png cannot be written"):
        write_picture(
            [summarize("m", random_weights(4, 1), None)], tmp_path / "missing" / "picture.png"
        )
