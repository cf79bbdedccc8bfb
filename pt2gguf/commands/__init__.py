"""The commands of ``pt2gguf``, one module each: its options, and what it does."""
