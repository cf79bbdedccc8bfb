"""The work directory: one safetensors file of rounded weights for each finished decoder layer."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pt2gguf.blocks import BLOCK_SIZE
from pt2gguf.convert.settings import Settings, differences
from pt2gguf.convert.symmetric import fold, is_folded, unfold
from pt2gguf.errors import Pt2Error
from pt2gguf.ternary import OutputStatistics, StockWeight, TernaryWeight

SETTINGS = "settings.json"
LOCK = "lock"
WRITTEN = "written.safetensors"
TUNING = "tuning.safetensors"
RESULTS = (
    "layer-*.safetensors",
    "outputs-*.safetensors",
    "tuned-*.safetensors",
    WRITTEN,
    TUNING,
)
# As safetensors spells the types of what is kept here.
DTYPES = {
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # of JSON that is not ours

Content = tuple[dict[str, Any], dict[str, Tensor]]
"""Of one file: what is told about its tensors, and these by name."""


@dataclass(frozen=True)
class Layer:
    """A finished decoder layer, by checkpoint name.

    weights: the ternary ones; stock: those that were rounded to a stock type; alternatives: for
    ternary ones, by type, what they would be there; reports: a JSON-like one for each rounding.
    """

    weights: dict[str, TernaryWeight] = field(default_factory=dict)
    stock: dict[str, StockWeight] = field(default_factory=dict)
    alternatives: dict[str, dict[str, StockWeight]] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedWeight:
    """A ternary weight (n, m) as it is stored.

    alpha, mu: (n, m / 128) float16; digits: (n, m / 4) uint8, see `WorkDirectory`; perm: (m,) int64
    or None.
    """

    alpha: Tensor
    mu: Tensor
    digits: Tensor
    perm: Tensor | None

    def unpack(self) -> TernaryWeight:
        return TernaryWeight(self.alpha, self.mu, unpack_digits(self.digits), self.perm)


def group_key(names: Sequence[str]) -> str:
    """What names the group of weights with these checkpoint names."""
    return " + ".join(names)


@dataclass(frozen=True)
class StoredOutputs:
    """Output statistics as they are stored: each of their parts folded."""

    parts: Sequence[Tensor]

    def on(self, device: torch.device) -> OutputStatistics:
        return OutputStatistics([unfold(part.to(device)) for part in self.parts])


class WorkDirectory:
    """A directory that one conversion at a time may use; locked until `close`.

    Holds settings.json and layer-0000.safetensors and so on. In these, a weight of checkpoint name
    NAME and shape (n, m) is NAME#alpha and NAME#mu, (n, m / 128) float16; NAME#digits, (n, m / 4)
    uint8, where bits 2k and 2k+1 of byte j of each 32 are the digit + 1 of column 32 k + j of the
    block (the layout of TQ2_1); and NAME#perm, (m,) int32, unless it is the identity. NAME#q4_k,
    (n, bytes of a row) uint8, are its rows in a stock type.

    outputs-0000.safetensors and so on hold, until that layer is rounded, the second moments of the
    gradients at its outputs: KEY#0 and so on, (r, r) float32 folded to (ceil(r / 2), r + 1), see
    `convert.symmetric`, for the parts of the outputs of the weights that are ternarized together
    (`group_key`).

    With a method that tunes the grids, written.safetensors holds the text that the model wrote for
    that, tuning.safetensors the state of a tuning that is under way, and tuned-0000.safetensors and
    so on the tuned NAME#alpha and NAME#mu.
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
                finished = [file for pattern in RESULTS for file in sorted(path.glob(pattern))]
                if finished and not force:
                    raise Pt2Error(_refusal(path, before, settings))
                for file in finished:
                    file.unlink()
                _write(path / SETTINGS, [settings.to_json().encode()])
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
        for pattern in (*RESULTS, "*.part", SETTINGS, LOCK):
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
        """Matrices in decoder layers that are stored as they are, or rounded when the file is
        written: checkpoint name -> the reason."""
        return self.settings.kept

    @property
    def stock(self) -> Mapping[str, str]:
        """Those that are rounded to a stock type with compensation: checkpoint name -> the type."""
        return self.settings.stock

    @property
    def tunes(self) -> bool:
        """Whether the grids are to be tuned once all layers are rounded."""
        return self.settings.method.get("tuning_epochs", 0) > 0

    def has_layer(self, index: int) -> bool:
        """Whether layer `index` is rounded; a damaged file is one that is not there."""
        return self._read_layer(self._file(index), index) is not None

    def is_rounded(self) -> bool:
        """Whether all layers are."""
        return all(self.has_layer(index) for index in range(self.settings.layers))

    def is_complete(self) -> bool:
        """Whether nothing is left to do: all layers are rounded, and tuned if they are to be."""
        return self.is_rounded() and (
            not self.tunes
            or all(self._read_layer(self._tuned_file(i), i) for i in range(self.settings.layers))
        )

    def layer_numbers(self) -> dict[str, int]:
        """The layer of each ternary weight by checkpoint name, in layer order; from headers only.

        Raises Pt2Error if a layer is not finished.
        """
        return self._layer_numbers("order")

    def stock_layer_numbers(self) -> dict[str, int]:
        """As `layer_numbers`, for the weights that were rounded to a stock type."""
        return self._layer_numbers("stock")

    def _layer_numbers(self, kind: str) -> dict[str, int]:
        numbers: dict[str, int] = {}
        for index in range(self.settings.layers):
            try:
                with self._file(index).open("rb") as file:
                    prefix = file.read(8)
                    header = prefix + file.read(int.from_bytes(prefix, "little"))
                numbers |= dict.fromkeys(json.loads(_description(header)[1])[kind], index)
            except (OSError, *MALFORMED):
                raise self._missing(self._file(index)) from None
        return numbers

    def save_layer(self, index: int, layer: Layer) -> None:
        """Store a layer; it is there wholly or not at all, whatever happens meanwhile."""
        tensors: dict[str, Tensor] = {}
        for name, weight in layer.weights.items():
            tensors |= _grid(name, weight.alpha, weight.mu)
            tensors[f"{name}#digits"] = pack_digits(weight.digits).cpu()
            if weight.perm is not None:
                tensors[f"{name}#perm"] = weight.perm.cpu().to(torch.int32)
        for name, stock in layer.stock.items():
            tensors[f"{name}#{stock.kind}"] = stock.packed
        for name, alternatives in layer.alternatives.items():
            tensors |= {f"{name}#{kind}": stock.packed for kind, stock in alternatives.items()}
        content = {
            "layer": index,
            "reports": layer.reports,
            "order": list(layer.weights),
            "stock": {name: stock.kind for name, stock in layer.stock.items()},
            "alternatives": {name: list(of_name) for name, of_name in layer.alternatives.items()},
        }
        _save(self._file(index), content, tensors)

    def load_layer(self, index: int) -> Layer:
        """Layer `index` as it was ternarized. Raises Pt2Error if it is not there or damaged."""
        content, tensors = self._layer(index)
        return Layer(
            {name: _packed(tensors, name).unpack() for name in content["order"]},
            {name: _stock(tensors, name, kind) for name, kind in content["stock"].items()},
            {
                name: {kind: _stock(tensors, name, kind) for kind in kinds}
                for name, kinds in content["alternatives"].items()
            },
            content["reports"],
        )

    def load_packed(self, index: int) -> tuple[dict[str, PackedWeight], dict[str, StockWeight]]:
        """The ternary weights of `load_layer`, not unpacked, and those in stock types."""
        content, tensors = self._layer(index)
        ternary = {name: _packed(tensors, name) for name in content["order"]}
        stock = {name: _stock(tensors, name, kind) for name, kind in content["stock"].items()}
        return ternary, stock

    def save_tuned(self, index: int, grids: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Store the tuned alpha and mu of layer `index`."""
        tensors: dict[str, Tensor] = {}
        for name, (alpha, mu) in grids.items():
            tensors |= _grid(name, alpha, mu)
        _save(self._tuned_file(index), {"layer": index}, tensors)

    def final_layer(self, index: int) -> Layer:
        """Layer `index` as it goes into the file.

        Raises Pt2Error if it is not there or damaged.
        """
        layer = self.load_layer(index)
        if not self.tunes:
            return layer
        found = self._read_layer(self._tuned_file(index), index)
        if found is None:
            raise self._missing(self._tuned_file(index))
        _, tuned = found
        weights = {
            name: replace(weight, alpha=tuned[f"{name}#alpha"], mu=tuned[f"{name}#mu"])
            for name, weight in layer.weights.items()
        }
        return replace(layer, weights=weights)

    def final_weights(self, index: int) -> dict[str, TernaryWeight]:
        """The ternary weights of `final_layer`."""
        return self.final_layer(index).weights

    def save_outputs(self, index: int, statistics: Mapping[str, OutputStatistics]) -> None:
        """Store those of layer `index`, by `group_key`."""
        tensors = {
            f"{name}#{number}": fold(part).cpu()
            for name, of_group in statistics.items()
            for number, part in enumerate(of_group.parts)
        }
        _save(self._outputs_file(index), {"layer": index}, tensors)

    def load_outputs(self, index: int) -> dict[str, StoredOutputs] | None:
        """What `save_outputs` stored; None if there is nothing, or it is damaged."""
        found = _read(self._outputs_file(index))
        # An earlier version did not fold them.
        if found is None or not all(map(is_folded, found[1].values())):
            return None
        parts: dict[str, dict[int, Tensor]] = {}
        for key, part in found[1].items():
            name, _, number = key.rpartition("#")
            parts.setdefault(name, {})[int(number)] = part
        return {n: StoredOutputs([p for _, p in sorted(of.items())]) for n, of in parts.items()}

    def drop_outputs(self, index: int) -> None:
        """Delete what `save_outputs` stored."""
        self._outputs_file(index).unlink(missing_ok=True)

    def save_written(self, ids: Tensor) -> None:
        """Store the text that the model wrote, ids (windows, length) int64."""
        _save(self.path / WRITTEN, {}, {"ids": ids})

    def load_written(self) -> Tensor | None:
        """What `save_written` stored; None if there is nothing, or it is damaged."""
        found = _read(self.path / WRITTEN)
        return None if found is None else found[1]["ids"]

    def save_tuning(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the state of the tuning after `step` steps."""
        _save(self.path / TUNING, {"step": step}, tensors)

    def load_tuning(self) -> tuple[int, dict[str, Tensor]] | None:
        """What `save_tuning` stored last; None if there is nothing, or it is damaged."""
        found = _read(self.path / TUNING)
        return None if found is None else (found[0]["step"], found[1])

    def _file(self, index: int) -> Path:
        return self.path / f"layer-{index:04d}.safetensors"

    def _outputs_file(self, index: int) -> Path:
        return self.path / f"outputs-{index:04d}.safetensors"

    def _tuned_file(self, index: int) -> Path:
        return self.path / f"tuned-{index:04d}.safetensors"

    def _missing(self, path: Path) -> Pt2Error:
        return Pt2Error(
            f"{path} is missing or damaged: run the same conversion again, which makes what is "
            "missing"
        )

    def _layer(self, index: int) -> Content:
        found = self._read_layer(self._file(index), index)
        if found is None:
            raise self._missing(self._file(index))
        return found

    def _read_layer(self, path: Path, index: int) -> Content | None:
        """What `_save` wrote about layer `index`; None unless every byte of it is there."""
        found = _read(path)
        return found if found is not None and found[0].get("layer") == index else None


def pack_digits(digits: Tensor) -> Tensor:
    """(n, m) int8 in {-1, 0, 1} -> (n, m / 4) uint8 in the layout of `WorkDirectory`."""
    planes = (digits + 1).to(torch.uint8).view(len(digits), -1, 4, BLOCK_SIZE // 4)
    packed = planes[:, :, 0].clone()
    for k in range(1, 4):
        packed |= planes[:, :, k] << 2 * k
    return packed.view(len(digits), -1)


def unpack_digits(packed: Tensor) -> Tensor:
    """The inverse of `pack_digits`."""
    quarters = packed.view(len(packed), -1, BLOCK_SIZE // 4)
    planes = torch.stack([(quarters >> 2 * k) & 3 for k in range(4)], dim=2)
    return planes.view(len(packed), -1).to(torch.int8) - 1


def _grid(name: str, alpha: Tensor, mu: Tensor) -> dict[str, Tensor]:
    return {f"{name}#alpha": alpha.cpu().contiguous(), f"{name}#mu": mu.cpu().contiguous()}


def _packed(tensors: Mapping[str, Tensor], name: str) -> PackedWeight:
    perm = tensors.get(f"{name}#perm")
    return PackedWeight(
        alpha=tensors[f"{name}#alpha"],
        mu=tensors[f"{name}#mu"],
        digits=tensors[f"{name}#digits"],
        perm=None if perm is None else perm.long(),
    )


def _stock(tensors: Mapping[str, Tensor], name: str, kind: str) -> StockWeight:
    return StockWeight(kind, tensors[f"{name}#{kind}"])


def _description(raw: bytes) -> list[str]:
    """[digest, JSON] from the start of a layer's file."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"]["pt2gguf"])


def _digest(content: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).numpy().data.cast("B")


def _save(path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, tensor by tensor: safetensors' own `save` makes all of it first."""
    text = json.dumps(content, sort_keys=True)
    header: dict[str, Any] = {
        "__metadata__": {"pt2gguf": json.dumps([_digest(text, tensors), text])}
    }
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # keeps them aligned
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    data = (_bytes(tensors[name]) for name in names)
    _write(path, itertools.chain([len(raw).to_bytes(8, "little"), raw], data))


def _read(path: Path) -> Content | None:
    """What `_save` wrote, content and tensors; None unless every byte of it is there."""
    try:
        with safe_open(path, "pt") as file:
            digest, description = json.loads(file.metadata()["pt2gguf"])
            # Copies: what is mapped would change, or be gone, with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if digest != _digest(description, tensors):
            return None
        return json.loads(description), tensors
    except (OSError, SafetensorError, *MALFORMED):
        return None


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file under its name only once all of it is on the disk."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
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
