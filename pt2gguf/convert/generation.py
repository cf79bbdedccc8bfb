"""Text that a model writes, one token after the other, for many windows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import FloatTensor, Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutputWithPast

from pt2gguf.convert.sampling import draw
from pt2gguf.replay import replayed_if_possible

GROUPED = "pt2gguf_grouped"


def continue_text(
    model: Any, first: Tensor, length: int, never: list[int], generator: torch.Generator
) -> Tensor:
    """(windows, length) int64: `first` (windows, 1), and what `model` says next, at temperature 1.

    model: a PreTrainedModel, which is changed to be faster at this; never: tokens that are not
    drawn; generator: of the CPU.
    """
    _use_grouped_attention(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=length - 1,
        suppress_tokens=never or None,
        pad_token_id=0,
    )
    model.get_compiled_call = lambda _: _ReplayedCall(model)
    try:
        ids: Tensor = model.generate(
            first,
            attention_mask=torch.ones_like(first),
            past_key_values=_cache(model, length, first.is_cuda),
            logits_processor=LogitsProcessorList([_Drawn(generator)]),
        )
    finally:
        del model.get_compiled_call  # which would keep the model in memory
    return ids


def _use_grouped_attention(model: PreTrainedModel) -> None:
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
    batch, heads, tokens, width = query.shape
    assert tokens == 1
    grouped = query.reshape(batch, key.shape[1], -1, width)
    mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
    output = nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, scale=scaling
    )
    return output.reshape(batch, 1, heads, -1), None


class _Drawn(LogitsProcessor):
    """Leaves nothing but a token that is drawn, for generation that takes the likeliest.

    generator: of the CPU.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Of input_ids (batch, length) and scores (batch, vocabulary); gives new scores."""
        tokens = draw(scores.float().softmax(-1), self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def _cache(model: Any, length: int, on_gpu: bool) -> DynamicCache | StaticCache | None:
    """For `length` tokens; None for architectures that have a kind of their own."""
    if not model._supports_default_dynamic_cache():
        return None
    if on_gpu and model._can_compile_fullgraph:
        # Transformers would compile the model for this one, and asks `_ReplayedCall` instead.
        static = StaticCache(model.config, max_cache_len=length)
        if all(type(layer) is StaticLayer for layer in static.layers):
            return static
    return _roomy_cache(model.config, length)


class _ReplayedCall:
    """Calls a model, by a CUDA graph if possible: launching kernels takes longer than they do."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._call: Callable[..., CausalLMOutputWithPast] | None = None

    def __call__(self, **inputs: Any) -> CausalLMOutputWithPast:
        """Of the inputs, tensors alone may be others than the first time."""
        self._call = self._call or _replayed(self._model, inputs)
        return self._call(**inputs)


def _replayed(model: Any, inputs: dict[str, Any]) -> Callable[..., CausalLMOutputWithPast]:
    """`model` for inputs like these as a graph, or `model` itself."""
    leaves, structure = tree_flatten(inputs, is_leaf=_is_cache)

    def forward(*tensors: Tensor) -> tuple[Tensor]:
        given = iter(tensors)
        filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return (model(**tree_unflatten(filled, structure)).logits,)

    def tensors_of(inputs: dict[str, Any]) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(inputs, _is_cache) if isinstance(leaf, Tensor)]

    replayed = replayed_if_possible(forward, *tensors_of(inputs))
    if replayed is None:
        return cast(Callable[..., CausalLMOutputWithPast], model)

    def logits_of(**inputs: Any) -> CausalLMOutputWithPast:
        (logits,) = replayed(*tensors_of(inputs))
        return CausalLMOutputWithPast(
            logits=cast(FloatTensor, logits), past_key_values=inputs["past_key_values"]
        )

    return logits_of


def _is_cache(value: object) -> bool:
    return isinstance(value, Cache)


def _roomy_cache(config: Any, length: int) -> DynamicCache:
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
