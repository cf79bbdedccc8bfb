"""Everything that determines the result of a conversion, and what differs between two."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from pt2gguf import __version__
from pt2gguf.convert.calibration import Calibration
from pt2gguf.convert.machine import describe_device
from pt2gguf.ternary import Method


@dataclass(frozen=True)
class Settings:
    """What must be equal for two conversions to give the same bytes.

    model: the checkpoint's fingerprint; layers: its decoder layers; method: every switch;
    calibration: the provenance of the ids; kept: the matrices that are neither ternary nor rounded
    to a stock type with compensation, and why; stock: those that are, and to which type;
    alternatives: types that ternary ones are rounded to as well; tool, torch, transformers:
    versions; device, threads: where it was computed, as sums depend on it.
    """

    model: str
    layers: int
    method: Mapping[str, Any]
    calibration: Mapping[str, Any]
    kept: Mapping[str, str]
    stock: Mapping[str, str]
    alternatives: Sequence[str]
    device: str
    threads: int
    tool: str = __version__
    torch: str = torch.__version__
    transformers: str = transformers.__version__

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Settings:
        """Raises ValueError for text that is not what `to_json` writes."""
        try:
            return Settings(**json.loads(text))
        except TypeError as error:
            raise ValueError(str(error)) from error


def make_settings(
    *,
    model: str,
    layers: int,
    method: Method,
    calibration: Calibration,
    kept: Mapping[str, str],
    stock: Mapping[str, str],
    alternatives: Sequence[str],
    device: torch.device,
    threads: int,
) -> Settings:
    """The settings of a conversion on this machine."""
    # Through JSON, so that they compare equal to settings that were read from a file.
    return Settings.from_json(
        Settings(
            model=model,
            layers=layers,
            method=dataclasses.asdict(method),
            calibration=calibration.provenance,
            kept=kept,
            stock=stock,
            alternatives=list(alternatives),
            device=describe_device(device),
            threads=threads,
        ).to_json()
    )


def differences(before: Settings, now: Settings) -> list[str]:
    """What differs, one phrase for each setting, e.g. "method.gptaq was 0.25 and is now 0.0"."""
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(now))
    return [
        f"{key} was {old.get(key, 'absent')} and is now {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
