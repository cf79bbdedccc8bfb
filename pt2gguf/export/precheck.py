"""Finding out before hours of work what llama.cpp's converter will not do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pt2gguf.errors import Pt2Error, first_line
from pt2gguf.export.llama_cpp import LlamaCpp, converted, converter_name
from pt2gguf.export.rows import numbered_elements, read_rows

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def find_unexportable(
    checkpoint: Path,
    shapes: Mapping[str, tuple[int, int]],
    types: Mapping[str, str],
    llama_cpp: LlamaCpp,
) -> dict[str, str]:
    """The weights that llama.cpp's converter changes by more than moving rows, or joins with others
    that are to have another type, with the reason.

    Layers whose weights have the same names and types are converted alike, so one of each kind is
    tried.

    Args:
        shapes: (n, m) of the weights that are to be rounded, by checkpoint name.
        types: the types that they are to have in the file.
    """
    new_converter = partial(llama_cpp.converter, checkpoint)
    tried: dict[frozenset[tuple[str, str]], dict[str, str]] = {}
    refused: dict[str, str] = {}
    for names in _by_layer(shapes).values():
        alike = frozenset((_kind(name), types[name]) for name in names)
        if alike not in tried:
            layer = {name: shapes[name] for name in names}
            found = _unexportable_in_layer(new_converter, layer, types)
            tried[alike] = {_kind(name): reason for name, reason in found.items()}
        reasons = tried[alike]
        refused |= {name: reasons[_kind(name)] for name in names if _kind(name) in reasons}
    return refused


def require_known_metadata(checkpoint: Path, llama_cpp: LlamaCpp) -> None:
    """Raises :class:`Pt2Error` unless the converter knows the checkpoint's architecture, and can
    write its parameters and vocabulary."""
    try:
        converter = llama_cpp.converter(checkpoint)
        converter.set_gguf_parameters()
    except Pt2Error:
        raise
    except Exception as error:  # whatever config.json makes the converter raise
        raise Pt2Error(
            f"llama.cpp's converter does not understand {checkpoint / 'config.json'} "
            f"({_summary(error)}): use that of the model that the checkpoint was made from"
        ) from error
    try:
        converter.set_vocab()
    except Exception as error:  # whatever the tokenizer's files make the converter raise
        raise Pt2Error(
            f"llama.cpp's converter cannot write the vocabulary of {checkpoint} "
            f"({_summary(error)}): use the tokenizer files of the model that the checkpoint was "
            "made from"
        ) from error


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")


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


def _unexportable_in_layer(
    new_converter: Callable[[], Any],
    shapes: Mapping[str, tuple[int, int]],
    types: Mapping[str, str],
) -> dict[str, str]:
    """Tries again without what was refused, as the converter may refuse others for that."""
    refused: dict[str, str] = {}
    while left := {name: shape for name, shape in shapes.items() if name not in refused}:
        found = _try_layer(new_converter(), left, types)
        if not found:
            break
        refused |= found
    return refused


def _try_layer(
    converter: Any, shapes: Mapping[str, tuple[int, int]], types: Mapping[str, str]
) -> dict[str, str]:
    """The weights of one layer that do not survive as rows, with the reason."""
    by_number = dict(enumerate(shapes.values()))
    names = list(shapes)
    refused: dict[str, str] = {}
    seen: set[str] = set()
    with torch.inference_mode():
        for number, (name, shape) in enumerate(shapes.items()):
            known_as = converter_name(converter, name)
            if known_as is None:
                refused[name] = "llama.cpp's converter leaves it out"
                continue
            numbered = numbered_elements(number, shape)
            try:
                for new_name, arrived in converted(converter, known_as, numbered):
                    numbers = read_rows(new_name, arrived, by_number).weight.unique().tolist()
                    together = [names[origin] for origin in numbers]
                    seen.update(together)
                    if len({types[origin] for origin in together}) > 1:
                        reason = "llama.cpp's converter joins it with a matrix of another type"
                        refused |= dict.fromkeys(together, reason)
            except Pt2Error:
                refused[name] = "llama.cpp's converter does more to it than moving rows"
            except Exception as error:  # whatever the converter does to what is not a weight
                refused[name] = f"llama.cpp's converter cannot move its rows ({error})"
    for name in shapes:
        if name not in seen:
            refused.setdefault(name, "llama.cpp's converter joins it with what stays as it is")
    return refused
