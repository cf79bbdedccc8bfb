"""A model without weights, and the stored ones put into it one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pt2gguf.errors import Pt2Error
from pt2gguf.model.checkpoint import Checkpoint

Slot = tuple[dict[str, Any], str]
"""Where a module keeps a parameter or buffer: in the dictionary, under the name."""


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint for inference, its parameters on the meta device.

    Raises Pt2Error for an architecture that is no causal language model.
    """
    config = checkpoint.config

    def build(attention: str) -> PreTrainedModel:
        # Buffers are computed for real: rotary frequencies are not in the checkpoint.
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=attention, dtype=dtype
            )

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise Pt2Error(
            f"architecture {config.model_type!r} of {checkpoint.path} is not a causal language "
            "model that transformers can build (AutoModelForCausalLM): convert a decoder model"
        )
    try:
        model = build("sdpa")
    except ValueError:  # this architecture has no sdpa
        model = build("eager")
    except ImportError as error:
        raise Pt2Error(
            f"architecture {config.model_type!r} needs a package that is not installed: {error}"
        ) from error
    return model.eval()


def stored_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's name for each of the model's tensors that is stored under another name.

    That happens when only the model's body was saved, without the prefix of the whole, where the
    model is one part of another that reads images, too, and where the head is the embeddings.
    """
    prefix = f"{model.base_model_prefix}."
    names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    stored_as = {name.replace("language_model.", ""): name for name in checkpoint.tensors}
    found = {}
    for name in names - checkpoint.tensors.keys():
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in stored_as:
                found[name] = stored_as[candidate]
                break
    module_names = {module: name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and getattr(model.config, "tie_word_embeddings", False):
        embedding_name = f"{module_names[embeddings]}.weight"
        head_name = f"{module_names[head]}.weight"
        if found.get(head_name, head_name) not in checkpoint.tensors:
            found[head_name] = found.get(embedding_name, embedding_name)
    return found


def fill(
    module: nn.Module,
    prefix: str,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    device: torch.device,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    replaced: Mapping[str, Tensor] = {},
) -> None:
    """Put stored values into parameters on the meta device, and into buffers that are stored.

    They are read one by one and keep the type that the module has for them, so the host holds one
    tensor at a time beside what is to stay there.

    Args:
        module: a part of the model, or all of it.
        prefix: of the module's names in the model.
        names: as `stored_names` gives them.
        wanted: which parameters and buffers, by their names within the module.
        replaced: values to use instead of stored ones, by checkpoint name.

    Raises:
        Pt2Error: a tensor is missing, of another shape than the model's, or not finite.
    """
    slots: dict[str, list[Slot]] = {}
    for owner_name, owner in module.named_modules():
        saved_buffers = owner._buffers.keys() - owner._non_persistent_buffers_set
        for key in [*owner._parameters, *sorted(saved_buffers)]:
            name = f"{owner_name}.{key}" if owner_name else key
            slot: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
            if slot[key] is None or not wanted(name):
                continue
            full = f"{prefix}.{name}" if prefix else name
            stored = names.get(full, full)
            if slot is owner._buffers and stored not in checkpoint.tensors:
                continue  # what the constructor computed stands
            slots.setdefault(stored, []).append((slot, key))
    for stored, of_stored in slots.items():
        slot, key = of_stored[0]
        dtype = slot[key].dtype
        # Without a name for the value, which would live on while the next one is read.
        _place(
            stored,
            replaced[stored].to(device, dtype)
            if stored in replaced
            else checkpoint.read(stored, device, dtype),
            of_stored,
        )


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` on `device`, but for what has no values yet."""
    return module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _place(stored: str, value: Tensor, slots: Sequence[Slot]) -> None:
    """Put the value stored as `stored` into the slots that share it."""
    for slot, key in slots:
        if slot[key].shape != value.shape:
            raise Pt2Error(
                f"tensor {stored} has shape {tuple(value.shape)} where config.json asks "
                f"for {tuple(slot[key].shape)}: config and weights are of different models"
            )
    slot, key = slots[0]
    placed = frozen(value) if isinstance(slot[key], nn.Parameter) else value
    for slot, key in slots:
        slot[key] = placed
