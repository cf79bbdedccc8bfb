"""The work directory: one safetensors file of ternary weights for each finished decoder layer."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pt2gguf.blocks import BLOCK_SIZE, pack_digits_2bit, unpack_digits_2bit
from pt2gguf.convert.settings import Settings, differences
from pt2gguf.errors import Pt2Error
from pt2gguf.ternary import TernaryWeight

SETTINGS = "settings.json"
LOCK = "lock"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # of JSON that is not ours


@dataclass(frozen=True)
class Layer:
    """A finished decoder layer: weights by checkpoint name, and a JSON-like report for each."""

    weights: dict[str, TernaryWeight]
    reports: dict[str, dict[str, Any]]


class WorkDirectory:
    """A directory that one conversion at a time may use; locked until `close`.

    Holds settings.json and layer-0000.safetensors and so on. In these, a weight of checkpoint name
    NAME and shape (n, m) is NAME#alpha and NAME#mu, (n, m / 128) float16; NAME#digits, (n, m / 4)
    uint8, where bits 2k and 2k+1 of byte j of each 32 are the digit + 1 of column 32 k + j of the
    block (the layout of TQ2_1); and NAME#perm, (m,) int32, unless it is the identity.
    """

    def __init__(self, path: Path, settings: Settings, lock: IO[bytes]) -> None:
        """Use `create` or `open_existing`."""
        self.path = path
        self.settings = settings
        self._lock = lock

    @staticmethod
    def create(path: str | Path, settings: Settings, force: bool = False) -> WorkDirectory:
        """The work directory at `path`, made if need be, for a conversion with `settings`.

        Raises Pt2Error when it cannot be written, another process uses it, or it was begun with
        other settings, unless `force`, which discards the layers of those.
        """
        path = Path(path)
        lock = _locked(path)
        try:
            before = _read_settings(path)
            work = WorkDirectory(path, settings, lock)
            if before is None or before != settings:
                finished = sorted(path.glob("layer-*.safetensors"))
                if finished and not force:
                    raise Pt2Error(_refusal(path, before, settings))
                for file in finished:
                    file.unlink()
                _write(path / SETTINGS, settings.to_json().encode())
        except BaseException:
            lock.close()
            raise
        return work

    @staticmethod
    def open_existing(path: str | Path) -> WorkDirectory:
        """A work directory that a conversion has left, with that conversion's settings."""
        path = Path(path)
        if not (path / SETTINGS).is_file():
            raise Pt2Error(
                f"{path} is not a work directory: it has no {SETTINGS}; give one that "
                "`pt2gguf convert --keep-work` left"
            )
        lock = _locked(path)
        settings = _read_settings(path)
        if settings is None:
            lock.close()
            raise Pt2Error(f"{path / SETTINGS} cannot be read: convert again into another --work")
        return WorkDirectory(path, settings, lock)

    def close(self) -> None:
        """Let other processes use the directory."""
        self._lock.close()

    def remove(self) -> None:
        """Delete what a conversion keeps here; the directory too, if nothing else is in it."""
        for pattern in ("layer-*.safetensors", "*.part", SETTINGS, LOCK):
            for file in self.path.glob(pattern):
                file.unlink()
        with contextlib.suppress(OSError):  # not empty
            self.path.rmdir()

    def __enter__(self) -> WorkDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def kept(self) -> Mapping[str, str]:
        """Matrices in decoder layers that are not ternary: checkpoint name -> the reason."""
        return self.settings.kept

    def has_layer(self, index: int) -> bool:
        """Whether layer `index` is finished; a damaged file is one that is not."""
        return self._read(index) is not None

    def is_complete(self) -> bool:
        return all(self.has_layer(index) for index in range(self.settings.layers))

    def layer_numbers(self) -> dict[str, int]:
        """The layer of each ternary weight by checkpoint name, in layer order; from headers only.

        Raises Pt2Error if a layer is not finished.
        """
        numbers: dict[str, int] = {}
        for index in range(self.settings.layers):
            try:
                with self._file(index).open("rb") as file:
                    prefix = file.read(8)
                    header = prefix + file.read(int.from_bytes(prefix, "little"))
                numbers |= dict.fromkeys(json.loads(_description(header)[1])["order"], index)
            except (OSError, *MALFORMED):
                raise self._missing(index) from None
        return numbers

    def save_layer(self, index: int, layer: Layer) -> None:
        """Store a finished layer; it is there wholly or not at all, whatever happens meanwhile."""
        tensors: dict[str, Tensor] = {}
        for name, weight in layer.weights.items():
            tensors[f"{name}#alpha"] = weight.alpha.cpu().contiguous()
            tensors[f"{name}#mu"] = weight.mu.cpu().contiguous()
            tensors[f"{name}#digits"] = pack_digits(weight.digits.cpu())
            if weight.perm is not None:
                tensors[f"{name}#perm"] = weight.perm.cpu().to(torch.int32)
        content = json.dumps(
            {"layer": index, "reports": layer.reports, "order": list(layer.weights)}, sort_keys=True
        )
        # One key only: safetensors writes several in an order that changes from run to run.
        metadata = {"pt2gguf": json.dumps([_digest(content, tensors), content])}
        _write(self._file(index), save(tensors, metadata))

    def load_layer(self, index: int) -> Layer:
        """The finished layer `index`. Raises Pt2Error if it is not there or damaged."""
        found = self._read(index)
        if found is None:
            raise self._missing(index)
        content, tensors = found
        weights = {name: _unpack(tensors, name) for name in content["order"]}
        return Layer(weights, content["reports"])

    def _file(self, index: int) -> Path:
        return self.path / f"layer-{index:04d}.safetensors"

    def _missing(self, index: int) -> Pt2Error:
        return Pt2Error(
            f"{self._file(index)} is missing or damaged: run the same conversion again, which "
            "makes what is missing"
        )

    def _read(self, index: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What `save_layer` wrote, as it was packed; None unless every byte of it is there."""
        try:
            raw = self._file(index).read_bytes()
            tensors = load(raw)
            digest, description = _description(raw)
            if digest != _digest(description, tensors):
                return None
            content: dict[str, Any] = json.loads(description)
            return (content, tensors) if content["layer"] == index else None
        except (OSError, SafetensorError, *MALFORMED):
            return None


def pack_digits(digits: Tensor) -> Tensor:
    """(n, m) int8 in {-1, 0, 1} -> (n, m / 4) uint8 in the layout of `WorkDirectory`."""
    blocks = (digits + 1).to(torch.uint8).view(len(digits), -1, BLOCK_SIZE)
    return torch.from_numpy(pack_digits_2bit(blocks.numpy())).view(len(digits), -1)


def unpack_digits(packed: Tensor) -> Tensor:
    """The inverse of `pack_digits`."""
    blocks = packed.view(len(packed), -1, BLOCK_SIZE // 4)
    digits = torch.from_numpy(unpack_digits_2bit(blocks.numpy())).view(len(packed), -1)
    return digits.to(torch.int8) - 1


def _unpack(tensors: Mapping[str, Tensor], name: str) -> TernaryWeight:
    perm = tensors.get(f"{name}#perm")
    return TernaryWeight(
        alpha=tensors[f"{name}#alpha"],
        mu=tensors[f"{name}#mu"],
        digits=unpack_digits(tensors[f"{name}#digits"]),
        perm=None if perm is None else perm.long(),
    )


def _description(raw: bytes) -> list[str]:
    """[digest, JSON] from the start of a layer's file."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"]["pt2gguf"])


def _digest(content: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write a file under its name only once all of it is on the disk."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise Pt2Error(
            f"{path} cannot be written ({error.strerror}): free space, or choose another --work "
            "directory; finished layers are kept"
        ) from error


def _locked(path: Path) -> IO[bytes]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("wb")
    except OSError as error:
        raise Pt2Error(
            f"work directory {path} cannot be written ({error.strerror}): choose another --work "
            "directory"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise Pt2Error(
            f"work directory {path} is in use by another conversion: wait for it, or choose "
            "another --work directory"
        ) from None
    return lock


def _read_settings(path: Path) -> Settings | None:
    try:
        return Settings.from_json((path / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _refusal(path: Path, before: Settings | None, now: Settings) -> str:
    found: Iterable[str] = ["its settings cannot be read"]
    if before is not None:
        found = differences(before, now)
    return (
        f"work directory {path} was begun with other settings ({'; '.join(found)}): choose another "
        "--work directory, or --force to discard its layers"
    )
