"""Weights traced back from a file: through every kind of change that a converter makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pt2gguf.errors import Pt2Error
from pt2gguf.evaluation.file_weights import bits_per_weight, open_gguf, read_file_weights

Change = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]


class FakeCheckpoint:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.path = Path("model")
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def trace_back(
    tmp_path: Path,
    llama_cpp: Any,
    tensors: dict[str, Tensor],
    change: Change,
    stored: dict[str, np.ndarray] | None = None,
) -> dict[str, Tensor]:
    """Writes what `change` makes of `tensors`, or `stored`, to a file, and reads that back."""
    converted = {}
    for name, tensor in tensors.items():
        for new_name, arrived in change(name, tensor):
            converted[new_name] = arrived.numpy()
    file = write(tmp_path / "f.gguf", llama_cpp.gguf, stored or converted)
    converter = SimpleNamespace(
        filter_tensors=lambda item: item,
        get_tensors=lambda: tensors.items(),
        modify_tensors=lambda tensor, name, block: change(name, tensor),
    )
    fake = SimpleNamespace(converter=lambda _: converter, gguf=llama_cpp.gguf)
    return read_file_weights(FakeCheckpoint(tensors), file, open_gguf(file, llama_cpp.gguf), fake)


def write(path: Path, gguf: Any, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Stacking:
    """Keeps the experts of a layer until all are there, as the converter does."""

    def __init__(self) -> None:
        self._experts: list[Tensor] = []

    def __call__(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        if "experts" not in name:
            return [(name, tensor)]
        self._experts.append(tensor)
        if len(self._experts) < 3:
            return []
        stacked, self._experts = torch.stack(self._experts), []
        return [("blk.0.ffn_up_exps.weight", stacked)]


CHANGES: dict[str, Change] = {
    "rename": lambda name, t: [("new." + name, t)],
    "transpose": lambda name, t: [(name, t.mT if t.dim() > 1 else t)],
    "reorder": lambda name, t: [(name, t.flip(0).reshape(t.shape))],
    "split": lambda name, t: [(f"{name}.{i}", part) for i, part in enumerate(t.split(2))],
    "stack": Stacking(),
    "add one": lambda name, t: [(name, t + 1)],
    "add one to norms": lambda name, t: [(name, t + 1.0 if t.dim() == 1 else t)],
    "drop": lambda name, t: [(name, t)] if t.dim() > 1 else [],
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_are_undone(tmp_path, llama_cpp, kind) -> None:
    generator = torch.Generator().manual_seed(1)
    # Eighths, so that adding and subtracting one is exact.
    tensors = {
        name: torch.randint(-64, 64, shape, generator=generator) / 8
        for name, shape in {
            "layers.0.experts.0.up": (4, 32),
            "layers.0.experts.1.up": (4, 32),
            "layers.0.experts.2.up": (4, 32),
            "layers.0.norm": (7,),
            "layers.0.odd": (5, 3),
            "embeddings": (9, 32),
        }.items()
    }
    found = trace_back(tmp_path, llama_cpp, tensors, CHANGES[kind])
    expected = {n for n, t in tensors.items() if kind != "drop" or t.dim() > 1}
    assert found.keys() == expected
    for name in expected:
        assert torch.equal(found[name], tensors[name]), name


def test_values_are_those_of_the_file(tmp_path, llama_cpp) -> None:
    """Not the checkpoint's: a conversion may have tuned even the norms."""
    tensors = {"a": torch.arange(12.0).view(3, 4), "norm": torch.ones(5)}
    stored = {"a": np.full((4, 3), 2, np.float32), "norm": np.full(5, 3.5, np.float32)}
    found = trace_back(
        tmp_path, llama_cpp, tensors, lambda n, t: [(n, t.T if n == "a" else t + 1)], stored
    )
    assert torch.equal(found["a"], torch.full((3, 4), 2.0))
    assert torch.equal(found["norm"], torch.full((5,), 2.5))


def test_column_orders_are_undone(tmp_path, llama_cpp) -> None:
    weight = torch.arange(24.0).view(4, 6)
    perm = np.array([3, 1, 5, 0, 4, 2], np.int32)
    stored = {"blk.0.q.weight": weight.numpy()[:, perm], "blk.0.q.perm": perm}
    found = trace_back(
        tmp_path, llama_cpp, {"q": weight}, lambda n, t: [("blk.0.q.weight", t)], stored
    )
    assert torch.equal(found["q"], weight)


def test_what_cannot_be_undone_must_be_unchanged(tmp_path, llama_cpp) -> None:
    tensors = {"decay": torch.tensor([0.1, 0.7, 2.0]), "w": torch.ones(2, 2)}

    def change(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        return [(name, -tensor.exp() if name == "decay" else tensor)]

    found = trace_back(tmp_path, llama_cpp, tensors, change)
    assert found.keys() == {"w"}  # the rest is the checkpoint's
    stored = {"decay": np.array([-1.0, -2.0, -3.0], np.float32), "w": np.ones((2, 2), np.float32)}
    with pytest.raises(Pt2Error, match="decay"):
        trace_back(tmp_path, llama_cpp, tensors, change, stored)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ({"b": np.ones((2, 3), np.float32)}, "has no tensor a"),
        ({"a": np.ones((2, 4), np.float32)}, "shape .2, 4. for tensor a"),
        ({"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}, "such as b"),
        ({"a": np.full((2, 3), np.nan, np.float32)}, "cannot be traced back"),
    ],
)
def test_files_of_another_model_are_refused(tmp_path, llama_cpp, stored, reason) -> None:
    tensors = {"a": torch.ones(2, 3)}
    with pytest.raises(Pt2Error, match=reason):
        trace_back(tmp_path, llama_cpp, tensors, lambda n, t: [(n, t)], stored)


def test_twice_in_the_file_is_refused(tmp_path, llama_cpp) -> None:
    """Which of the two would it be?"""
    with pytest.raises(Pt2Error, match="cannot be traced back"):
        trace_back(tmp_path, llama_cpp, {"a": torch.ones(2, 3)}, lambda n, t: [("x", t), ("y", t)])


def test_bits_per_weight_count_matrices_with_their_orders(tmp_path, llama_cpp) -> None:
    tensors = {
        "token_embd.weight": np.ones((8, 256), np.float32),
        "blk.0.attn_norm.weight": np.ones(256, np.float32),
        "blk.0.attn_q.weight": np.ones((4, 256), np.float16),
        "blk.0.attn_q.perm": np.arange(256, dtype=np.int32),
    }
    writer_file = write(tmp_path / "a.gguf", llama_cpp.gguf, tensors)
    expected = (4 * 256 * 16 + 256 * 32) / (4 * 256)
    assert bits_per_weight(open_gguf(writer_file, llama_cpp.gguf)) == expected


def test_bits_per_weight_of_a_ternary_file(converted, llama_cpp) -> None:
    """2.25 for each of tiny-4m's weights, and 32 for each column of the four attention inputs."""
    reader = open_gguf(converted, llama_cpp.gguf)
    perms = [t for t in reader.tensors if t.name.endswith(".perm")]
    orders = sum(int(t.n_elements) for t in perms)
    weights = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 768)
    assert len(perms) >= 4 * 4
    assert bits_per_weight(reader) == pytest.approx(2.25 + 32 * orders / weights)


def test_not_gguf(tmp_path, llama_cpp) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"PK\x03\x04 something else entirely, but long enough to be read")
    with pytest.raises(Pt2Error, match="not a readable GGUF file"):
        open_gguf(file, llama_cpp.gguf)
