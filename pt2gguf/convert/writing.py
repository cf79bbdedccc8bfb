"""Text that the full-precision model writes, for its ternary version to be tuned on.

A model's own samples are spread as its training text was, which no calibration file is, and its
next-token distributions there are what the ternary model must reproduce. (Data-free distillation:
LLM-QAT, Liu et al. 2023.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pt2gguf.convert.calibration import Calibration
from pt2gguf.convert.generation import continue_text
from pt2gguf.convert.machine import computes_bfloat16
from pt2gguf.convert.progress import Reporter
from pt2gguf.convert.resources import (
    CUDA_LIBRARIES,
    FLOAT32,
    LOGITS,
    READING,
    Needs,
    require_memory,
)
from pt2gguf.model import Checkpoint, load_model

LONGEST = 512  # tokens: what is enough to vary, and the keys and values of which fit in memory
CACHE_BYTES = 2**33  # of keys and values at once, unless a single window needs more


@torch.no_grad()
def write_text(
    checkpoint: Checkpoint,
    windows: int,
    calibration: Calibration,
    device: torch.device,
    reporter: Reporter,
) -> Tensor:
    """(windows, length) int64: samples of the model at temperature 1.

    They are as long as the calibration's windows, 512 tokens at the most, follow from its seed, and
    start with the model's first token or, where it has none, with first tokens of the calibration
    windows. The whole model is in memory, in bfloat16 where the machine computes with that.
    Raises Pt2Error if it does not fit.
    """
    begun = time.monotonic()
    length = written_length(calibration.ids.shape[1])
    dtype = torch.bfloat16 if computes_bfloat16(device) else torch.float32
    config = checkpoint.config
    window_bytes = _cache_bytes(config, length, dtype.itemsize)
    batch = max(1, min(windows, CACHE_BYTES // window_bytes))
    on_gpu = device.type == "cuda"
    require_memory(
        _needs(
            [tensor.elements for tensor in checkpoint.tensors.values()],
            dtype.itemsize,
            batch * (window_bytes + LOGITS * config.vocab_size * FLOAT32),
            on_gpu,
        ),
        device,
        "to let the whole model write text: use --written 0 to tune on the calibration text alone",
    )
    reporter.note(f"the model writes {windows} windows of {length} tokens to be calibrated on")
    model = load_model(checkpoint, {}, device, dtype)
    starts = _first_tokens(config, calibration.ids, windows).to(device)
    generator = torch.Generator().manual_seed(calibration.provenance.get("seed") or 0)
    parts = [
        continue_text(model, part, length, _end_tokens(config), generator).cpu()
        for part in starts.split(batch)
    ]
    if on_gpu:
        del model
        torch.cuda.empty_cache()  # what is cached counts as taken when others ask for room
    seconds = time.monotonic() - begun
    reporter.note(f"it has written them in {seconds:.0f} s")
    return torch.cat(parts)


def written_length(calibration_length: int) -> int:
    """Tokens in a window that the model writes."""
    return min(calibration_length, LONGEST)


def _needs(elements: Sequence[int], item: int, writing: int, on_gpu: bool) -> Needs:
    """elements: of each of the model's tensors; writing: bytes besides the model."""
    model = sum(elements) * item + writing
    reading = max(elements) * READING
    if on_gpu:
        return Needs(host=CUDA_LIBRARIES + reading, gpu=model, disk=0)
    return Needs(host=reading + model, gpu=0, disk=0)


def _cache_bytes(config: Any, length: int, item: int) -> int:
    """Of the keys and values of one window."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * key_heads * width * length * item


def _end_tokens(config: Any) -> list[int]:
    end = config.eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]


def _first_tokens(config: Any, ids: Tensor, windows: int) -> Tensor:
    """(windows, 1) int64."""
    if config.bos_token_id is not None:
        return torch.full((windows, 1), config.bos_token_id)
    return ids[torch.arange(windows) % len(ids), :1]
