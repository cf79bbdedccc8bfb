"""A Hugging Face checkpoint on disk, and its model with at most one decoder layer in memory."""

from pt2gguf.model.checkpoint import Checkpoint
from pt2gguf.model.skeleton import LayerCall, Skeleton

__all__ = ["Checkpoint", "LayerCall", "Skeleton"]
