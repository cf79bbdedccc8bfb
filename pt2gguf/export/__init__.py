"""From a work directory of ternary weights to a GGUF file, through llama.cpp's own converter."""
