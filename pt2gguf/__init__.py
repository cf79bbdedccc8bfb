"""pt2gguf: post-training ternarization of Hugging Face checkpoints into GGUF."""

__version__ = "0.1.0"
