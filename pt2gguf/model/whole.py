"""The whole model of a checkpoint in memory, as transformers runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pt2gguf.model.checkpoint import Checkpoint
from pt2gguf.model.weights import empty_model, fill, moved, stored_names

CPU = torch.device("cpu")


def load_model(
    checkpoint: Checkpoint,
    replaced: Mapping[str, Tensor],
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The model on `device`, with `replaced` (by checkpoint name) for some weights.

    Each weight goes there as it is read: a GPU's model is never on the host as a whole.
    Raises Pt2Error as `Checkpoint.read` does, and if config and weights do not belong together.
    """
    model = empty_model(checkpoint, dtype)
    names = stored_names(model, checkpoint)
    fill(model, "", checkpoint, names, device, replaced=replaced)
    return moved(model, device)
