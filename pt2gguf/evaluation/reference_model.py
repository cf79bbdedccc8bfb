"""Models as transformers runs them in float32: a checkpoint's, with other weights in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from pt2gguf.evaluation.file_weights import open_gguf, read_file_weights, require_same_vocabulary
from pt2gguf.export.llama_cpp import LlamaCpp
from pt2gguf.model import Checkpoint


def load_model(checkpoint: Checkpoint, replaced: Mapping[str, Tensor]) -> Any:
    """The checkpoint's model on the CPU, with `replaced` (float32, by name) for some weights."""
    weights = {
        name: replaced[name] if name in replaced else checkpoint.read(name)
        for name in checkpoint.tensors
    }
    with init_empty_weights():
        model_class = type(AutoModelForCausalLM.from_config(checkpoint.config))
    model = model_class.from_pretrained(
        None, config=checkpoint.config, state_dict=weights, dtype=torch.float32
    )
    return model.eval()


def load_file_model(checkpoint: Checkpoint, file: Path, llama_cpp: LlamaCpp) -> Any:
    """The model that the GGUF file `file` stands for, in the shape of its checkpoint.

    Raises Pt2Error for a file that was not made from `checkpoint`.
    """
    reader = open_gguf(file, llama_cpp.gguf)
    require_same_vocabulary(checkpoint, file, reader, llama_cpp)
    return load_model(checkpoint, read_file_weights(checkpoint, file, reader, llama_cpp))
