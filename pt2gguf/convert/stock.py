"""The matrices of decoder layers that stay in a stock type."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pt2gguf.ternary import CHUNK, StockGrid, StockWeight


@dataclass(frozen=True)
class StockTypes:
    """What is asked for, by checkpoint name.

    values: from a matrix (n, m) float32 on the CPU to what it will be in the file. grid: the type
    of a matrix that is rounded with compensation, and not as `values` says; None for others.
    alternatives: types to which each ternary matrix is rounded as well, to learn what they cost.
    """

    values: Callable[[str, Tensor], Tensor] = lambda name, weight: weight
    grid: Callable[[str], StockGrid | None] = lambda name: None
    alternatives: Sequence[StockGrid] = ()

    def grids(self, names: Iterable[str]) -> dict[str, StockGrid]:
        """By name, where there is one."""
        found = {name: self.grid(name) for name in names}
        return {name: grid for name, grid in found.items() if grid is not None}

    def rounded(self, weights: Mapping[str, StockWeight]) -> dict[str, Tensor]:
        """The values (n, m) of matrices that were rounded with compensation."""
        grids = self.grids(weights)
        return {name: grids[name].values(weight.packed) for name, weight in weights.items()}


def stock_size(shape: tuple[int, int], grid: StockGrid) -> int:
    """Bytes of a matrix (n, m) in the type of `grid`."""
    rows, columns = shape
    return rows * columns // CHUNK * grid.chunk_bytes


@torch.no_grad()
def replace_weights(
    layer: nn.Module, stored_name: Callable[[str], str], values: Mapping[str, Tensor]
) -> None:
    """Give the linear layers of a decoder layer these weights, by checkpoint name.

    stored_name: from a parameter's name within the layer to its name in the checkpoint.
    """
    for name, module in _linears(layer, stored_name):
        if name in values:
            module.weight.copy_(values[name])


@torch.no_grad()
def round_kept(
    layer: nn.Module, stored_name: Callable[[str], str], kept: Collection[str], stock: StockTypes
) -> None:
    """Give the matrices `kept` of a decoder layer the values that they will have in the file.

    stored_name: as in `replace_weights`.
    """
    for name, module in _linears(layer, stored_name):
        if name in kept:
            module.weight.copy_(stock.values(name, module.weight.cpu()))


def _linears(
    layer: nn.Module, stored_name: Callable[[str], str]
) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers, with the checkpoint names of their weights."""
    for module_name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            yield stored_name(f"{module_name}.weight"), module
