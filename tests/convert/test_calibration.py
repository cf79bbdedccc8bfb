from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pt2gguf.convert.calibration import draw_samples, load_calibration
from pt2gguf.errors import Pt2Error


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a tokenizer of one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16)
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _text(path: Path, size: int, letters: str = "abcdefgh \n") -> str:
    rng = random.Random(size)
    path.write_text("".join(rng.choice(letters) for _ in range(size)))
    return str(path)


def _decode(model: Path, ids: torch.Tensor) -> str:
    return PreTrainedTokenizerFast.from_pretrained(model).decode(ids)


def test_samples_are_windows_of_the_text(tmp_path: Path, model: Path) -> None:
    text = _text(tmp_path / "t.txt", 500)
    calibration = load_calibration([text], model, samples=7, length=31, seed=3)
    assert calibration.ids.shape == (7, 31)
    assert calibration.ids.dtype == torch.int64
    content = (tmp_path / "t.txt").read_text()
    for sample in calibration.ids:
        assert _decode(model, sample) in content


def test_seed_decides(tmp_path: Path, model: Path) -> None:
    text = _text(tmp_path / "t.txt", 500)
    a, b, c = (
        load_calibration([text], model, samples=5, length=20, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(a.ids, b.ids)
    assert a.provenance == b.provenance
    assert not torch.equal(a.ids, c.ids)
    assert a.provenance["sha256"] != c.provenance["sha256"]


def test_provenance(tmp_path: Path, model: Path) -> None:
    calibration = load_calibration(
        [_text(tmp_path / "t.txt", 500)], model, samples=5, length=20, seed=1
    )
    digest = hashlib.sha256(calibration.ids.numpy().astype("<i8").tobytes()).hexdigest()
    assert calibration.provenance == {
        "sources": ["t.txt"],
        "samples": 5,
        "length": 20,
        "seed": 1,
        "sha256": digest,
    }


def test_sources_share_the_samples(tmp_path: Path, model: Path) -> None:
    sources = [
        _text(tmp_path / f"{letter}.txt", size, letter)
        for letter, size in (("a", 5000), ("b", 60), ("c", 60))
    ]
    calibration = load_calibration(sources, model, samples=7, length=20, seed=0)
    assert [_decode(model, sample)[0] for sample in calibration.ids] == list("aaabbcc")


def test_starts_cover_the_whole_text() -> None:
    ids = torch.arange(12)
    samples = torch.stack(
        [
            draw_samples(ids, "t", samples=1, length=10, rng=random.Random(seed))[0]
            for seed in range(40)
        ]
    )
    assert set(samples[:, 0].tolist()) == {0, 1, 2}


def test_ids_are_taken_as_they_are(tmp_path: Path, model: Path) -> None:
    ids = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.save(tmp_path / "ids.npy", ids)
    calibration = load_calibration(
        [str(tmp_path / "ids.npy")], model, samples=128, length=512, seed=0
    )
    assert torch.equal(calibration.ids, torch.arange(12).reshape(3, 4))
    assert calibration.provenance["seed"] is None


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3)), r"are float64 of shape \(2, 3\): an integer array"),
        (np.zeros(3, int), r"of shape \(3,\)"),
        (np.zeros((0, 3), int), r"of shape \(0, 3\)"),
    ],
)
def test_unusable_ids(tmp_path: Path, model: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(Pt2Error, match=message):
        load_calibration([str(tmp_path / "ids.npy")], model, samples=1, length=1, seed=0)


def test_ids_that_are_no_array(tmp_path: Path, model: Path) -> None:
    (tmp_path / "ids.npy").write_text("hello")
    with pytest.raises(Pt2Error, match=r"cannot be read as \.npy"):
        load_calibration([str(tmp_path / "ids.npy")], model, samples=1, length=1, seed=0)


@pytest.mark.parametrize("size", [0, 1, 99])
def test_too_short_text(tmp_path: Path, model: Path, size: int) -> None:
    text = _text(tmp_path / "short.txt", size)
    with pytest.raises(
        Pt2Error,
        match=rf"short.txt is too short: it has {size} tokens, and 5 samples of 20 need 100; give",
    ):
        load_calibration([text], model, samples=5, length=20, seed=0)


def test_text_that_is_just_long_enough(tmp_path: Path, model: Path) -> None:
    text = _text(tmp_path / "t.txt", 100)
    assert load_calibration([text], model, samples=5, length=20, seed=0).ids.shape == (5, 20)


def test_refusals(tmp_path: Path, model: Path) -> None:
    text = _text(tmp_path / "t.txt", 100)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    cases = [
        ([], 1, "no calibration text was given"),
        ([text], 0, "0 samples of 20 tokens are nothing to calibrate on"),
        ([text, text], 1, "1 samples cannot be shared by 2 calibration sources"),
        ([text, "x.npy"], 2, "x.npy holds token ids and cannot be mixed"),
        (["nowhere"], 1, r"'nowhere' is neither a file nor a data set \(wikitext2, c4, ptb\)"),
        ([str(binary)], 1, "binary cannot be read as UTF-8"),
    ]
    for sources, samples, message in cases:
        with pytest.raises(Pt2Error, match=message):
            load_calibration(sources, model, samples=samples, length=20, seed=0)


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = _text(tmp_path / "t.txt", 100)
    with pytest.raises(Pt2Error, match="has no tokenizer that transformers can load"):
        load_calibration([text], tmp_path / "empty", samples=1, length=20, seed=0)


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_data_set_without_network(model: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(Pt2Error, match=rf"data set {name} cannot be had .*give a text file instea"):
        load_calibration([name], model, samples=1, length=20, seed=0)


@pytest.mark.parametrize(
    ("name", "column"), [("wikitext2", "text"), ("c4", "text"), ("ptb", "sentence")]
)
def test_data_set(model: Path, monkeypatch: pytest.MonkeyPatch, name: str, column: str) -> None:
    class Rows(list):
        def __getitem__(self, key):
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    rows = Rows({column: "abcdefgh" * 4} for _ in range(1000))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    calibration = load_calibration([name], model, samples=4, length=20, seed=0)
    assert calibration.provenance["sources"] == [name]
