"""A Hugging Face checkpoint on disk, and its model: one decoder layer at a time, or whole."""

from pt2gguf.model.checkpoint import Checkpoint
from pt2gguf.model.skeleton import LayerCall, Skeleton
from pt2gguf.model.whole import load_model

__all__ = ["Checkpoint", "LayerCall", "Skeleton", "load_model"]
