"""Finding out before hours of work what llama.cpp's converter will not do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pt2gguf.errors import Pt2Error
from pt2gguf.export.llama_cpp import LlamaCpp
from pt2gguf.export.rows import numbered_elements, read_rows

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def find_unexportable(
    checkpoint: Path, shapes: Mapping[str, tuple[int, int]], llama_cpp: LlamaCpp
) -> dict[str, str]:
    """The weights that llama.cpp's converter changes by more than moving rows, with the reason.

    Layers whose weights have the same names are converted alike, so one of each kind is tried.

    Args:
        shapes: (n, m) of the weights that are to be ternary, by checkpoint name.
    """
    layers = _by_layer(shapes)
    representatives = {frozenset(map(_kind, names)): names for names in reversed(layers.values())}
    converter = llama_cpp.converter(checkpoint)
    refused: dict[str, str] = {}
    for names in representatives.values():
        for name, reason in _try_layer(converter, {name: shapes[name] for name in names}).items():
            refused[_kind(name)] = reason
    return {name: refused[_kind(name)] for name in shapes if _kind(name) in refused}


def require_known_vocabulary(checkpoint: Path, llama_cpp: LlamaCpp) -> None:
    """Raises :class:`Pt2Error` unless the converter can write the checkpoint's vocabulary."""
    try:
        llama_cpp.converter(checkpoint).set_vocab()
    except Exception as error:  # whatever the tokenizer's files make the converter raise
        raise Pt2Error(
            f"llama.cpp's converter cannot write the vocabulary of {checkpoint} "
            f"({str(error).strip().partition(chr(10))[0]}): use the tokenizer files of the model "
            "that the checkpoint was made from"
        ) from error


def _kind(name: str) -> str:
    return _NUMBER.sub("*", name)


def _by_layer(names: Mapping[str, Any]) -> dict[int, list[str]]:
    """Checkpoint names by the first number in them, which the converter takes as the layer."""
    layers: dict[int, list[str]] = {}
    for name in names:
        layers.setdefault(_layer_number(name), []).append(name)
    return layers


def _layer_number(name: str) -> int:
    match = _NUMBER.search(name)
    return int(match[0]) if match else -1


def _try_layer(converter: Any, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The weights of one layer that do not survive as rows, with the reason."""
    by_number = dict(enumerate(shapes.values()))
    refused: dict[str, str] = {}
    seen: set[int] = set()
    with torch.inference_mode():
        for number, (name, shape) in enumerate(shapes.items()):
            numbered = numbered_elements(number, shape)
            try:
                for new_name, arrived in converter.modify_tensors(
                    numbered, name, _layer_number(name)
                ):
                    seen.update(read_rows(new_name, arrived, by_number).weight.tolist())
            except Pt2Error:
                refused[name] = "llama.cpp's converter does more to it than moving rows"
            except Exception as error:  # whatever the converter does to what is not a weight
                refused[name] = f"llama.cpp's converter cannot move its rows ({error})"
    for number, name in enumerate(shapes):
        if number not in seen:
            refused.setdefault(name, "llama.cpp's converter joins it with what is not ternary")
    return refused
