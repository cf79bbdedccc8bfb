"""Ternary weights as work directories and GGUF files hold them, by checkpoint name."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch

from pt2gguf.blocks import BLOCK_TYPES
from pt2gguf.convert.groups import EXPERT
from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.errors import Pt2Error
from pt2gguf.evaluation.file_weights import open_gguf
from pt2gguf.ternary import TernaryWeight


class StoredWeights(Protocol):
    def weight(self, name: str) -> TernaryWeight:
        """The ternary weight of checkpoint name `name`, its rows in the order they are stored in.

        Raises Pt2Error if it is not there.
        """


class WorkWeights:
    """The ternary weights of a finished work directory."""

    def __init__(self, work: WorkDirectory) -> None:
        self._work = work
        self._layer_of = work.layer_numbers()
        self._layer = lru_cache(maxsize=1)(work.final_weights)

    def weight(self, name: str) -> TernaryWeight:
        if name not in self._layer_of:
            raise _not_ternary(name, self._work.path)
        return self._layer(self._layer_of[name])[name]


class GgufWeights:
    """The ternary tensors of a GGUF file.

    A column order that was folded into the rows of the weights before it (pt2gguf.export.folding)
    cannot be told from the file: such weights come with none.
    """

    def __init__(
        self, file: Path, gguf: ModuleType, gguf_name: Callable[[str], str | None]
    ) -> None:
        """gguf: the gguf package that knows the ternary types; gguf_name: of a checkpoint name.

        Raises Pt2Error for a file that is no GGUF file.
        """
        self._file = file
        self._tensors = {tensor.name: tensor for tensor in open_gguf(file, gguf).tensors}
        self._gguf_name = gguf_name

    def weight(self, name: str) -> TernaryWeight:
        gguf_name = self._gguf_name(name) or name
        tensor = self._tensors.get(gguf_name)
        block_type = BLOCK_TYPES.get(tensor.tensor_type.name.lower()) if tensor else None
        if tensor is None or block_type is None:
            raise _not_ternary(name, self._file)
        expert = EXPERT.search(name)
        packed = tensor.data[int(expert[0])] if expert else tensor.data
        alpha, mu, digits = map(torch.from_numpy, block_type.unpack(packed))
        perm = self._tensors.get(gguf_name.removesuffix(".weight") + ".perm")
        return TernaryWeight(
            alpha, mu, digits, None if perm is None else torch.from_numpy(perm.data.copy()).long()
        )


def _not_ternary(name: str, where: Path) -> Pt2Error:
    return Pt2Error(
        f"{name} is not a ternary weight of {where}: choose others with --tensor, or leave that "
        "file out to see the full-precision weights"
    )
