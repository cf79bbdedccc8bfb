"""What makes transformers' generation, one token after the other, fast for many windows at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from pt2gguf.convert.sampling import draw

GROUPED = "pt2gguf_grouped"


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let `model`, from which only single tokens will be asked, read shared keys once."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        AttentionInterface.register(GROUPED, _grouped_attention)
        AttentionMaskInterface.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(GROUPED)


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of one new token, as transformers wants it.

    query: (batch, heads, 1, width); key, value: (batch, shared heads, length, width); gives
    (batch, 1, heads, width). The heads that share a key are the rows of one product: PyTorch's own
    way on a CPU, one row at a time, takes five times as long in bfloat16.
    """
    batch, heads, _tokens, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
    output = nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, scale=scaling
    )
    return output.reshape(batch, 1, heads, -1), None


class Drawn(LogitsProcessor):
    """Leaves nothing but a token that is drawn, for generation that takes the likeliest.

    generator: of the CPU.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Of input_ids (batch, length) and scores (batch, vocabulary); gives new scores."""
        tokens = draw(scores.float().softmax(-1), self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def roomy_cache(config: Any, length: int) -> DynamicCache:
    """For `length` tokens. Layers that see a part of the text only keep transformers' cache."""
    cache = DynamicCache(config=config)
    cache.layers = [
        _RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class _RoomyLayer(DynamicLayer):
    """One layer's keys and values, with room for all tokens from the beginning.

    transformers' own copies all of them for each new token, which takes longer than computing them.
    """

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length
        self._room: tuple[Tensor, Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Adds (batch, heads, new tokens, width); gives those of all tokens."""
        begin = self.get_seq_length()
        if begin == 0:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            self._room = self._empty(key_states), self._empty(value_states)
        end = begin + key_states.shape[-2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., begin:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values

    def _empty(self, states: Tensor) -> Tensor:
        return states.new_empty(*states.shape[:-2], self._length, states.shape[-1])
