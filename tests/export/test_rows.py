"""Reading off where a converter put the rows."""

from __future__ import annotations

import pytest
import torch

from pt2gguf.errors import Pt2Error
from pt2gguf.export.rows import numbered_elements, read_rows

SHAPES = {0: (6, 128), 1: (4, 128)}


def sources():
    return numbered_elements(0, SHAPES[0]), numbered_elements(1, SHAPES[1])


def test_permuted_rows() -> None:
    first, _ = sources()
    order = torch.randperm(6)
    rows = read_rows("w", first[order], SHAPES)
    assert rows.shape == (6, 128)
    assert rows.row.tolist() == order.tolist()
    assert set(rows.weight.tolist()) == {0}


def test_stacked_and_split_weights() -> None:
    first, second = sources()
    rows = read_rows("w", torch.stack([first[2:], second]), SHAPES)
    assert rows.shape == (2, 4, 128)
    assert rows.weight.tolist() == [0] * 4 + [1] * 4
    assert rows.row.tolist() == [2, 3, 4, 5, 0, 1, 2, 3]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w.flip(1),
        lambda w: w.T,
        lambda w: w[:, :64],
        lambda w: w + 1,
        lambda w: w * 2,
        lambda w: w.float(),
        lambda w: torch.cat([w[:, 64:], w[:, :64]], dim=1),
    ],
    ids=["flip", "transpose", "half", "add", "scale", "float", "roll"],
)
def test_anything_but_moving_whole_rows_is_refused(spoil) -> None:
    first, _ = sources()
    with pytest.raises(Pt2Error, match="does more to tensor w than moving rows"):
        read_rows("w", spoil(first), SHAPES)
