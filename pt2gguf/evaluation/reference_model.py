"""The model that a GGUF file stands for, as transformers runs it in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pt2gguf.evaluation.file_weights import open_gguf, read_file_weights, require_same_vocabulary
from pt2gguf.export.llama_cpp import LlamaCpp
from pt2gguf.model import Checkpoint, load_model


def load_file_model(checkpoint: Checkpoint, file: Path, llama_cpp: LlamaCpp) -> Any:
    """The model that the GGUF file `file` stands for, in the shape of its checkpoint.

    Raises Pt2Error for a file that was not made from `checkpoint`.
    """
    reader = open_gguf(file, llama_cpp.gguf)
    require_same_vocabulary(checkpoint, file, reader, llama_cpp)
    return load_model(checkpoint, read_file_weights(checkpoint, file, reader, llama_cpp))
