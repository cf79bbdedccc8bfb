"""llama.cpp's converter and gguf-py, imported from the pinned source tree."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pt2gguf.errors import Pt2Error
from pt2gguf.export.stock_types import Ggml
from pt2gguf.native.installation import Installation


@dataclass(frozen=True)
class LlamaCpp:
    """The converter's modules, and ggml's library.

    They are the source tree's: the released gguf package knows fewer types. gguf quantizes to all
    stock types.
    """

    conversion: ModuleType
    gguf: ModuleType
    ggml: Ggml

    def model_class(self, checkpoint: Path) -> type[Any]:
        """The converter's class for the architecture; raises :class:`Pt2Error` if it has none."""
        return type(self.converter(checkpoint))

    def converter(self, checkpoint: Path) -> Any:
        """A converter for the checkpoint, to ask what it does to tensors; raises as `model_class`
        does."""
        hparams = self.conversion.ModelBase.load_hparams(checkpoint, False)
        kind = self.conversion.ModelType.TEXT
        architecture = "unknown"
        try:
            architecture = self.conversion.get_model_architecture(hparams, kind)
            found = self.conversion.get_model_class(architecture)
        except (NotImplementedError, ValueError):
            raise Pt2Error(
                f"llama.cpp's converter does not know the architecture {architecture} of "
                f"{checkpoint}: only models that llama.cpp can run can be converted"
            ) from None
        with torch.inference_mode():
            converter = found(checkpoint, self.gguf.LlamaFileType.MOSTLY_F16, Path(os.devnull))
        # A converter of several kinds of model leaves all of it to another one.
        return getattr(converter, "impl", converter)


def converter_name(converter: Any, name: str) -> str | None:
    """The name under which a converter, or its class, handles the checkpoint's tensor `name`; None
    if it leaves that out."""
    kept = converter.filter_tensors((name, lambda: torch.empty(0)))
    return kept[0] if kept else None


def converted(converter: Any, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """What the converter makes of the tensor that it knows as `name`, with the GGUF names.

    As the converter's own loop: the first number in a name is the layer's.
    """
    block_index = next((int(part) for part in name.split(".") if part.isdecimal()), None)
    found: Iterable[tuple[str, Tensor]] = converter.modify_tensors(tensor, name, block_index)
    return found


def import_llama_cpp(installation: Installation) -> LlamaCpp:
    """Imports ``conversion`` and ``gguf`` from the installation's source tree."""
    source = Path(installation.source)
    loaded = sys.modules.get("gguf")
    if loaded is not None and not str(loaded.__file__).startswith(str(source)):
        raise Pt2Error(
            f"another gguf package was imported first ({loaded.__file__}): import pt2gguf.export "
            "before it, or use the command line"
        )
    for directory in (source, source / "gguf-py"):
        if str(directory) not in sys.path:
            sys.path.insert(0, str(directory))
    conversion = importlib.import_module("conversion")
    # The converter reports every tensor, and warns of much that is no concern of the user's.
    for logger in ("hf-to-gguf", "gguf"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    gguf = importlib.import_module("gguf")
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    prefix = "" if sys.platform == "win32" else "lib"
    ggml = Ggml(gguf, Path(installation.bin) / f"{prefix}ggml-base{suffix}")
    ggml.teach_gguf_py()
    return LlamaCpp(conversion=conversion, gguf=gguf, ggml=ggml)
