"""The model that a ternary GGUF file stands for, as transformers runs it in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.model import Checkpoint


def load_reference_model(
    checkpoint: Checkpoint,
    work: WorkDirectory,
    file: Path,
    gguf: ModuleType,
    gguf_name: Callable[[str], str | None],
) -> Any:
    """The checkpoint with the values that `file` was written from.

    The ternary weights come from the work directory, in the checkpoint's own row and column order,
    so that a mistake in the file's order shows. Embeddings and head, which no order touches, are
    dequantized from the file. Everything else is the checkpoint's.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    for index in range(work.settings.layers):
        for name, weight in work.load_layer(index).weights.items():
            parameters[name].data.copy_(weight.dequantize())
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for embedding in _embeddings(model, parameters):
        stored = tensors.get(gguf_name(embedding) or "")
        if stored is not None:
            values = gguf.quants.dequantize(stored.data, stored.tensor_type)
            parameters[embedding].data.copy_(torch.from_numpy(values.astype(np.float32)))
    return model.eval()


def _embeddings(model: Any, parameters: dict[str, Any]) -> Iterable[str]:
    ends = [model.get_input_embeddings().weight]
    if model.get_output_embeddings() is not None:
        ends.append(model.get_output_embeddings().weight)
    return [name for name, parameter in parameters.items() if any(parameter is e for e in ends)]
