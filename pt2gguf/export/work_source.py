"""The weights of a work directory, ready to be written."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.export.folding import fold_orders, reordered
from pt2gguf.model.checkpoint import StoredTensor
from pt2gguf.ternary import StockWeight, TernaryWeight


class WorkSource:
    """Reads weights from a work directory, one decoder layer at a time.

    Orders of down projections are folded into the rows that produce their inputs.
    """

    def __init__(self, work: WorkDirectory, stored: Mapping[str, StoredTensor]) -> None:
        """stored: all tensors of the checkpoint, to know shapes and which biases there are."""
        self._biases = {name for name in stored if name.endswith(".bias")}
        self._work = work
        self._stock_types = work.stock
        self._layer_of = work.layer_numbers() | work.stock_layer_numbers()
        self._shapes: dict[str, tuple[int, int]] = {}
        for name in self._layer_of:
            rows, columns = stored[name].shape
            self._shapes[name] = (rows, columns)
        self._layer = lru_cache(maxsize=1)(self._read_layer)

    def shapes(self) -> dict[str, tuple[int, int]]:
        return self._shapes

    def stock_type(self, name: str) -> str | None:
        return self._stock_types.get(name)

    def weight(self, name: str) -> TernaryWeight | StockWeight:
        weights, _ = self._layer(self._layer_of[name])
        return weights[name]

    def is_reordered(self, name: str) -> bool:
        _, moved = self._layer(self._layer_of[name])
        return name in moved

    def _read_layer(self, index: int) -> tuple[dict[str, TernaryWeight | StockWeight], set[str]]:
        layer = self._work.final_layer(index)
        weights: dict[str, TernaryWeight | StockWeight] = {**layer.weights, **layer.stock}
        return fold_orders(weights, self._biases), reordered(weights, self._biases)
