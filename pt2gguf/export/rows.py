"""Where the converter puts the rows of a weight.

llama.cpp's converter reorders rows (LLaMA's rotary layout), splits fused matrices and stacks the
experts of a mixture, each architecture in its own way. Rather than knowing these, we send numbered
elements through the converter and read off where they arrive: alpha, mu and T then follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pt2gguf.errors import Pt2Error

_WEIGHT_BITS = 40  # element numbers within a weight; the weight's own number is above


@dataclass(frozen=True)
class RowSource:
    """The origin of a tensor's rows.

    shape: of the GGUF tensor in rows-last-but-one order, (n, m) or (experts, n, m).
    weight: (rows,) int64, which source weight (its number) each row came from.
    row: (rows,) int64, which row of that weight.
    """

    shape: tuple[int, ...]
    weight: Tensor
    row: Tensor


def numbered_elements(number: int, shape: tuple[int, int]) -> Tensor:
    """(n, m) int64: every element of source weight `number` has a value of its own."""
    rows, columns = shape
    return torch.arange(rows * columns).view(rows, columns) + (number << _WEIGHT_BITS)


def read_rows(name: str, arrived: Tensor, shapes: dict[int, tuple[int, int]]) -> RowSource:
    """Reads off the origin of each row of a converted tensor.

    Args:
        name: the GGUF tensor's name, for the error.
        arrived: (..., m) what the converter made of :func:`numbered_elements`.
        shapes: the source weights' shapes by number.

    Raises:
        Pt2Error: the converter changed values or columns, so that T cannot follow.
    """
    columns = arrived.shape[-1]
    flat = arrived.reshape(-1, columns)
    first = flat[:, 0].long()
    weight = first >> _WEIGHT_BITS
    element = first & ((1 << _WEIGHT_BITS) - 1)
    row = element // columns
    numbers: Iterable[int] = weight.unique().tolist()
    whole_rows = (
        arrived.dtype == torch.int64
        and all(number in shapes and shapes[number][1] == columns for number in numbers)
        and bool((element % columns == 0).all())
        and bool((flat == first[:, None] + torch.arange(columns)).all())
    )
    if not whole_rows:
        raise Pt2Error(
            f"llama.cpp's converter does more to tensor {name} than moving rows, so it cannot "
            f"be rounded here: keep it in a stock type with --tensor-type '{name}=q8_0'"
        )
    return RowSource(tuple(arrived.shape), weight, row)
