from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory import growth

from pt2gguf.convert.settings import Settings, differences
from pt2gguf.convert.workdir import Layer, WorkDirectory, pack_digits, unpack_digits
from pt2gguf.errors import Pt2Error
from pt2gguf.ternary import StockWeight, TernaryWeight

SETTINGS = Settings(
    model="abc",
    layers=2,
    method={"name": "paper", "gptaq": 0.25},
    calibration={"samples": 3},
    kept={"head": "asked for"},
    stock={"s.weight": "q4_k"},
    alternatives=["q2_k", "q3_k"],
    device="cpu",
    threads=1,
)


def _weight(rows: int, columns: int, seed: int, permuted: bool) -> TernaryWeight:
    g = torch.Generator().manual_seed(seed)
    scales = torch.randn(2, rows, columns // 128, generator=g).half()
    digits = torch.randint(-1, 2, (rows, columns), generator=g, dtype=torch.int8)
    perm = torch.randperm(columns, generator=g) if permuted else None
    return TernaryWeight(scales[0].abs(), scales[1], digits, perm)


def _layer(seed: int = 0) -> Layer:
    weights = {"z.weight": _weight(3, 256, seed, True), "a.weight": _weight(5, 128, seed, False)}
    return Layer(
        weights,
        {"s.weight": _stock_weight("q4_k", 144, seed)},
        {"z.weight": {"q2_k": _stock_weight("q2_k", 84, seed)}},
        {name: {"relative_error": 0.5} for name in [*weights, "s.weight"]},
    )


def _stock_weight(kind: str, size: int, seed: int) -> StockWeight:
    g = torch.Generator().manual_seed(seed)
    return StockWeight(kind, torch.randint(0, 256, (3, size), generator=g, dtype=torch.uint8))


def _same(a: StockWeight, b: StockWeight) -> bool:
    return a.kind == b.kind and torch.equal(a.packed, b.packed)


def _equal(a: TernaryWeight, b: TernaryWeight) -> bool:
    if (a.perm is None) != (b.perm is None):
        return False
    pairs = [(a.alpha, b.alpha), (a.mu, b.mu), (a.digits, b.digits)]
    if a.perm is not None and b.perm is not None:
        pairs.append((a.perm, b.perm))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_packing_is_the_layout_that_the_format_fixes(rows: int, blocks: int, seed: int) -> None:
    digits = _weight(rows, 128 * blocks, seed, False).digits
    packed = pack_digits(digits)
    assert packed.shape == (rows, 32 * blocks)
    assert torch.equal(unpack_digits(packed), digits)
    for row in range(rows):
        for column in range(128 * blocks):
            block, inside = divmod(column, 128)
            k, j = divmod(inside, 32)
            u = (int(packed[row, 32 * block + j]) >> (2 * k)) & 3
            assert u == int(digits[row, column]) + 1


def test_layers_come_back_as_they_were(tmp_path: Path) -> None:
    layer = _layer()
    with WorkDirectory.create(tmp_path / "w", SETTINGS) as work:
        assert not work.has_layer(1)
        work.save_layer(1, layer)
        assert work.has_layer(1)
        assert not work.is_complete()
        loaded = work.load_layer(1)
    assert list(loaded.weights) == list(layer.weights)
    assert all(_equal(loaded.weights[name], layer.weights[name]) for name in layer.weights)
    assert loaded.stock.keys() == {"s.weight"}
    assert _same(loaded.stock["s.weight"], layer.stock["s.weight"])
    assert loaded.alternatives.keys() == {"z.weight"}
    assert loaded.alternatives["z.weight"].keys() == {"q2_k"}
    assert _same(loaded.alternatives["z.weight"]["q2_k"], layer.alternatives["z.weight"]["q2_k"])
    assert loaded.reports == layer.reports
    with WorkDirectory.open_existing(tmp_path / "w") as work:
        with pytest.raises(Pt2Error, match=r"layer-0000.safetensors is missing or damaged"):
            list(work.layer_numbers())
        work.save_layer(0, Layer({"b.weight": _weight(1, 128, 0, False)}))
        assert list(work.layer_numbers()) == ["b.weight", "z.weight", "a.weight"]
        assert work.stock_layer_numbers() == {"s.weight": 1}
        assert work.stock == {"s.weight": "q4_k"}
        assert work.kept == {"head": "asked for"}
        assert work.settings == SETTINGS
    assert not list((tmp_path / "w").glob("*.part"))


def test_same_layer_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        with WorkDirectory.create(tmp_path / name, SETTINGS) as work:
            work.save_layer(0, _layer())
        files.append((tmp_path / name / "layer-0000.safetensors").read_bytes())
    assert files[0] == files[1]


def _saving(path: Path) -> Callable[[], object]:
    work = WorkDirectory.create(path, SETTINGS)
    tensors = {f"{number}": torch.ones(2**21) for number in range(16)}
    return lambda: work.save_tuning(1, tensors)


def _loading(path: Path) -> Callable[[], object]:
    return WorkDirectory.create(path, SETTINGS).load_tuning


def test_memory_of_the_tuning_state(tmp_path: Path) -> None:
    """Of a large model it is gigabytes, which are there once and not twice."""
    size = 16 * 2**21 * 4
    assert growth(_saving, tmp_path) < size / 2
    # Once in the process, and once as mapped pages that the system may drop.
    assert size < growth(_loading, tmp_path) < 2.25 * size


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1, -100])
def test_truncated_layer_counts_as_not_finished(tmp_path: Path, kept: int) -> None:
    with WorkDirectory.create(tmp_path, SETTINGS) as work:
        work.save_layer(0, _layer())
        file = tmp_path / "layer-0000.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        assert not work.has_layer(0)
        with pytest.raises(Pt2Error, match=r"layer-0000.safetensors is missing or damaged: run"):
            work.load_layer(0)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    with WorkDirectory.create(tmp_path, SETTINGS) as work:
        work.save_layer(0, _layer())
        good = work.load_layer(0)
        file = tmp_path / "layer-0000.safetensors"
        original = file.read_bytes()
        for place in range(0, len(original), 3):
            spoiled = bytearray(original)
            spoiled[place] ^= 0x10
            file.write_bytes(spoiled)
            if work.has_layer(0):  # the space that fills up the header, at most
                assert work.load_layer(0).reports == good.reports
                assert list(work.load_layer(0).weights) == list(good.weights)
                assert original[place : place + 1] == b" "


