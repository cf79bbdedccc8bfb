"""A causal language model without its weights, and one decoder layer at a time with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pt2gguf.errors import Pt2Error
from pt2gguf.model.checkpoint import Checkpoint
from pt2gguf.model.weights import empty_model, fill, frozen, moved, stored_names


@dataclass(frozen=True)
class LayerCall:
    """What the model's body passes to a decoder layer besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Run `layer` on hidden states (batch, length, hidden_size); gives the next ones."""
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def to(self, device: torch.device) -> LayerCall:
        return LayerCall(_to(self.args, device), _to(self.kwargs, device))


class Skeleton:
    """The model of a checkpoint on the meta device, from which layers are loaded one by one.

    config: the checkpoint's; layers: the decoder layers, without weights.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises Pt2Error for an architecture that is no causal language model of plain layers."""
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self._model = empty_model(checkpoint, torch.float32)
        self._layers_name, self.layers = _decoder_layers(self._model, self.config)
        self._body_name, self._body = _body(self._model, self._layers_name)
        self._stored_names = stored_names(self._model, checkpoint)
        self._layers_give_tuples = False  # what the body expects of them; known after `embed`

    def __len__(self) -> int:
        return len(self.layers)

    def stored_name(self, index: int, parameter: str) -> str:
        """The checkpoint's name of a parameter or buffer of decoder layer `index`."""
        name = f"{self._layers_name}.{index}.{parameter}"
        return self._stored_names.get(name, name)

    def body_parameters(self) -> int:
        """How many parameters the model has outside of its decoder layers and its head."""
        inside = {id(p) for p in self.layers.parameters()}
        return sum(p.numel() for p in self._body.parameters() if id(p) not in inside)

    def load_layer(
        self, index: int, device: torch.device, without: Collection[str] = ()
    ) -> nn.Module:
        """Decoder layer `index` with float32 weights on `device`, for inference.

        without: checkpoint names of weights that are to stay on the meta device.
        """
        layer = copy.deepcopy(self.layers[index])
        self._fill(
            layer,
            f"{self._layers_name}.{index}",
            device,
            lambda name: self.stored_name(index, name) not in without,
        )
        return moved(layer, device)

    @torch.no_grad()
    def embed(self, ids: Tensor, batch: int) -> tuple[Tensor, dict[int, list[LayerCall]]]:
        """What enters the decoder layers when the model reads `ids` (samples, length) int64.

        Gives the first layer's hidden states (samples, length, hidden_size), float32 on the CPU,
        and for each size of batch that occurs (`batch`, and what is left for the last one) the
        call of every layer. Raises Pt2Error where the layers are not a chain, or depend on the
        tokens by more than the hidden states.
        """
        # In its place at once: parts and their concatenation would be twice as much.
        hidden = torch.empty(*ids.shape, self.config.hidden_size, dtype=torch.float32)
        calls: dict[int, list[LayerCall]] = {}
        with self._body_weights():
            for part, place in zip(ids.split(batch), hidden.split(batch), strict=True):
                inputs, part_calls = self._record(part)
                known = calls.setdefault(len(part), part_calls)
                if not _same(
                    [(c.args, c.kwargs) for c in known], [(c.args, c.kwargs) for c in part_calls]
                ):
                    raise Pt2Error(
                        f"the decoder layers of architecture {self.config.model_type!r} read the "
                        "tokens by another way than the hidden states, which is not supported: "
                        "choose another model"
                    )
                place.copy_(inputs)
        return hidden, calls

    def head(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The function from what the last decoder layer gives to logits, on `device`.

        It takes hidden states (batch, length, hidden_size), gives (batch, length, vocab_size), both
        float32, and can be differentiated. Call `embed` first.
        """
        model = copy.deepcopy(self._model)
        layers = list(model.get_submodule(self._layers_name).children())
        inside = f"{self._layers_name}."
        self._fill(model, "", device, lambda name: not name.startswith(inside))
        moved(model, device)

        def logits(hidden: Tensor) -> Tensor:
            output = (hidden,) if self._layers_give_tuples else hidden
            for layer in layers:
                layer.forward = lambda *args, **kwargs: output
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=device)
            mask = torch.ones_like(ids)
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

        return logits

    def _fill(
        self, module: nn.Module, prefix: str, device: torch.device, wanted: Callable[[str], bool]
    ) -> None:
        fill(module, prefix, self.checkpoint, self._stored_names, device, wanted=wanted)

    def _record(self, ids: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """Run the body with layers that pass hidden states through; what each was called with."""
        try:
            return _record_as(self._body, self.layers, ids, self._layers_give_tuples)
        except _TupleExpected:
            self._layers_give_tuples = True
            return _record_as(self._body, self.layers, ids, as_tuple=True)

    @contextmanager
    def _body_weights(self) -> Iterator[None]:
        """The body with the weights of everything but its decoder layers."""
        inner = self._layers_name.removeprefix(f"{self._body_name}.")
        self._fill(
            self._body,
            self._body_name,
            torch.device("cpu"),
            lambda name: not name.startswith(f"{inner}."),
        )
        try:
            yield
        finally:
            for module_name, module in self._body.named_modules():
                if not f"{module_name}.".startswith(f"{inner}."):
                    for key, parameter in module._parameters.items():
                        if parameter is not None:
                            module._parameters[key] = frozen(parameter.to("meta"))


def _decoder_layers(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """The outermost list of `num_hidden_layers` modules; of several, the one of most weights."""
    count = getattr(config, "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outermost = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outermost:
        raise Pt2Error(
            f"architecture {config.model_type!r} has no list of {count} decoder layers, so it "
            "cannot be converted layer by layer: choose another model"
        )
    return max(outermost.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _body(model: PreTrainedModel, layers_name: str) -> tuple[str, nn.Module]:
    """The innermost model that holds the decoder layers: it runs them, but not the head."""
    holders = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        and layers_name.startswith(f"{name}." if name else "")
    ]
    return holders[-1]


class _TupleExpected(Exception):  # noqa: N818 - a signal, not a failure
    """The body takes element 0 of what a decoder layer returns."""


def _record_as(
    body: nn.Module, layers: nn.ModuleList, ids: Tensor, as_tuple: bool
) -> tuple[Tensor, list[LayerCall]]:
    first: list[Tensor] = []
    calls: list[LayerCall] = []

    def pass_through(*args: Any, **kwargs: Any) -> Any:
        hidden, call = _split(args, kwargs)
        if first and hidden is not first[0]:
            if not as_tuple and len(calls) == 1:
                raise _TupleExpected
            raise Pt2Error(
                f"decoder layer {len(calls)} of {type(body).__name__} does not read what the layer "
                "before it wrote, which is not supported: choose another model"
            )
        first.append(hidden)
        calls.append(call)
        return (hidden,) if as_tuple else hidden

    # The forward of the instance is replaced, not the layer: bodies read attributes of layers.
    for layer in layers:
        layer.forward = pass_through
    try:
        # An explicit mask of ones lets attention take its causal kernel, without a matrix.
        body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    if len(calls) != len(layers):
        raise Pt2Error(
            f"{type(body).__name__} ran {len(calls)} of its {len(layers)} decoder layers, which is "
            "not supported: choose another model"
        )
    return first[0], calls


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, LayerCall]:
    if args:
        return args[0], LayerCall(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), LayerCall((), rest)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(entry, device) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to(entry, device) for entry in value)
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b)
