"""Perplexity as the papers measure it, in transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pt2gguf.errors import Pt2Error

PAPER_WINDOW = 2048


def window_length(config: Any, asked: int | None) -> int:
    """`asked`, by default 2048 tokens as in the papers, or the model's context if shorter.

    Raises Pt2Error for more than the model's context.
    """
    context = getattr(config, "max_position_embeddings", None) or PAPER_WINDOW
    if asked is not None and asked > context:
        raise Pt2Error(
            f"a window of {asked} tokens is longer than the model's context of {context}: choose a "
            f"--window of at most {context}"
        )
    return asked or min(PAPER_WINDOW, context)


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor, length: int) -> float:
    """Of a text in windows of `length` tokens that do not overlap, over all their positions.

    As in GPTQ's evaluation, which the quantization papers use: a remainder shorter than a window is
    left out, and a window's first token is context only.

    Args:
        model: a causal language model of transformers.
        ids: (tokens,) int64, at least `length` of them.
    """
    windows = ids[: len(ids) // length * length].view(-1, length)
    total = 0.0
    for window in windows:
        tokens = window.to(model.device)
        logits = model(tokens[None], use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total += losses.double().sum().item()
    return math.exp(total / (windows.numel() - len(windows)))