def test_layer_under_another_number(tmp_path: Path) -> None:
    with WorkDirectory.create(tmp_path, SETTINGS) as work:
        work.save_layer(0, _layer())
        (tmp_path / "layer-0000.safetensors").rename(tmp_path / "layer-0001.safetensors")
        assert not work.has_layer(1)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"model": "def"}, "model was abc and is now def"),
        ({"method": {"name": "paper", "gptaq": 0.0}}, "method.gptaq was 0.25 and is now 0.0"),
        ({"calibration": {"samples": 4}}, "calibration.samples was 3 and is now 4"),
        ({"kept": {}}, "kept.head was asked for and is now absent"),
        ({"threads": 2}, "threads was 1 and is now 2"),
        ({"tool": "9"}, "and is now 9"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, change: dict, phrase: str) -> None:
    with WorkDirectory.create(tmp_path, SETTINGS) as work:
        work.save_layer(0, _layer())
    other = dataclasses.replace(SETTINGS, **change)
    assert len(differences(SETTINGS, other)) == 1
    with pytest.raises(Pt2Error, match=f"was begun with other settings .*{phrase}.*--force"):
        WorkDirectory.create(tmp_path, other)
    with WorkDirectory.create(tmp_path, SETTINGS) as work:
        assert work.has_layer(0)
    with WorkDirectory.create(tmp_path, other, force=True) as work:
        assert not work.has_layer(0)
        assert work.settings == other


def test_same_settings_keep_layers_even_with_force(tmp_path: Path) -> None:
    with WorkDirectory.create(tmp_path, SETTINGS) as work:
        work.save_layer(0, _layer())
    with WorkDirectory.create(tmp_path, SETTINGS, force=True) as work:
        assert work.has_layer(0)


def test_unreadable_settings(tmp_path: Path) -> None:
    with WorkDirectory.create(tmp_path, SETTINGS) as work:
        work.save_layer(0, _layer())
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(Pt2Error, match="its settings cannot be read"):
        WorkDirectory.create(tmp_path, SETTINGS)
    with pytest.raises(Pt2Error, match=r"settings.json cannot be read"):
        WorkDirectory.open_existing(tmp_path)


def test_two_processes(tmp_path: Path) -> None:
    script = (
        "import fcntl, sys, time\n"
        f"lock = open({str(tmp_path / 'lock')!r}, 'wb')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(Pt2Error, match="is in use by another conversion: wait for it"):
            WorkDirectory.create(tmp_path, SETTINGS)
        holder.kill()
    WorkDirectory.create(tmp_path, SETTINGS).close()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Pt2Error, match=r"cannot be written .*choose another --work"):
        WorkDirectory.create(tmp_path / "file" / "w", SETTINGS)
    with pytest.raises(Pt2Error, match=r"is not a work directory: it has no settings.json"):
        WorkDirectory.open_existing(tmp_path / "nothing")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with WorkDirectory.create(tmp_path, SETTINGS) as work:
        monkeypatch.setattr("pt2gguf.convert.workdir.os.fsync", full)
        with pytest.raises(Pt2Error, match=r"layer-0000.* \(No space left on device\): free space"):
            work.save_layer(0, _layer())
        assert not work.has_layer(0)
