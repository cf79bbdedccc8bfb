"""A Hugging Face checkpoint directory: its config, and its tensors read one at a time."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers import __version__ as transformers_version

from pt2gguf.errors import Pt2Error, first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Language models that transformers has only with images, and what they are on text alone, where all
# sections of a rotary embedding count the same positions.
ON_TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
FLOAT_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
FINGERPRINT_BYTES = 4096  # of each tensor


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its bytes are [start, start + size) of the file `shard`."""

    name: str
    shard: Path
    dtype: str  # as safetensors spells it, e.g. "BF16"
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Checkpoint:
    """A checkpoint directory whose shards are all there and complete.

    path: the directory; config: the model's configuration, of one that reads more than text that of
    its language model; tensors: every stored tensor by name.
    """

    def __init__(self, path: str | Path) -> None:
        """Read config, index and shard headers; no tensor data.

        Raises Pt2Error for a directory that holds no model, a missing or truncated shard, an
        architecture that transformers does not know, or weights that are already quantized.
        """
        self.path = Path(path)
        self._config_bytes = _config_bytes(self.path)
        self.config = _load_config(self.path, self._config_bytes)
        self.tensors = _stored_tensors(self.path)

    def read(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The tensor `name` on `device`. Raises Pt2Error unless all of it is finite."""
        stored = self.tensors.get(name)
        if stored is None:
            raise Pt2Error(
                f"{self.path} has no tensor {name}, which its architecture "
                f"({self.config.model_type}) needs: download the checkpoint again"
            )
        tensor = self._read(stored)
        if tensor.numel() and not all(torch.isfinite(end) for end in tensor.aminmax()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise Pt2Error(
                f"tensor {name} in {stored.shard} holds {bad} values that are NaN or "
                "infinite: the checkpoint is damaged, download or train it again"
            )
        return tensor.to(device).to(dtype)

    def read_all(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor on the CPU) for each of `names`, one at a time."""
        for name in names:
            yield name, self.read(name)

    def fingerprint(self) -> str:
        """A hash of the config and of each tensor's name, type, shape and first 4 KiB.

        Cheap for any size of model, does not depend on where the directory lies, and tells
        fine-tunes of one model apart, whose headers are the same.
        """
        digest = hashlib.sha256(self._config_bytes)
        for name in sorted(self.tensors):
            stored = self.tensors[name]
            digest.update(json.dumps([name, stored.dtype, stored.shape]).encode())
            with stored.shard.open("rb") as file:
                file.seek(stored.start)
                digest.update(file.read(min(stored.size, FINGERPRINT_BYTES)))
        return digest.hexdigest()

    def _read(self, stored: StoredTensor) -> Tensor:
        """As it is stored."""
        dtype = FLOAT_TYPES.get(stored.dtype)
        if dtype is None:
            raise Pt2Error(
                f"tensor {stored.name} in {stored.shard} is stored as {stored.dtype}: only F16, "
                "BF16 and F32 checkpoints can be converted, so start from the unquantized model"
            )
        tensor = torch.empty(stored.shape, dtype=dtype)
        if not stored.size:
            return tensor
        with stored.shard.open("rb") as file:
            file.seek(stored.start)
            if file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != stored.size:
                raise Pt2Error(
                    f"{stored.shard} ended while tensor {stored.name} was read: the file has "
                    "changed since the conversion began, so start again once it is complete"
                )
        return tensor


def _config_bytes(path: Path) -> bytes:
    if not path.is_dir():
        raise Pt2Error(f"{path} is not a directory: give the directory of a Hugging Face model")
    try:
        return (path / "config.json").read_bytes()
    except FileNotFoundError:
        raise Pt2Error(
            f"{path} is not a model directory: it has no config.json; give the directory that "
            "`huggingface-cli download` or save_pretrained() made"
        ) from None


def _load_config(path: Path, raw: bytes) -> PretrainedConfig:
    try:
        values = json.loads(raw)
    except ValueError as error:
        raise Pt2Error(f"{path / 'config.json'} is not JSON ({error}): download it again") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise Pt2Error(
            f"{path / 'config.json'} names no model_type, so the architecture is unknown: give a "
            "model saved by transformers"
        )
    if "quantization_config" in values:
        quantized = values["quantization_config"].get("quant_method", "an unnamed method")
        raise Pt2Error(
            f"{path} is already quantized (quantization_config says {quantized}): convert the "
            "original fp16, bf16 or fp32 checkpoint"
        )
    try:
        config = AutoConfig.from_pretrained(
            path, trust_remote_code=False, **_rope_of_transformers_5(path, values)
        )
    except (ValueError, KeyError, OSError) as error:
        raise Pt2Error(
            f"architecture {values['model_type']!r} of {path} is not one that transformers "
            f"{transformers_version} can load ({first_line(error)[:200]}): install a transformers "
            "version that knows it, if there is one"
        ) from error
    return _language_model(config)


def _language_model(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that is about text, which may be all of it."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return config
    if kind := ON_TEXT.get(text.model_type):
        values = text.to_dict() | {"model_type": kind}
        scaling = values.pop("rope_scaling") or {}
        if scaling.get("rope_type", "default") != "default":
            values["rope_scaling"] = {k: v for k, v in scaling.items() if "mrope" not in k}
        text = CONFIG_MAPPING[kind].from_dict(values)
    if type(text) not in AutoModelForCausalLM._model_mapping:
        return config  # who wants to build it says so of the architecture that the user knows
    # One of the two may leave it out. Where a head is stored, that counts, whatever they say.
    text.tie_word_embeddings |= config.tie_word_embeddings
    return text


def _rope_of_transformers_5(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 must be told about the rotary embedding of a config from version 5.

    Version 5 writes rope_parameters where version 4 reads rope_theta and rope_scaling; without
    this, version 4 would silently use its default theta.
    """
    if isinstance(text := values.get("text_config"), dict):
        changes = _rope_of_transformers_5(path, text)
        return {"text_config": text | changes} if changes else {}
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in values:
        return {}
    if "rope_theta" not in rope:
        raise Pt2Error(
            f"{path / 'config.json'} gives rope_parameters for each kind of layer, which "
            f"transformers {transformers_version} cannot read: save the model again with "
            "transformers 4"
        )
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "partial_rotary_factor" in scaling:
        values = {"partial_rotary_factor": scaling.pop("partial_rotary_factor")}
    else:
        values = {}
    if scaling.get("rope_type", "default") != "default":
        values["rope_scaling"] = scaling
    return {"rope_theta": rope["rope_theta"], **values}


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    if (path / INDEX).is_file():
        return _sharded(path)
    if (path / SINGLE).is_file():
        return _header(path / SINGLE)
    if any(path.glob("pytorch_model*.bin")):
        raise Pt2Error(
            f"{path} holds its weights as pytorch_model.bin, which is not read because unpickling "
            "can run code: load it with transformers and save it with "
            "save_pretrained(..., safe_serialization=True)"
        )
    raise Pt2Error(
        f"{path} holds no weights: it has neither {SINGLE} nor {INDEX}; download the model again"
    )


def _sharded(path: Path) -> dict[str, StoredTensor]:
    try:
        weight_map: dict[str, str] = json.loads((path / INDEX).read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise Pt2Error(f"{path / INDEX} is not a safetensors index: download it again") from None
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            count = sum(1 for holder in weight_map.values() if holder == shard)
            raise Pt2Error(
                f"shard {path / shard} is missing: {INDEX} says that it holds {count} tensors; "
                "download it again"
            )
        stored = _header(path / shard)
        for name, holder in weight_map.items():
            if holder == shard and name not in stored:
                raise Pt2Error(
                    f"shard {path / shard} lacks tensor {name}, which {INDEX} says it holds: "
                    "index and shards are of different models; download both again"
                )
        tensors |= stored
    return tensors


def _header(shard: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, after checking that all their bytes are there."""
    actual = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or 8 + length > actual:
            raise Pt2Error(
                f"shard {shard} is truncated: its header alone needs {8 + length} bytes and the "
                f"file has {actual}; download it again"
            )
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                name,
                shard,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Pt2Error(f"{shard} is not a safetensors file: download it again") from None
    expected = max((t.start + t.size for t in tensors.values()), default=8 + length)
    if actual < expected:
        raise Pt2Error(
            f"shard {shard} is truncated: its header describes {expected} bytes and the file has "
            f"{actual}; download it again"
        )
    return tensors
