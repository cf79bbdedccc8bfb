"""The whole model of a checkpoint in memory, as transformers runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from pt2gguf.model.checkpoint import Checkpoint


def load_model(
    checkpoint: Checkpoint, replaced: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Any:
    """The model on the CPU, with `replaced` (by checkpoint name) for some weights.

    Raises Pt2Error as `Checkpoint.read` does.
    """
    weights = {
        name: (replaced[name] if name in replaced else checkpoint.read(name)).to(dtype)
        for name in checkpoint.tensors
    }
    with init_empty_weights():
        model_class = type(AutoModelForCausalLM.from_config(checkpoint.config))
    model = model_class.from_pretrained(
        None, config=checkpoint.config, state_dict=weights, dtype=dtype
    )
    return model.eval()
