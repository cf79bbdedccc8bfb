"""Which matrices of the decoder layers stay in a stock type, and in which."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from torch import Tensor

from pt2gguf.convert.stock import StockTypes
from pt2gguf.export.llama_cpp import LlamaCpp
from pt2gguf.export.precheck import find_unexportable
from pt2gguf.export.stock_grids import GRIDS, GgmlGrid
from pt2gguf.export.stock_types import stored_values
from pt2gguf.model import Checkpoint
from pt2gguf.ternary import CHUNK

Rule = tuple[re.Pattern[str], str]
"""Tensors whose checkpoint or GGUF name matches are of this type."""


class TypeChoice:
    """What was asked for: by rules (--tensor-type), and what a budget has chosen since."""

    def __init__(
        self,
        rules: Sequence[Rule],
        checkpoint: Checkpoint,
        gguf_name: Callable[[str], str | None],
        llama_cpp: LlamaCpp,
    ) -> None:
        self.by_budget: dict[str, str] = {}
        """Checkpoint name -> type."""
        self.grid_of = lru_cache(lambda kind: GgmlGrid(kind, llama_cpp.gguf, llama_cpp.ggml))
        """From one of GRIDS; made when it is needed, as ggml's library is loaded for it."""
        # Asked again for every expert, with the names of all of them.
        self._by_rule = lru_cache(lambda names: _first_rule(rules, names))
        self._checkpoint = checkpoint
        self._gguf_name = gguf_name
        self._llama_cpp = llama_cpp
        # As a tensor of a file has one type, what is asked for one expert is asked for all.
        self._parts: dict[str, list[str]] = {}
        for name in checkpoint.tensors:
            if new_name := gguf_name(name):
                self._parts.setdefault(new_name, []).append(name)
        self._unexportable: dict[str, str] = {}

    def tensor_type(self, name: str, new_name: str | None) -> str | None:
        """Of the tensor that has these names in the checkpoint and in the GGUF file."""
        parts = self._parts.get(new_name or "", [name])
        if stock_type := self._by_rule((*parts, new_name or name)):
            return stock_type
        return next((self.by_budget[part] for part in parts if part in self.by_budget), None)

    def reason(self, name: str) -> str | None:
        """Why a matrix is to stay in a stock type; None if it is not."""
        if stock_type := self._type(name):
            option = "--budget" if name in self.by_budget else "--tensor-type"
            return f"{option} asks for {stock_type}"
        return self._unexportable.get(name)

    def stock_types(self, alternatives: Sequence[GgmlGrid] = ()) -> StockTypes:
        return StockTypes(self._values, self._grid, alternatives)

    def find_unexportable(
        self, ternary: Mapping[str, tuple[int, int]], stock: Mapping[str, tuple[int, int]]
    ) -> None:
        """Find out which of these matrices, with their shapes, llama.cpp's converter does more to
        than moving rows: they will be neither ternary nor rounded with compensation."""
        types = dict.fromkeys(ternary, "ternary") | {n: self._type(n) or "" for n in stock}
        self._unexportable = find_unexportable(
            self._checkpoint.path, {**ternary, **stock}, types, self._llama_cpp
        )

    def _type(self, name: str) -> str | None:
        return self.tensor_type(name, self._gguf_name(name))

    def _values(self, name: str, weight: Tensor) -> Tensor:
        return stored_values(weight, self._type(name) or "f16", self._llama_cpp.gguf)

    def _grid(self, name: str) -> GgmlGrid | None:
        if name in self._unexportable or self._checkpoint.tensors[name].shape[-1] % CHUNK:
            return None
        kind = self._type(name)
        return self.grid_of(kind) if kind in GRIDS else None


def _first_rule(rules: Sequence[Rule], names: tuple[str, ...]) -> str | None:
    """What the first rule that matches one of the names asks for."""
    return next((kind for rule, kind in rules if any(map(rule.search, names))), None)
