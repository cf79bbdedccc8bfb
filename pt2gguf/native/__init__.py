"""The patched llama.cpp: building it, putting it in the environment, and finding it."""
