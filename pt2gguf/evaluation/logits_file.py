"""The file of log-probabilities that ``llama-perplexity --kl-divergence`` compares with.

The format is that of tools/perplexity/perplexity.cpp: for every window, the log-probabilities of
all tokens at the positions of its second half, in 16 bits between the smallest (at least the
largest minus 16) and the largest.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor


def write_logits_file(path: Path, model: Any, windows: Tensor, bos: int | None) -> float:
    """Runs `model` over `windows` and writes its log-probabilities.

    The format clips what is less likely than e^-16 of the likeliest token, and so the perplexity
    that llama-perplexity reports for the file; the returned one is exact.

    Args:
        model: a causal language model of transformers.
        windows: (count, length) int64 token ids.
        bos: replaces the first token of each window in the input, as llama-perplexity does for
            models that want it; None for others.

    Returns:
        The perplexity over the positions that were written.
    """
    count, length = windows.shape
    losses = []
    with path.open("wb") as file, torch.inference_mode():
        header_written = False
        for window in windows:
            tokens = window.clone()
            if bos is not None:
                tokens[0] = bos
            logits = model(tokens[None]).logits[0, length // 2 : length - 1].float()
            if not header_written:
                file.write(b"_logits_" + struct.pack("<Iii", length, logits.shape[1], count))
                file.write(windows.numpy().astype("<i4").tobytes())
                header_written = True
            _write_positions(file, logits.numpy())
            targets = window[length // 2 + 1 :]
            losses.append(torch.nn.functional.cross_entropy(logits.double(), targets).item())
    return float(np.exp(np.mean(losses)))


def _write_positions(file: IO[bytes], logits: np.ndarray) -> None:
    positions, vocabulary = logits.shape
    high = logits.max(axis=1, keepdims=True)
    low = np.maximum(logits.min(axis=1, keepdims=True), high - 16)
    log_sum = np.log(np.exp((logits - high).astype(np.float64)).sum(axis=1, keepdims=True))
    scale = (high - low) / np.float32(65535)
    rows = np.zeros((positions, 4 + 2 * ((vocabulary + 1) // 2)), dtype="<u2")
    rows[:, 0:2] = scale.astype("<f4").view("<u2")
    rows[:, 2:4] = (low - high - log_sum).astype("<f4").view("<u2")
    steps = np.rint((np.maximum(logits, low) - low) / np.where(scale > 0, scale, 1))
    rows[:, 4 : 4 + vocabulary] = steps.astype("<u2")
    file.write(rows.tobytes())
