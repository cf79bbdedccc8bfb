"""Where the patched llama.cpp of this environment is."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pt2gguf.errors import Pt2Error

LLAMA_CPP_PYTHON_VERSION = "0.3.36"
"""The release whose sdist carries the pinned llama.cpp (cmake/pin.cmake)."""

_RECORD = Path(sys.prefix) / "share" / "pt2gguf" / "native.json"
_REMEDY = "run 'pt2gguf build'"


@dataclass(frozen=True)
class Installation:
    """A finished build."""

    bin: str
    """Directory of the tools and libraries."""
    source: str
    """The patched source tree; carries llama.cpp's converter and gguf-py."""
    version: str
    """The llama-cpp-python release that the build belongs to."""

    def tool(self, name: str) -> Path:
        """The path of a tool such as ``llama-quantize``."""
        path = Path(self.bin) / name
        if not path.is_file():
            raise Pt2Error(f"{path} is missing from the build of llama.cpp: {_REMEDY} again")
        return path

    def save(self) -> None:
        """Makes this the build that :func:`find_installation` finds in this environment."""
        _RECORD.parent.mkdir(parents=True, exist_ok=True)
        _RECORD.write_text(json.dumps(asdict(self), indent=2) + "\n")


def find_installation() -> Installation:
    """The build of this environment; raises :class:`Pt2Error` if there is none that fits."""
    try:
        installation = Installation(**json.loads(_RECORD.read_text()))
    except FileNotFoundError:
        raise Pt2Error(f"llama.cpp is not built for {sys.prefix}: {_REMEDY}") from None
    except (ValueError, TypeError):
        raise Pt2Error(f"{_RECORD} is not readable: {_REMEDY} again") from None
    if installation.version != LLAMA_CPP_PYTHON_VERSION:
        raise Pt2Error(
            f"the llama.cpp in {installation.bin} is of llama-cpp-python {installation.version}, "
            f"and this pt2gguf needs {LLAMA_CPP_PYTHON_VERSION}: {_REMEDY} again"
        )
    if not Path(installation.source, "conversion").is_dir():
        raise Pt2Error(f"the llama.cpp source {installation.source} is gone: {_REMEDY} again")
    return installation
